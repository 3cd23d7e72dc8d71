"""Additive codebooks (arXiv 2401.06118): a short vector is a sum of entries, one from each of several codebooks.

All searches minimise tr((W - Ŵ)·H·(W - Ŵ)ᵀ), one vector of neighbouring columns at a time for all rows at once: what
the other columns have lost moves the target, and within the vector the error is a quadratic form, which whitening turns
into a plain distance. So every search is one for the nearest sum.
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from decoct.ops.block_ldl import block_ldlq
from decoct.ops.parallel import each_piece

_ROWS = 288  # searched at a time: enough to outweigh the calls' fixed cost
_CONVERGED = 1e-10  # of the first squared slope
_PANEL = 128  # columns, about, between two updates of all errors by a large matrix product


def decode(
    codes: UInt8[Tensor, "books rows n"], codebooks: Float[Tensor, "books entries d"]
) -> Float[Tensor, "rows n*d"]:
    """The vectors that codes stand for, side by side in rows; the dtype is the codebooks'."""
    books, rows, n = codes.shape
    index = codes.reshape(books, rows * n).int()
    found = codebooks[0].index_select(0, index[0])
    for book, chosen in zip(codebooks[1:], index[1:], strict=True):
        found += book.index_select(0, chosen)
    return found.reshape(rows, n * codebooks.shape[2])


