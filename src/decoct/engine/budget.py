"""How much memory and disk a run may take, and what this machine has."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_HEADROOM = 0.8  # of the memory that is free when nobody stated a limit
_SIZES = (384, 512, 1536)  # of products: short ones fall between what others compute, large ones fit many threads
_MEASURING, _LEAST_TRIES = 0.3, 2  # seconds with each size, and tries


def parse_size(text: str | int) -> int:
    """Bytes of "8GiB", "500 MB" or a plain number.

    Raises:
        ValueError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it as 8GiB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def format_size(nbytes: float) -> str:
    """Bytes for people: 1.5 GiB, 83.1 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


class Budget(BaseModel):
    """Limits of a run.

    Attributes:
        host: bytes of main memory the process may hold at its peak; None: four fifths of what is free.
        scratch: folder for activations that do not fit in memory and for resuming; None: inside the output folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: int | None = Field(default=None, gt=0)
    scratch: Path | None = None

    @field_validator("host", mode="before")
    @classmethod
    def _size(cls, value: str | int | None) -> int | None:
        return None if value is None else parse_size(value)

    def host_limit(self) -> int:
        """The limit in force, bytes."""
        held = psutil.Process().memory_info().rss
        return self.host or int(held + _HEADROOM * psutil.virtual_memory().available)


_loaded: ContextVar[int | None] = ContextVar("_loaded", default=None)


def resident_bytes() -> int:
    """Memory this process holds now; inside `planning_as_at` at most what it held then."""
    now, then = int(psutil.Process().memory_info().rss), _loaded.get()
    return now if then is None else min(now, then)


@contextmanager
def planning_as_at(loaded: int) -> Iterator[None]:
    """Plan as when so many bytes were resident: what a run has loaded since is counted in every plan already."""
    token = _loaded.set(loaded)
    try:
        yield
    finally:
        _loaded.reset(token)


def peak_resident_bytes() -> int:
    """The most memory this process ever held; not what its parent had before it, which getrusage counts on Linux."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compute_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Dtype to run blocks in: bfloat16 if the model is in it and this machine multiplies it faster than float32."""
    if model_dtype != torch.bfloat16:
        return torch.float32
    return torch.bfloat16 if product_rate(torch.bfloat16) > 1.2 * product_rate(torch.float32) else torch.float32


def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second that matrix products reach on this machine, for time estimates.

    Of this machine when it does nothing else: what other programs take at the moment says little about the hours to
    come, and must not decide what blocks run in. Measured once in a process, for each number of threads.
    """
    rates = _product_rates(torch.get_num_threads())
    return rates.get(dtype, rates[torch.float32])


@cache
def _product_rates(threads: int) -> dict[torch.dtype, float]:  # noqa: ARG001 - measured again with others
    """The best of many tries, the dtypes in turn, so that what disturbs one disturbs the others."""
    rates: dict[torch.dtype, float] = {}
    for size in _SIZES:
        factors = {dtype: torch.randn(size, size).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
        started, tries = time.perf_counter(), 0
        while tries < _LEAST_TRIES or time.perf_counter() - started < _MEASURING:
            for dtype, factor in factors.items():
                began = time.perf_counter()
                factor @ factor
                rate = 2 * size**3 / (time.perf_counter() - began)
                rates[dtype] = max(rate, rates.get(dtype, 0.0))
            tries += 1
    return rates
