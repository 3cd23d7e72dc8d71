"""OmniQuant's learnable equivalent transform (arXiv 2308.13137): learn the scales of channels before rounding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import EdgeScaling
from decoct.ops.adam import Adam
from decoct.ops.grid import check_grid, resolve_group_size
from decoct.ops.rounding import rounded_to_extremes
from decoct.stats import Gram

_LIMIT = 1e4  # of a scale, and its inverse
_LEAST_SIZE = 1e-4  # of a channel, relative to the largest: channels that never fire keep a finite scale


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniQuantLET(EdgeScaling):
    """Learn each edge's channel scales for the least output error after rounding; the next steps do the rounding.

    Starts from SmoothQuant's scales, or from none where those are worse, and follows the gradient of the readers'
    squared output error, which the Gram matrix gives exactly over all calibration tokens. The paper takes the whole
    block's error instead, and learns `omniquant`'s clipping at the same time. The last three settings name what the
    following step does, so that the scales are learned for it.

    Attributes:
        num_steps: gradient steps for each edge.
        learning_rate: relative change of a scale in the first step, about; decays to zero.
        alpha: of the start: size^alpha / (largest weight)^(1 - alpha), 0 to 1.
        bits: of the rounding that follows.
        group_size: of the rounding that follows.
        symmetric: of the rounding that follows.
    """

    stat: ClassVar[type[Gram]] = Gram

    num_steps: int = 40
    learning_rate: float = 0.1
    alpha: float = 0.5
    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if self.num_steps < 1:
            raise ValueError("num_steps must be at least 1")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must lie between 0 and 1, not {self.learning_rate}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {self.alpha}")

    @override
    def check(self, shape: tuple[int, int]) -> None:
        resolve_group_size(self.group_size, shape[1])

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        return 56 * shape[0] * shape[1] + 12 * shape[1] ** 2

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        return (self.num_steps + 2) * (2.0 * shape[0] * shape[1] ** 2 + 60.0 * shape[0] * shape[1])

    @override
    def scale(
        self, readers: Sequence[Float[Tensor, "out in"]], stat: Gram, tie: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "in"]:
        H, w = stat.matrix(), torch.cat(list(readers))
        ones = torch.zeros(w.shape[1])
        least, _ = self._error(w, H, ones, tie)
        if not least < float("inf"):
            raise ValueError("weights or inputs hold NaN or infinite values; the checkpoint or the text is damaged")
        log_scale = self._start(w, H)
        if self._error(w, H, log_scale, tie)[0] > least:
            log_scale = ones
        best = log_scale.clone()
        adam = Adam({"scale": log_scale})
        for step in range(self.num_steps + 1):
            error, gradient = self._error(w, H, log_scale, tie)
            if error < least:
                best, least = log_scale.clone(), error
            rate = self.learning_rate * (1.0 - step / self.num_steps)
            adam.step({"scale": log_scale}, {"scale": gradient}, {"scale": rate})
        return tie(_scales(best))

    def _start(self, w: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> Float[Tensor, " in"]:
        """Logarithms of SmoothQuant's scales, a channel's size being its root mean square."""
        size, largest = torch.diagonal(H).sqrt(), w.abs().amax(0)
        size, largest = (each.clamp(min=_LEAST_SIZE * float(each.max())) for each in (size, largest))
        found = self.alpha * size.log() - (1.0 - self.alpha) * largest.log()
        return found - found.mean() if bool(torch.isfinite(found).all()) else torch.zeros_like(found)

    def _error(
        self,
        w: Float[Tensor, "out in"],
        H: Float[Tensor, "in in"],
        log_scale: Float[Tensor, " in"],
        tie: Callable[[Tensor], Tensor],
    ) -> tuple[float, Float[Tensor, " in"]]:
        """tr(ΔW·H·ΔWᵀ), ΔW the change by rounding W·diag(scale), and its gradient by the scale's logarithm."""
        leaf = log_scale.detach().requires_grad_()
        with torch.enable_grad():
            scale = tie(_scales(leaf))
            scaled = (w * scale).reshape(w.shape[0], -1, resolve_group_size(self.group_size, w.shape[1]))
            change = rounded_to_extremes(scaled, self.bits, symmetric=self.symmetric).reshape(w.shape) / scale - w
        pull = change.detach() @ H
        (gradient,) = torch.autograd.grad(change, leaf, 2.0 * pull)
        return float(pull.mul_(change.detach()).sum(dtype=torch.float64)), gradient


def _scales(log_scale: Tensor) -> Tensor:
    return log_scale.exp().clamp(1.0 / _LIMIT, _LIMIT)
