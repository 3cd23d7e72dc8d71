"""What a recipe says of a search for bits."""

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from decoct.engine.budget import parse_size

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that are tried where a recipe names none."""


class Search(BaseModel):
    """A target, and how much work to put into meeting it well.

    Attributes:
        bits: average bits for each weight of the matrices that are searched, scales and all else they store counted.
        size: bytes of all tensors of the whole result; instead of `bits`.
        widths: bits to choose from; None: those of 2, 3, 4, 5, 6, 8 that the method has.
        num_sequences: calibration sequences whose gradients tell how much each matrix matters; held out of the others,
            on whose statistics candidates are made: see `held_out`.
        num_measured: of the same, sequences on which true divergences are measured, to correct the estimates and to
            select in the evolution; 0: estimates are taken as they are, and nothing evolves.
        generations: of the evolution; 0: the estimates' best choice is final.
        offspring: changed choices that are tried in each generation.
        seed: of sampled labels and of the evolution.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: float | None = Field(default=None, gt=0)
    size: int | None = Field(default=None, gt=0)
    widths: tuple[int, ...] | None = None
    num_sequences: int = Field(default=16, ge=1)
    num_measured: int = Field(default=8, ge=0)
    generations: int = Field(default=10, ge=0)
    offspring: int = Field(default=16, ge=1)
    seed: int = 0

    def held_out(self, num_sequences: int) -> int:
        """How many of so many calibration sequences judge, while the others make the candidates; at most half.

        A candidate fits the text it was made on. Judged on that text, the matrices where this matters most, those of
        the first blocks, would look better than they are. A single sequence has to serve for both.
        """
        return min(max(self.num_sequences, self.num_measured), num_sequences // 2) or num_sequences

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: str | int | None) -> int | None:
        return None if value is None else parse_size(value)

    @field_validator("widths")
    @classmethod
    def _widths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < 2:
            raise ValueError("widths need at least two different numbers of bits to choose from, such as [3, 4]")
        return None if value is None else tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _one_target(self) -> "Search":
        if (self.bits is None) == (self.size is None):
            raise ValueError("give either bits, the average of the searched matrices, or size, of the whole result")
        return self
