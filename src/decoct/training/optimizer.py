"""AdamW (arXiv 1711.05101) with a rate for each tensor, relative to the size of its entries; its state as tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from decoct.training.network import Student
from decoct.training.views.size import typical_size

_BETAS, _EPS = (0.9, 0.95), 1e-12  # a mean loss's gradients by single entries are tiny: the usual 1e-8 would slow them
_MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}


class Optimizer:
    """Moves a student's parameters.

    Scales, factors, norms and matrices differ by orders of magnitude; so one learning rate, relative to each tensor's
    size when training began, fits all.

    Attributes:
        adam: torch's own.
    """

    def __init__(self, student: Student, weight_decay: float) -> None:
        """Begin.

        Raises:
            ValueError: nothing is trained.
        """
        self._names = {parameter: name for name, parameter in student.named_parameters()}
        sizes: list[tuple[nn.Parameter, float]] = []
        for view in student.views.values():
            sizes += view.units()
        matrices = len(sizes)
        sizes += [(vector.values, vector.unit) for vector in student.vectors.values()]
        if student.insides is not None:
            sizes += [(matrix, typical_size(matrix.detach())) for matrix in student.insides.parameters()]
        if not sizes:
            raise ValueError("nothing of this model is trained; name more in `train`")
        # Decay is by rate times decay, whatever the tensor's size.
        groups = [
            {"params": [each], "unit": unit, "weight_decay": weight_decay / unit if number < matrices else 0.0}
            for number, (each, unit) in enumerate(sizes)
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, eps=_EPS, fused=True)

    def set_rate(self, rate: float) -> None:
        """The largest change in the next step, relative to each tensor's size."""
        for group in self.adam.param_groups:
            group["lr"] = rate * group["unit"]

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments, as a checkpoint names them."""
        found = {f"value:{name}": parameter.detach() for parameter, name in self._names.items()}
        for parameter, name in self._names.items():
            moments = self.adam.state.get(parameter, {})
            found |= {f"{ours}:{name}": moments[theirs] for ours, theirs in _MOMENTS.items() if moments}
        return found

    def values(self) -> dict[str, Tensor]:
        """Parameters alone."""
        return {f"value:{name}": parameter.detach() for parameter, name in self._names.items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor], num_steps: int) -> None:
        """Take up a state, or values alone, after so many steps."""
        for parameter, name in self._names.items():
            parameter.copy_(saved[f"value:{name}"])
            if f"mean:{name}" in saved:
                moments = {theirs: saved[f"{ours}:{name}"].clone() for ours, theirs in _MOMENTS.items()}
                self.adam.state[parameter] = {"step": torch.tensor(float(num_steps)), **moments}
