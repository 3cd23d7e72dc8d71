"""The compiled kernels: found, checked, and called through ctypes, which lets other Python threads run meanwhile."""

import ctypes
import os
import warnings
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_uint32, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VERSION = 10  # of the functions and of `Matrix`; the library says its own
NAME = "decoct_kernels"
FOLDER = Path(__file__).parent
WHERE = "DECOCT_KERNELS"
"""Environment variable: a library somewhere else, or `none` to go without."""

TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.uint8: 3,
    torch.int16: 4,
    torch.int32: 5,
}
"""What native/matrix.h calls DecoctType. Column numbers in int16 are below 2**15, so unsigned ones are the same."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Inputs and outputs of the kernels."""


class Layout(IntEnum):
    """As in native/matrix.h."""

    INTS = 0
    TABLE = 1
    MINIFLOAT = 2
    DENSE = 3
    ROW_TABLES = 4
    VECTORS = 5
    BITMAP = 6
    INDEXED = 7
    TRELLIS = 8


LEVELS = ("portable", "avx2", "avx512", "neon", "avx512bf16")
"""Instruction levels; a later one that the processor has is faster."""


class Matrix(Structure):
    """DecoctMatrix in native/matrix.h, field by field."""

    _fields_ = (
        *((name, c_int32) for name in ("layout", "bits", "exponent", "mantissa", "d", "books")),
        *((name, c_int32) for name in ("scale_type", "zero_type", "value_type", "index_type")),
        *((name, c_int64) for name in ("rows", "cols", "groups", "group_size", "stride", "rows_per_table", "count")),
        *((name, c_void_p) for name in ("codes", "scale", "zero", "values", "index", "starts", "table")),
    )


class Heads(Structure):
    """DecoctHeads in attention.h, field by field."""

    _fields_ = (("numbers", c_void_p), ("sequence", c_int64), ("head", c_int64), ("token", c_int64))


class Attention(Structure):
    """DecoctAttention in attention.h, field by field."""

    _fields_ = (
        ("type", c_int32),
        *((name, c_int64) for name in ("sequences", "heads", "kv_heads", "head_size", "tokens", "seen", "window")),
        *((name, c_float) for name in ("scale", "score_cap")),
        *((name, Heads) for name in ("queries", "keys", "values")),
        *((name, c_void_p) for name in ("out", "levels")),
    )


class AttentionGradient(Structure):
    """DecoctAttentionGradient in attention.h, field by field."""

    _fields_ = (
        ("forward", Attention),
        ("out", Heads),
        *((name, c_void_p) for name in ("queries", "keys", "values")),
    )


class Divergence(Structure):
    """DecoctDivergence in divergence.h, field by field."""

    _fields_ = (
        ("type", c_int32),
        *((name, c_int64) for name in ("rows", "entries")),
        *((name, c_float) for name in ("student_scale", "teacher_scale", "forward", "reverse")),
        *((name, c_void_p) for name in ("student", "teacher", "labels", "weights", "losses")),
    )


