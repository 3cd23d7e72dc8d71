"""Residual k-means of short vectors: where the search for additive codebooks starts (arXiv 2401.06118, section 3.1)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


def residual_kmeans(
    vectors: Float[Tensor, "n d"],
    weights: Float[Tensor, "n d"],
    shape: tuple[int, int],
    *,
    num_steps: int,
    generator: torch.Generator,
) -> Float[Tensor, "books entries d"]:
    """Codebooks of which the first clusters the vectors, and each later one what those before left of them.

    A step cannot raise Σ weights·(vector - nearest center)² of the codebook it works on.

    Args:
        vectors: float32.
        weights: what a squared error costs in each coordinate; not negative.
        shape: books, entries. Where there are fewer vectors than entries, the last entries are zero.
        num_steps: Lloyd's, for each codebook.
        generator: of the first centers.
    """
    books, entries = shape
    weights = weights / weights.mean().clamp(min=_TINY)
    found = []
    for _ in range(books):
        centers = _first_centers(vectors, weights, entries, generator)
        for _ in range(num_steps):
            chosen = nearest_centers(vectors, weights, centers)
            mass = torch.zeros_like(centers).index_add_(0, chosen, weights)
            moment = torch.zeros_like(centers).index_add_(0, chosen, weights * vectors)
            centers = torch.where(mass > 0, moment / mass.clamp(min=_TINY), centers)
        vectors = vectors - centers[nearest_centers(vectors, weights, centers)]
        found.append(centers)
    return torch.stack(found)


def nearest_centers(
    vectors: Float[Tensor, "n d"], weights: Float[Tensor, "n d"], centers: Float[Tensor, "entries d"]
) -> Int[Tensor, " n"]:
    """For each vector the center with the least Σ weights·(vector - center)²; one matrix product with 2·d terms."""
    both = torch.cat([weights * vectors, weights], 1)
    return (both @ torch.cat([-2 * centers, centers.square()], 1).T).argmin(1)


def _first_centers(
    vectors: Float[Tensor, "n d"], weights: Float[Tensor, "n d"], count: int, generator: torch.Generator
) -> Float[Tensor, "count d"]:
    """Vectors drawn without replacement, half by chance and half by their size: rare large ones must not be missed."""
    size = (weights * vectors.square()).sum(1).double()
    chances = 1 / len(size) + size / size.sum().clamp(min=_TINY)
    noise = torch.rand(len(size), generator=generator, dtype=torch.float64).to(size.device)
    # The largest of log(noise) / chance are such a draw (Efraimidis and Spirakis).
    drawn = (noise.clamp(min=_TINY).log() / chances).topk(min(count, len(size))).indices
    return torch.nn.functional.pad(vectors[drawn], (0, 0, 0, count - len(drawn)))
