"""Perplexity and fidelity from logits, a few tokens at a time."""

from dataclasses import dataclass, field
from math import exp

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoct.ops.divergence import kl_of, surprise_of


@dataclass
class Tally:
    """Per-token losses and divergences, collected over batches of logits."""

    losses: list[Float[Tensor, " tokens"]] = field(default_factory=list)
    base_losses: list[Float[Tensor, " tokens"]] = field(default_factory=list)
    divergences: list[Float[Tensor, " tokens"]] = field(default_factory=list)
    agreements: list[Bool[Tensor, " tokens"]] = field(default_factory=list)

    def add(
        self,
        logits: Float[Tensor, "tokens vocab"],
        targets: Int[Tensor, " tokens"],
        base: Float[Tensor, "tokens vocab"] | None,
    ) -> None:
        """Take tokens into account.

        Args:
            logits: of the model that is measured.
            targets: the token that each row predicts.
            base: logits of the model it is compared with, or None.
        """
        self.losses.append(surprise_of(logits, targets))
        if base is not None:
            self.base_losses.append(surprise_of(base, targets))
            self.agreements.append(base.argmax(-1) == logits.argmax(-1))
            self.divergences.append(kl_of(logits, base))

    def perplexity(self) -> float:
        """exp(mean negative log-likelihood)."""
        return exp(float(torch.cat(self.losses).double().mean()))

    def base_perplexity(self) -> float:
        """The same for the base."""
        return exp(float(torch.cat(self.base_losses).double().mean()))

    def kl(self) -> Float[Tensor, " tokens"]:
        """KL(base ‖ model) of each token, nats; rounding below zero is cut off."""
        return torch.cat(self.divergences).double().clamp(min=0.0)

    def top1_agreement(self) -> float:
        """Fraction of tokens for which both models rank the same token first."""
        return float(torch.cat(self.agreements).double().mean())
