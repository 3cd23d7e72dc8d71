"""Slow readers of other engines' folders, written from the formats' descriptions: a bit at a time, in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


def read_folder(folder: Path) -> dict[str, Any]:
    """Every tensor by name, bfloat16 as torch has it, the others as arrays."""
    found: dict[str, Any] = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, "pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def code_at(words: np.ndarray, number: int, bits: int) -> np.ndarray:
    """The code at a place of streams of words of 32 bits, the first code lowest; it may lie across two words.

    Args:
        words: [words, streams] as they are stored.
        number: which code.
        bits: of a code.
    """
    found = np.zeros(words.shape[1], dtype=np.int64)
    for bit in range(bits):
        at = number * bits + bit
        found += ((words[at // 32].astype(np.int64) >> (at % 32)) & 1) << bit
    return found


def gptq_matrix(tensors: dict[str, Any], stem: str, bits: int, checkpoint_format: str) -> np.ndarray:
    """[out, in] of (code - zero) · scale, where version 1 stores the zero less one."""
    qweight, qzeros, scales, index = (
        tensors[f"{stem}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    out, cols = qweight.shape[1], index.shape[0]
    zeros = np.stack([code_at(qzeros.T, o, bits) for o in range(out)], axis=1)
    zeros += {"gptq": 1, "gptq_v2": 0}[checkpoint_format]
    columns = [(code_at(qweight, i, bits) - zeros[index[i]]) * scales[index[i]].astype(np.float64) for i in range(cols)]
    return np.stack(columns, axis=1)


def awq_matrix(tensors: dict[str, Any], stem: str, group_size: int) -> np.ndarray:
    """[out, in] of (code - zero) · scale; output 8w + k lies in word w, at bit `bits[k]`."""
    qweight, qzeros, scales = (tensors[f"{stem}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    bits = (0, 16, 4, 20, 8, 24, 12, 28)

    def nibbles(words: np.ndarray) -> np.ndarray:
        wide = words.astype(np.int64)
        return np.stack([(wide[:, o // 8] >> bits[o % 8]) & 15 for o in range(8 * words.shape[1])], axis=1)

    codes, zeros = nibbles(qweight), nibbles(qzeros)
    cols = codes.shape[0]
    size = cols if group_size == -1 else group_size
    rows = [(codes[i] - zeros[i // size]) * scales[i // size].astype(np.float64) for i in range(cols)]
    return np.stack(rows, axis=1)


def mlx_matrix(tensors: dict[str, Any], stem: str, bits: int, group_size: int) -> np.ndarray:
    """[out, in] of code · scale + bias; each row is a stream of words, the first code lowest."""
    words = tensors[f"{stem}.weight"].numpy().T
    scales, biases = (tensors[f"{stem}.{part}"].double().numpy() for part in ("scales", "biases"))
    cols = scales.shape[1] * group_size
    columns = [code_at(words, i, bits) * scales[:, i // group_size] + biases[:, i // group_size] for i in range(cols)]
    return np.stack(columns, axis=1)
