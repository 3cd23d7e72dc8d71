"""Tables of values: reading them by code, and the code of the nearest value."""

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from decoct.ops.parallel import each_piece


def lookup(codes: UInt8[Tensor, "rows n"], tables: Shaped[Tensor, "rows entries d"]) -> Shaped[Tensor, "rows n*d"]:
    """The values that codes stand for, each code being d neighbouring entries of its row.

    Args:
        codes: below `entries`.
        tables: one for each row; any dtype, which is that of the result.
    """
    rows, count = codes.shape
    entries, d = tables.shape[1:]
    if d == 1:
        return tables.squeeze(2).gather(1, codes.long())
    first = torch.arange(rows, device=codes.device, dtype=torch.int32).unsqueeze(1) * entries
    return tables.reshape(rows * entries, d).index_select(0, (codes + first).flatten()).reshape(rows, count * d)


def between(tables: Float[Tensor, "rows entries"]) -> Float[Tensor, "rows entries-1"]:
    """The middles between neighbouring entries of ascending tables: where the nearest entry changes."""
    return tables[:, :-1] / 2 + tables[:, 1:] / 2


def nearest(w: Float[Tensor, "rows cols"], tables: Float[Tensor, "rows entries"]) -> UInt8[Tensor, "rows cols"]:
    """The code of each entry's nearest table value; on a middle, the lower one.

    Args:
        w: any float dtype.
        tables: one for each row, ascending; at most 256 entries.
    """
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    middles = between(tables.float())

    def work(part: slice) -> None:
        codes[part] = torch.searchsorted(middles[part], w[part].float().contiguous())

    each_piece(work, w.shape[0], w.shape[1], w.device)
    return codes
