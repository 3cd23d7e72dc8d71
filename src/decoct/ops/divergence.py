"""How far one model's predictions are from another's, or from the text, token by token (nats)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.native.divergence import can_diverge, diverge


def kl_of(own: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """KL(base ‖ own) of each token, float64, from logits in any dtype; both softmaxes are taken in float32."""
    if _by_kernels(own, base):
        return diverge(own.contiguous(), base.contiguous())
    wanted, found = (torch.log_softmax(each.float(), dim=-1) for each in (base, own))
    return wanted.exp().mul_(wanted.sub_(found)).sum(-1, dtype=torch.float64)


def kl_and_slope(
    own: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"]
) -> tuple[float, Float[Tensor, "tokens vocab"]]:
    """The sum over tokens of the same, and its gradient by `own`, float32: softmax(own) - softmax(base)."""
    if _by_kernels(own, base):
        slope = own.float().contiguous() if own.dtype != torch.float32 else own.clone()
        loss = diverge(slope, base.float().contiguous(), weights=torch.ones(len(own)))
        return float(loss.sum()), slope
    chances, found = torch.log_softmax(base.float(), dim=-1), torch.log_softmax(own.float(), dim=-1)
    wanted = chances.exp()
    loss = chances.sub_(found).mul_(wanted)  # in place: logits are large
    return float(loss.sum()), found.exp_().sub_(wanted)


def surprise_of(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The negative log-probability of each token's target, float64."""
    if _by_kernels(logits, logits):
        return diverge(logits.contiguous(), targets)
    found = -torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None])[:, 0]
    return found.double()


def _by_kernels(own: Tensor, base: Tensor) -> bool:
    return own.dtype == base.dtype and can_diverge(own.dtype, own.device)
