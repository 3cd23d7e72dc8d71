"""How large a tensor's entries are: what the learning rate is relative to."""

from torch import Tensor


def typical_size(tensor: Tensor) -> float:
    """The root mean square of a tensor's entries; of one that is all zeros, that of entries drawn to keep lengths."""
    size = float(tensor.float().square().mean().sqrt())
    return size if size > 0 else float(tensor.shape[-1]) ** -0.5
