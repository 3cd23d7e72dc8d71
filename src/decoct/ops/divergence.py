"""How far one model's predictions are from another's, or from the text, token by token (nats).

Softmaxes are taken in float32, or in float64 if the logits are. Log-probabilities of less than -10 000 count as
that, so that a token that a model rules out gives no NaN.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.native.divergence import LEAST, can_diverge, diverge


@torch.no_grad()
def kl_of(own: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """KL(base ‖ own) of each token's softmax, float64, from logits in any dtype."""
    own, base = _alike(own, base)
    if _known(own):
        return diverge(own.contiguous(), base.contiguous())
    wanted, found = _log_softmax(base), _log_softmax(own)
    return wanted.exp().mul_(wanted.sub_(found)).sum(-1, dtype=torch.float64)


@torch.no_grad()
def kl_and_slope(
    own: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"]
) -> tuple[float, Float[Tensor, "tokens vocab"]]:
    """The sum over tokens of the same, and its gradient by `own`, not rounded: softmax(own) - softmax(base)."""
    if _known(own):
        slope, wanted = _float32_copy(own), base.float().contiguous()
        return float(diverge(slope, wanted, weights=torch.ones(len(own))).sum()), slope
    wanted, found = _log_softmax(base), _log_softmax(own)
    chances = wanted.exp()
    loss = wanted.sub_(found).mul_(chances)  # in place: logits are large
    return float(loss.sum(dtype=torch.float64)), found.exp_().sub_(chances)


@torch.no_grad()
def surprise_of(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The negative log-probability of each token's target, float64; infinite where it is ruled out."""
    if _known(logits):
        found = diverge(logits.contiguous(), targets.long().contiguous())
    else:
        found = -_log_softmax(logits).gather(1, targets.long()[:, None])[:, 0].double()
    return found.masked_fill_(found >= -LEAST, torch.inf)


@torch.no_grad()
def surprise_and_slope(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> tuple[float, Float[Tensor, "tokens vocab"]]:
    """The sum over tokens of the same, and its gradient by the logits, not rounded."""
    if _known(logits):
        slope = _float32_copy(logits)
        found = diverge(slope, targets.long().contiguous(), weights=torch.ones(len(logits)))
        return float(found.sum()), slope
    slope = _log_softmax(logits)
    loss = -float(slope.gather(1, targets.long()[:, None]).sum(dtype=torch.float64))
    slope.exp_()[torch.arange(len(targets)), targets.long()] -= 1.0
    return loss, slope


def _known(logits: Tensor) -> bool:
    """Whether there are kernels for them."""
    return can_diverge(logits.dtype, logits.device)


def _alike(own: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """In one dtype."""
    return (own, base) if own.dtype == base.dtype else (_exact(own), _exact(base))


def _float32_copy(logits: Tensor) -> Tensor:
    return logits.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(_exact(logits), dim=-1).clamp_(min=LEAST)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
