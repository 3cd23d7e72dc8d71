"""Additive codebooks in plain loops and float64: every combination of codes is tried."""

from itertools import product

import torch
from torch import Tensor


def decoded(codes: list[list[list[int]]], codebooks: Tensor) -> Tensor:
    """ŵ: each vector of a row is the sum over codebooks of the entry under its code.

    Args:
        codes: codes[row][place][book].
        codebooks: [books, entries, d].
    """
    rows = []
    for row in codes:
        vectors = [sum(codebooks[book][code] for book, code in enumerate(chosen)) for chosen in row]
        rows.append(torch.cat([torch.as_tensor(v, dtype=torch.float64) for v in vectors]))
    return torch.stack(rows)


def loss(w: Tensor, found: Tensor, H: Tensor) -> float:
    """tr((w - found)·H·(w - found)ᵀ)."""
    lost = w.double() - found.double()
    return float((lost @ H.double() @ lost.T).trace())


def best_sum(wanted: Tensor, codebooks: Tensor) -> tuple[int, ...]:
    """Codes of the sum nearest to one vector."""
    tuples = product(*(range(len(book)) for book in codebooks))
    sums = {codes: sum(book[code] for book, code in zip(codebooks.double(), codes, strict=True)) for codes in tuples}
    return min(sums, key=lambda codes: float((wanted.double() - sums[codes]).square().sum()))


def best_codes_of_row(w: Tensor, codebooks: Tensor, H: Tensor) -> float:
    """The least loss of one row that any codes reach."""
    n = w.shape[0] // codebooks.shape[2]
    tuples = list(product(*(range(len(book)) for book in codebooks)))
    rows = (decoded([[list(chosen) for chosen in row]], codebooks) for row in product(tuples, repeat=n))
    return min(loss(w[None], row, H) for row in rows)


def best_codebooks(w: Tensor, codes: Tensor, entries: int, d: int, H: Tensor, row_weight: Tensor) -> float:
    """The least weighted loss that any codebooks reach with these codes: normal equations of all entries at once."""
    books, rows, n = codes.shape
    design = torch.zeros(rows, n * d, books * entries * d, dtype=torch.float64)
    for book in range(books):
        for row in range(rows):
            for place in range(n):
                for k in range(d):
                    entry = (book * entries + int(codes[book, row, place])) * d + k
                    design[row, place * d + k, entry] += 1.0
    weighted = design * row_weight.double().reshape(-1, 1, 1)
    normal = torch.einsum("rie,ij,rjf->ef", weighted, H.double(), design)
    wanted = torch.einsum("rie,ij,rj->e", weighted, H.double(), w.double())
    found = torch.einsum("rie,e->ri", design, torch.linalg.pinv(normal, hermitian=True) @ wanted)
    return loss(w.double() * row_weight.double().sqrt(), found * row_weight.double().sqrt(), H)
