"""Every loss there is, by the name recipes use. A new loss is one file and one line here.

Losses on predictions (`PredictionLoss`) are called with the student's predictions, the teacher's, and what is known of
the tokens; losses on inner states (`StateLoss`) with what pairs of blocks hold.
"""

from decoct.losses.attention_maps import AttentionMaps
from decoct.losses.base import Batch, Divergence, PredictionLoss, TokenLoss
from decoct.losses.cached_kl import CachedKL, TopK, keep_top
from decoct.losses.cakld import CAKLD, confidence_of
from decoct.losses.chunks import AT_ONCE, label_log_probs
from decoct.losses.cross_entropy import CrossEntropy
from decoct.losses.distillm2 import DistiLLM2
from decoct.losses.distribution import Aligned, Head, Logits, Mixed, MostConfident, Projected, Targets
from decoct.losses.exits import Exits
from decoct.losses.forward_kl import ForwardKL
from decoct.losses.hidden_states import HiddenStates
from decoct.losses.jeffreys import Jeffreys
from decoct.losses.jsd import JSD
from decoct.losses.minillm import MiniLLM
from decoct.losses.relations import Relations
from decoct.losses.reverse_kl import ReverseKL
from decoct.losses.skew_kl import SkewKL
from decoct.losses.skew_reverse_kl import SkewReverseKL
from decoct.losses.states import StateLoss
from decoct.losses.total_variation import TotalVariation
from decoct.losses.uld import ULD

AnyLoss = PredictionLoss | StateLoss | Exits

LOSSES: dict[str, type[AnyLoss]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jeffreys": Jeffreys,
    "jsd": JSD,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "total_variation": TotalVariation,
    "cakld": CAKLD,
    "distillm2": DistiLLM2,
    "minillm": MiniLLM,
    "cached_kl": CachedKL,
    "uld": ULD,
    "cross_entropy": CrossEntropy,
    "exits": Exits,
    "hidden_states": HiddenStates,
    "attention_maps": AttentionMaps,
    "relations": Relations,
}


def describe(name: str) -> str:
    """One line about a loss."""
    return (LOSSES[name].__doc__ or "").splitlines()[0]


__all__ = [
    "AT_ONCE",
    "CAKLD",
    "JSD",
    "LOSSES",
    "ULD",
    "Aligned",
    "AnyLoss",
    "AttentionMaps",
    "Batch",
    "CachedKL",
    "CrossEntropy",
    "DistiLLM2",
    "Divergence",
    "Exits",
    "ForwardKL",
    "Head",
    "HiddenStates",
    "Jeffreys",
    "Logits",
    "MiniLLM",
    "Mixed",
    "MostConfident",
    "PredictionLoss",
    "Projected",
    "Relations",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "StateLoss",
    "Targets",
    "TokenLoss",
    "TopK",
    "TotalVariation",
    "confidence_of",
    "describe",
    "keep_top",
    "label_log_probs",
]
