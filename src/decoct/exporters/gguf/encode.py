"""One matrix as the bytes of a GGUF tensor: our integers where the type holds them, else fitted to the weights."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decoct.exporters.gguf.choose import Choice
from decoct.exporters.integers import Integers, integers_of
from decoct.ops.ggml_blocks import CODE_BITS, pack_block32, pack_nibbles32, pack_trits
from decoct.ops.ggml_fit import round_to
from decoct.weights import FloatBlock, Padded, QuantizedInput, Weight

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode(
    weight: Weight, choice: Choice, importance: Float[Tensor, " in"] | None = None
) -> UInt8[Tensor, "out bytes"]:
    """The rows of a tensor as bytes.

    Args:
        weight: what to write.
        choice: how.
        importance: of each input feature, for types that are fitted.

    Raises:
        ValueError: weights that are not finite.
    """
    while isinstance(weight, QuantizedInput | Padded):
        weight = weight.inner
    if choice.kind in _FLOATS:
        matrix = _cornered(weight.unpack(torch.float32), choice.shape)
        return matrix.to(_FLOATS[choice.kind]).contiguous().view(torch.uint8)
    if not choice.exact:
        if importance is not None:
            importance = importance[: choice.shape[1]]
        return round_to(choice.kind, _cornered(weight.unpack(torch.float32), choice.shape), importance)
    if isinstance(weight, FloatBlock):
        return pack_nibbles32(weight.unpack_codes(), weight.scale.unsqueeze(-1))
    return _encode_integers(integers_of(weight), choice)


def _encode_integers(found: Integers, choice: Choice) -> Tensor:
    if choice.kind in ("TQ1_0", "TQ2_0"):
        trits = found.shifted().to(torch.int8)
        return pack_trits(choice.kind, trits, found.regrouped(256).scale)
    found = found.regrouped(32)
    bits = CODE_BITS[choice.kind]
    if choice.kind.endswith("_1"):
        codes, minimum = found.codes, -found.zero * found.scale
    else:
        codes, minimum = (found.shifted() + 2 ** (bits - 1)).to(torch.uint8), None
    scale = found.scale
    codes = _cornered(codes, choice.shape, 0 if minimum is not None else 2 ** (bits - 1))
    blocks = (choice.shape[0], choice.shape[1] // 32)
    scale = _cornered(scale, blocks)
    return pack_block32(choice.kind, codes, scale, None if minimum is None else _cornered(minimum, blocks))


def _cornered(matrix: Tensor, shape: tuple[int, int], fill: float = 0.0) -> Tensor:
    """Rows and columns added to the end, up to a shape."""
    missing = (0, shape[1] - matrix.shape[1], 0, shape[0] - matrix.shape[0])
    return torch.nn.functional.pad(matrix, missing, value=fill) if any(missing) else matrix
