"""Matrix products on a CPU's bfloat16 units."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_products(*, enabled: bool = True) -> Iterator[None]:
    """Let float32 matrix products round their factors to bfloat16 and sum in float32, where the CPU has units for it.

    Two to five times as fast. Nothing is lost where the factors are exact in bfloat16; else each is off by up to 0.4 %,
    which is for sums of many terms that are compared with one another, not for results.
    """
    if not enabled:
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # missing from torch's stubs
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
