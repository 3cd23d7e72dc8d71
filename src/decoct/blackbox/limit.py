"""What may be spent: calls stop before a limit is passed, not after."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Limits on everything that was ever asked into one cache.

    Attributes:
        max_tokens: prompts and answers together; None: no limit.
        max_cost: in the currency of the prices; None: no limit.
        price_in: of a million tokens of prompts.
        price_out: of a million tokens of answers.
    """

    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        if min(self.price_in, self.price_out) < 0:
            raise ValueError("prices must not be negative")
        if self.max_cost is not None and not self.price_in + self.price_out > 0:
            raise ValueError("a limit on cost needs prices: --price-in and --price-out, of a million tokens")

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """What so many tokens cost."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def allows(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether so many tokens, in all, are within the limits."""
        tokens = self.max_tokens is None or tokens_in + tokens_out <= self.max_tokens
        return tokens and (self.max_cost is None or self.cost(tokens_in, tokens_out) <= self.max_cost)
