"""llama.cpp's C interface, as far as measuring needs it, in the library that the xllamacpp package carries.

Structures that only go through (parameters) are opaque bytes: llama.cpp fills them in with its defaults and reads them
back, so their fields need not be known, except the first few of a context's. Checked with llama.cpp of October 2026.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt


class _Opaque(ctypes.Structure):
    _fields_ = [
        ("bytes", ctypes.c_uint8 * 1024)
    ]  # more than any of them has: passed last and by value, that is harmless


class _ContextStart(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def library() -> ctypes.CDLL:
    """The shared library, its functions' types declared."""
    import xllamacpp.xllamacpp

    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", _Opaque, []),
        ("llama_context_default_params", _Opaque, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Opaque]),
        ("llama_init_from_model", pointer, [pointer, _Opaque]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_batch_init", _Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_set_n_threads", None, [pointer, ctypes.c_int32, ctypes.c_int32]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("ggml_quantize_init", None, [ctypes.c_int]),
        (
            "ggml_quantize_chunk",
            ctypes.c_size_t,
            [ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer],
        ),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(_SILENT, None)
    found.llama_backend_init()
    return found


class Network:
    """A .gguf file in llama.cpp. `close` it."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        self._library = library()
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}")
        asked = self._library.llama_context_default_params()
        start = _ContextStart.from_buffer(asked)
        start.n_ctx = start.n_batch = start.n_ubatch = context
        start.n_seq_max = 1
        self._context = self._library.llama_init_from_model(self._model, asked)
        self._library.llama_set_n_threads(self._context, threads, threads)
        self.vocab = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))

    def logits(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """[tokens, vocab] of a text from its start."""
        count = len(tokens)
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        batch = self._library.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = int(token), place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        failed = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        if failed:
            raise ValueError(f"llama.cpp's decode failed ({failed})")
        found = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (count, self.vocab)).copy()

    def close(self) -> None:
        """Free it."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


@contextmanager
def loaded(path: Path, *, context: int, threads: int) -> Iterator[Network]:
    """A network while the body runs."""
    network = Network(path, context=context, threads=threads)
    try:
        yield network
    finally:
        network.close()


def quantized(
    values: npt.NDArray[np.float32], kind: int, nbytes: int, importance: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.uint8]:
    """A matrix in one of ggml's types, rounded by ggml itself; `importance`: of each input feature."""
    found, out = library(), np.empty(nbytes, np.uint8)
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data
    found.ggml_quantize_init(kind)
    written = found.ggml_quantize_chunk(kind, values.ctypes.data, out.ctypes.data, 0, rows, columns, weights)
    if written != nbytes:
        raise ValueError(f"ggml wrote {written} bytes of {nbytes}")
    return out