class Library:
    """The kernels of this machine.

    Attributes:
        levels: names of the instruction levels that the processor has.
    """

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            ValueError: it cannot be loaded, or is of another version.
        """
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise ValueError(f"{path} cannot be loaded ({error}); install decoct again") from error
        self._functions.decoct_levels.restype = c_uint32
        found = self._functions.decoct_version()
        if found != VERSION:
            raise ValueError(f"{path} has kernels of version {found}, not {VERSION}; install decoct again")
        present = self._functions.decoct_levels()
        self.levels = tuple(name for number, name in enumerate(LEVELS) if present >> number & 1)
        self._functions.decoct_borrow_threads.argtypes = [c_void_p]
        self._functions.decoct_borrow_threads.restype = None
        self.borrow_threads(start_of_torch_threads())
        self._multiply = self._functions.decoct_multiply
        self._multiply.argtypes = [POINTER(Matrix), c_void_p, c_int32, c_int64, c_void_p, c_int32, c_int32]
        self._multiply.restype = None
        self._rounded = self._functions.decoct_multiply_rounded
        self._rounded.argtypes, self._rounded.restype = self._multiply.argtypes, None
        self._can_round = self._functions.decoct_can_round
        self._can_round.argtypes, self._can_round.restype = [POINTER(Matrix), c_int32], c_int32
        self._unpack = self._functions.decoct_unpack
        self._unpack.argtypes = [POINTER(Matrix), c_int64, c_int64, c_int32, c_void_p, c_int32, c_int32]
        self._unpack.restype = None
        self._attend = self._functions.decoct_attend
        self._attend.argtypes, self._attend.restype = [POINTER(Attention), c_int32, c_int32], None
        self._attend_backward = self._functions.decoct_attend_backward
        self._attend_backward.argtypes = [POINTER(AttentionGradient), c_int32, c_int32]
        self._attend_backward.restype = None
        self._diverge = self._functions.decoct_diverge
        self._diverge.argtypes, self._diverge.restype = [POINTER(Divergence), c_int32, c_int32], None
        self.step = self._functions.decoct_step
        """One more token for some sequences; see step.py."""
        self.step.argtypes = [c_void_p, c_void_p, POINTER(c_int64), POINTER(c_int64), c_int64, c_void_p]
        self.step.restype = c_int32

    def borrow_threads(self, launch: int | None) -> None:
        """Work on the threads that a function of OpenMP's starts, given by its address; None: on threads of its own."""
        self._functions.decoct_borrow_threads(launch)

    def multiply(self, matrix: Matrix, x: Tensor, out: Tensor, level: int) -> None:
        """`out` [n, rows] = `x` [n, cols] · matrixᵀ; contiguous, of one of FLOATS."""
        type_, threads = TYPES[x.dtype], torch.get_num_threads()
        self._multiply(byref(matrix), x.data_ptr(), type_, x.shape[0], out.data_ptr(), threads, level)

    def can_round(self, matrix: Matrix, level: int) -> bool:
        """Whether there is `multiply_rounded` for a matrix."""
        return bool(self._can_round(byref(matrix), level))

    def multiply_rounded(self, matrix: Matrix, x: Tensor, out: Tensor, level: int) -> None:
        """As `multiply`, of inputs rounded to 8 bits."""
        type_, threads = TYPES[x.dtype], torch.get_num_threads()
        self._rounded(byref(matrix), x.data_ptr(), type_, x.shape[0], out.data_ptr(), threads, level)

    def attend(self, attention: Attention) -> None:
        """Attention of many tokens, written to its `out`; at the fastest level."""
        self._attend(byref(attention), torch.get_num_threads(), LEVELS.index(self.levels[-1]))

    def attend_backward(self, gradient: AttentionGradient) -> None:
        """The gradients, written to what it points to."""
        self._attend_backward(byref(gradient), torch.get_num_threads(), LEVELS.index(self.levels[-1]))

    def diverge(self, divergence: Divergence) -> None:
        """A loss on predictions, and its gradient, written to what it points to; at the fastest level."""
        self._diverge(byref(divergence), torch.get_num_threads(), LEVELS.index(self.levels[-1]))

    def unpack(self, matrix: Matrix, blocks: range, out: Tensor, level: int) -> None:
        """Rows of blocks of 16 into `out` [rows, cols], contiguous, of one of FLOATS."""
        type_, threads = TYPES[out.dtype], torch.get_num_threads()
        self._unpack(byref(matrix), blocks.start, blocks.stop, type_, out.data_ptr(), threads, level)


def start_of_torch_threads() -> int | None:
    """The address of what starts the threads that torch computes with, where that is GNU's OpenMP or one like it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError, TypeError):  # it has another name, or (Windows) nobody knows all that is loaded
        return None


@cache
def library() -> Library | None:
    """The kernels, or None, with a warning once, where decoct was installed without them."""
    wanted = os.environ.get(WHERE)
    if wanted == "none":
        return None
    if wanted:
        return Library(Path(wanted))
    found = sorted(FOLDER.glob(f"{NAME}.*"))
    if found:
        return Library(found[0])
    warnings.warn(
        "decoct was installed without its compiled kernels, so torch unpacks weights while they are used, which is "
        "slower; install it again where there is a C++ compiler (GCC 12 or Clang 10 at least)",
        stacklevel=2,
    )
    return None
