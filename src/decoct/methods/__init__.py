"""Every method there is, by the name recipes use. A new method is one file and one line here."""

from decoct.methods.base import (
    BlockMethod,
    BlockWeights,
    EdgeScaling,
    GainRefit,
    LinearCorrection,
    LinearMethod,
    ModelMethod,
    Passage,
    Rotation,
)
from decoct.methods.cache.fp8_cache import FP8Cache
from decoct.methods.cache.kivi import KIVI
from decoct.methods.cache.kvquant import KVQuant
from decoct.methods.cache.rotated_int4 import RotatedInt4
from decoct.methods.cache_policy import CacheMethod, Place
from decoct.methods.depth import Cut, Cuts, DepthMethod, Probe
from decoct.methods.experts import ExpertMethod
from decoct.methods.factorize.eora import EoRA
from decoct.methods.factorize.svd_llm import SVDLLM
from decoct.methods.guided import ByGroup, Guided
from decoct.methods.heal.adapter import Adapter
from decoct.methods.heal.distill import Distill
from decoct.methods.heal.norm_tweaking import NormTweaking
from decoct.methods.prune.alps import ALPS
from decoct.methods.prune.angular import Angular
from decoct.methods.prune.blockpruner import BlockPruner
from decoct.methods.prune.distilbert import DistilBERT
from decoct.methods.prune.dsnot import DSnoT
from decoct.methods.prune.evopress import EvoPress
from decoct.methods.prune.flap import FLAP
from decoct.methods.prune.hc_smoe import HCSMoE
from decoct.methods.prune.llm_pruner import LLMPruner
from decoct.methods.prune.magnitude import Magnitude
from decoct.methods.prune.magnitude_width import MagnitudeWidth
from decoct.methods.prune.minitron import Minitron
from decoct.methods.prune.obd import OBD
from decoct.methods.prune.obs import OBS
from decoct.methods.prune.reap import REAP
from decoct.methods.prune.ria import RIA
from decoct.methods.prune.sheared_llama import ShearedLLaMA
from decoct.methods.prune.shortgpt import ShortGPT
from decoct.methods.prune.sleb import SLEB
from decoct.methods.prune.slicegpt import SliceGPT
from decoct.methods.prune.sparsegpt import SparseGPT
from decoct.methods.prune.wanda import Wanda
from decoct.methods.prune.ziplm import ZipLM
from decoct.methods.quantize.aqlm import AQLM
from decoct.methods.quantize.autoround import AutoRound
from decoct.methods.quantize.awq import AWQ
from decoct.methods.quantize.awq_clip import AWQClip
from decoct.methods.quantize.billm import BiLLM
from decoct.methods.quantize.block_ap import BlockAP
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.methods.quantize.flexround import FlexRound
from decoct.methods.quantize.gptaq import GPTAQ
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.hqq import HQQ
from decoct.methods.quantize.inputs import Inputs
from decoct.methods.quantize.llm_int8 import LLMInt8
from decoct.methods.quantize.loftq import LoftQ
from decoct.methods.quantize.lrq import LRQ
from decoct.methods.quantize.mxfp import MXFP
from decoct.methods.quantize.omniquant import OmniQuant
from decoct.methods.quantize.omniquant_let import OmniQuantLET
from decoct.methods.quantize.onebit import OneBit
from decoct.methods.quantize.owq import OWQ
from decoct.methods.quantize.pb_llm import PBLLM
from decoct.methods.quantize.qat import QAT
from decoct.methods.quantize.qtip import QTIP
from decoct.methods.quantize.rtn import RTN
from decoct.methods.quantize.smoothquant import SmoothQuant
from decoct.methods.quantize.spqr import SpQR
from decoct.methods.quantize.squeezellm import SqueezeLLM
from decoct.methods.quantize.ternary import Ternary
from decoct.methods.rotate.quarot import QuaRot
from decoct.methods.rotate.spinquant import SpinQuant
from decoct.methods.width import WidthMethod

BlockStep = BlockMethod | EdgeScaling | GainRefit | Rotation
"""What works on whole blocks, as a step of its own beside `linear`."""

AnyMethod = LinearMethod | LinearCorrection | BlockStep | ModelMethod | CacheMethod

METHODS: dict[str, type[AnyMethod]] = {
    "quarot": QuaRot,
    "spinquant": SpinQuant,
    "rtn": RTN,
    "loftq": LoftQ,
    "hqq": HQQ,
    "mxfp": MXFP,
    "gptq": GPTQ,
    "gptaq": GPTAQ,
    "awq": AWQ,
    "awq_clip": AWQClip,
    "smoothquant": SmoothQuant,
    "omniquant_let": OmniQuantLET,
    "norm_tweaking": NormTweaking,
    "inputs": Inputs,
    "llm_int8": LLMInt8,
    "squeezellm": SqueezeLLM,
    "spqr": SpQR,
    "owq": OWQ,
    "qtip": QTIP,
    "aqlm": AQLM,
    "autoround": AutoRound,
    "flexround": FlexRound,
    "lrq": LRQ,
    "omniquant": OmniQuant,
    "block_ap": BlockAP,
    "e2e_qp": E2EQP,
    "distill": Distill,
    "adapter": Adapter,
    "qat": QAT,
    "billm": BiLLM,
    "ternary": Ternary,
    "pb_llm": PBLLM,
    "onebit": OneBit,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "distilbert": DistilBERT,
    "shortgpt": ShortGPT,
    "angular": Angular,
    "sleb": SLEB,
    "blockpruner": BlockPruner,
    "evopress": EvoPress,
    "magnitude_width": MagnitudeWidth,
    "minitron": Minitron,
    "flap": FLAP,
    "llm_pruner": LLMPruner,
    "ziplm": ZipLM,
    "sheared_llama": ShearedLLaMA,
    "slicegpt": SliceGPT,
    "ria": RIA,
    "obd": OBD,
    "obs": OBS,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
    "dsnot": DSnoT,
    "reap": REAP,
    "hc_smoe": HCSMoE,
    "svd_llm": SVDLLM,
    "eora": EoRA,
    "kivi": KIVI,
    "kvquant": KVQuant,
    "rotated_int4": RotatedInt4,
    "fp8_cache": FP8Cache,
}


def name_of(method: AnyMethod) -> str:
    """What recipes call a method."""
    return next(name for name, cls in METHODS.items() if type(method) is cls)


__all__ = [
    "METHODS",
    "AnyMethod",
    "BlockMethod",
    "BlockStep",
    "BlockWeights",
    "ByGroup",
    "CacheMethod",
    "Cut",
    "Cuts",
    "DepthMethod",
    "EdgeScaling",
    "ExpertMethod",
    "GainRefit",
    "Guided",
    "LinearCorrection",
    "LinearMethod",
    "ModelMethod",
    "Passage",
    "Place",
    "Probe",
    "Rotation",
    "WidthMethod",
    "name_of",
]