def collect(
    codes: UInt8[Tensor, "books rows n"], values: Float[Tensor, "rows n*d"], num_entries: int
) -> Float[Tensor, "books entries d"]:
    """For each entry the sum of the values in all places where its code stands: the transpose of `decode`."""
    books, rows, n = codes.shape
    vectors = values.reshape(rows * n, values.shape[1] // n)
    found = values.new_zeros(books, num_entries, vectors.shape[1])
    for sums, chosen in zip(found, codes.reshape(books, rows * n).int(), strict=True):
        sums.index_add_(0, chosen, vectors)
    return found


class NearestSums:
    """Searches sums of codebook entries near to given vectors.

    Sums are built entry by entry from several first entries, then each entry is chosen again, given the others.
    """

    def __init__(self, codebooks: Float[Tensor, "books entries d"], beam: int) -> None:
        """Prepare the codebooks, float32, for many searches.

        Args:
            codebooks: up to 256 entries, a power of two.
            beam: sums kept while they are built, a power of two.
        """
        self.codebooks = codebooks
        self.beam = min(beam, codebooks.shape[1])
        sizes = codebooks.square().sum(2, keepdim=True)
        self._products = torch.cat([-2 * codebooks, sizes], 2).transpose(1, 2).contiguous()

    def find(
        self, wanted: Float[Tensor, "n d"], current: UInt8[Tensor, "books n"] | None = None
    ) -> UInt8[Tensor, "books n"]:
        """Codes of a sum near to each vector, at least as near as that of the current codes, if there are any."""
        found = torch.empty(len(self.codebooks), len(wanted), dtype=torch.uint8, device=wanted.device)

        def work(pieces: slice) -> None:
            for start in range(pieces.start * _ROWS, pieces.stop * _ROWS, _ROWS):
                part = slice(start, start + _ROWS)
                codes = self._built(wanted[part]).unsqueeze(1)
                if current is not None:
                    codes = torch.cat([codes, current[:, part].T.unsqueeze(1).long()], 1)
                found[:, part] = self._refined(wanted[part], codes).T

        # Pieces of a fixed size: sums in another order would be other numbers on another count of threads.
        each_piece(work, -(-len(wanted) // _ROWS), _ROWS * self.beam * self.codebooks.shape[1], wanted.device)
        return found

    def _built(self, wanted: Float[Tensor, "n d"]) -> Int[Tensor, "n books"]:
        """Codes of the best of the sums that the beam search meets.

        The sums that are kept are the best of those whose last codes are equal modulo `beam`: nearly the best of all,
        and found without sorting.
        """
        n, d = wanted.shape
        entries = self.codebooks.shape[1]
        left = wanted.unsqueeze(1)
        codes = torch.empty(n, 1, 0, dtype=torch.long, device=wanted.device)
        for number, book in enumerate(self.codebooks[:-1]):
            distances = self._scores(left, number).add_(left.square().sum(2, keepdim=True))
            parent_and_group = least(distances.reshape(n, -1, self.beam))
            flat = parent_and_group * self.beam + torch.arange(self.beam, device=left.device)
            parent, code = flat // entries, flat % entries
            before = codes.gather(1, parent.unsqueeze(2).expand(-1, -1, number))
            codes = torch.cat([before, code.unsqueeze(2)], 2)
            left = left.gather(1, parent.unsqueeze(2).expand(-1, -1, d)) - book[code]
        beam = (self._scores(left, -1).amin(2) + left.square().sum(2)).argmin(1)
        rows = torch.arange(n, device=left.device)
        return torch.cat([codes[rows, beam], self._nearest_entry(left[rows, beam], -1).unsqueeze(1)], 1)

    def _refined(self, wanted: Float[Tensor, "n d"], codes: Int[Tensor, "n tries books"]) -> Int[Tensor, "n books"]:
        """The best of several tries, after each entry was chosen again given the others."""
        n, tries, books = codes.shape
        codes = codes.reshape(n * tries, books)
        left = wanted.repeat_interleave(tries, 0)
        for book, code in zip(self.codebooks, codes.T, strict=True):
            left -= book[code]
        for number, book in enumerate(self.codebooks if books > 1 else ()):
            without = left + book[codes[:, number]]
            codes[:, number] = self._nearest_entry(without, number)
            left = without - book[codes[:, number]]
        best = left.square().sum(1).reshape(n, tries).argmin(1)
        return codes.reshape(n, tries, books)[torch.arange(n, device=codes.device), best]

    def _scores(self, left: Float[Tensor, "*n d"], book: int) -> Float[Tensor, "*n entries"]:
        """Squared distances to all entries, less |left|²."""
        with_one = torch.nn.functional.pad(left, (0, 1), value=1.0)
        return (with_one.reshape(-1, with_one.shape[-1]) @ self._products[book]).reshape(*left.shape[:-1], -1)

    def _nearest_entry(self, left: Float[Tensor, "n d"], book: int) -> Int[Tensor, " n"]:
        distances = self._scores(left, book).add_(left.square().sum(1, keepdim=True))
        return least(distances.unsqueeze(2)).squeeze(1)


def least(values: Float[Tensor, "n m k"]) -> Int[Tensor, "n k"]:
    """The argmin over the second axis, up to rounding; overwrites the values, which count as zero where negative.

    Floating-point numbers that are not negative are in the order of their bits. With its position in the last bits of
    each, one pass over integers finds the least, several times faster than argmin. Values that differ by less than
    2^-23 · m of their size count as equal.
    """
    m = values.shape[1]
    mask = (1 << (m - 1).bit_length()) - 1
    positions = torch.arange(m, dtype=torch.int32, device=values.device).unsqueeze(1)
    numbered = values.clamp_(min=0).view(torch.int32).bitwise_and_(~mask).bitwise_or_(positions)
    return (numbered.amin(1) & mask).long()


def feedback_codes(
    w: Float[Tensor, "rows cols"],
    upper: Float[Tensor, "cols cols"],
    codebooks: Float[Tensor, "books entries d"],
    beam: int,
) -> UInt8[Tensor, "books rows n"]:
    """Codes from left to right, each vector after the errors of those before it have been compensated in it.

    Args:
        w: float32.
        upper: Uᵀ·U = H⁻¹, as `inverse_factor` gives it.
        codebooks: float32; d divides the width.
        beam: see NearestSums.
    """
    d = codebooks.shape[2]
    codes = torch.empty(len(codebooks), w.shape[0], w.shape[1] // d, dtype=torch.uint8, device=w.device)

    def rounded(first: int, wanted: Float[Tensor, "d rows"]) -> Float[Tensor, "d rows"]:
        # If later columns make up for an error e as well as they can, |e·U⁻¹|² is left of it.
        own = upper[first : first + d, first : first + d]
        white = torch.linalg.solve_triangular(own, torch.eye(d, device=w.device), upper=True)
        codes[:, :, first // d] = NearestSums(codebooks @ white, beam).find(wanted.T @ white)
        return decode(codes[:, :, first // d, None], codebooks).T

    block_ldlq(w.T.contiguous(), upper, d, rounded)
    return codes


def improve_codes(
    w: Float[Tensor, "rows cols"],
    codes: UInt8[Tensor, "books rows n"],
    codebooks: Float[Tensor, "books entries d"],
    H: Float[Tensor, "cols cols"],
    beam: int,
) -> UInt8[Tensor, "books rows n"]:
    """Coordinate descent: choose the codes of one vector after another again, all others being as they are.

    No row's error becomes larger, but for rounding.

    Args:
        w: float32.
        codes: where to start; not changed.
        codebooks: float32.
        H: float32, positive definite.
        beam: see NearestSums.
    """
    d = codebooks.shape[2]
    codes = codes.clone()
    found = decode(codes, codebooks)
    slopes = (w - found) @ H
    panel = max(1, _PANEL // d) * d
    for start in range(0, w.shape[1], panel):
        stop = min(start + panel, w.shape[1])
        own, moved = slopes[:, start:stop].clone(), torch.zeros(w.shape[0], stop - start, device=w.device)
        for first in range(start, stop, d):
            part, local = slice(first, first + d), slice(first - start, first - start + d)
            factor = torch.linalg.cholesky(H[part, part])
            # With the other columns as they are, the best vector is found + slope·H⁻¹ of these columns.
            wanted = found[:, part] + torch.cholesky_solve(own[:, local].T, factor).T
            search = NearestSums(codebooks @ factor, beam)
            codes[:, :, first // d] = search.find(wanted @ factor, codes[:, :, first // d])
            moved[:, local] = found[:, part] - decode(codes[:, :, first // d, None], codebooks)
            own.addmm_(moved[:, local], H[part, start:stop])
        slopes.addmm_(moved, H[start:stop])
    return codes


def fit_codebooks(
    w: Float[Tensor, "rows cols"],
    codes: UInt8[Tensor, "books rows n"],
    codebooks: Float[Tensor, "books entries d"],
    H: Float[Tensor, "cols cols"],
    row_weight: Float[Tensor, "rows 1"],
    num_steps: int,
) -> Float[Tensor, "books entries d"]:
    """Least squares for the entries, given the codes, by preconditioned conjugate gradients.

    Every step lowers Σ weight·(w - ŵ)·H·(w - ŵ)ᵀ over rows; it ends early where float32 can go no lower.

    Args:
        w: float32.
        codes: below `entries`.
        codebooks: where to start, float32; entries without a vector stay.
        H: float32, positive semidefinite.
        row_weight: what a row's error counts; not negative.
        num_steps: each costs a product of the matrix with H.
    """
    entries = codebooks.shape[1]
    tiny = torch.finfo(torch.float32).tiny

    def seen(matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "books entries d"]:
        return collect(codes, (matrix @ H).mul_(row_weight), entries)

    curvature = collect(codes, torch.diagonal(H) * row_weight, entries)
    inverse = torch.where(curvature > 0, 1 / curvature.clamp(min=tiny), 0.0)
    left = seen(w - decode(codes, codebooks))
    steered = inverse * left
    direction, size = steered, (left * steered).sum()
    enough = _CONVERGED * float(size)
    for _ in range(num_steps):
        if float(size) <= enough:  # what is left is rounding, which further steps would blow up
            break
        bent = seen(decode(codes, direction))
        length = size / (direction * bent).sum().clamp(min=tiny)
        codebooks = codebooks + length * direction
        left = left - length * bent
        steered = inverse * left
        before, size = size, (left * steered).sum()
        direction = steered + size / before * direction
    return codebooks


def fit_rows(
    w: Float[Tensor, "rows cols"], found: Float[Tensor, "rows cols"], H: Float[Tensor, "cols cols"]
) -> Float[Tensor, "rows 1"]:
    """The factor of each row of `found` that brings it closest to w, as H measures; 1 for rows of zeros."""
    seen = found @ H
    fits, size = (seen * w).sum(1, keepdim=True), (seen * found).sum(1, keepdim=True)
    return torch.where(size > 0, fits / size.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
