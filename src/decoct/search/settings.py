"""What a recipe says of a search for bits, or for sparsities."""

import math

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from decoct.engine.budget import parse_size

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that are tried where a recipe names none."""

_AROUND = (0.2, 0.1, 0.0, -0.1, -0.2)  # sparsities that are tried where a recipe names none, less the one wanted

Level = int | float
"""What is chosen for a matrix: bits, or the fraction of its weights that is removed."""


class Search(BaseModel):
    """A target, and how much work to put into meeting it well.

    Attributes:
        bits: average bits for each weight of the matrices that are searched, scales and all else they store counted.
        sparsity: fraction of the weights of the matrices that are searched which is removed, all together; instead of
            `bits`. What is chosen for each matrix is then its sparsity.
        size: bytes of all tensors of the whole result; instead of the two.
        widths: bits to choose from; None: those of 2, 3, 4, 5, 6, 8 that the method has.
        levels: sparsities to choose from; None: the one wanted, and 0.1 and 0.2 more and less, or halfway to all.
            With a `size`, they say that sparsities are chosen and not bits.
        num_sequences: calibration sequences whose gradients tell how much each matrix matters; held out of the others,
            on whose statistics candidates are made: see `held_out`.
        num_measured: of the same, sequences on which true divergences are measured, to correct the estimates and to
            select in the evolution; 0: estimates are taken as they are, and nothing evolves.
        generations: of the evolution; 0: the estimates' best choice is final.
        patience: after so many generations in a row that lower the divergence by less than a thousandth, it ends.
        offspring: changed choices that are tried in each generation.
        seed: of sampled labels and of the evolution.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: float | None = None
    sparsity: float | None = None
    size: int | None = None
    widths: tuple[int, ...] | None = None
    levels: tuple[float, ...] | None = None
    num_sequences: int = Field(default=16, ge=1)
    num_measured: int = Field(default=8, ge=0)
    generations: int = Field(default=10, ge=0)
    patience: int = Field(default=3, ge=1)
    offspring: int = Field(default=16, ge=1)
    seed: int = 0

    @property
    def setting(self) -> str:
        """The setting that is chosen for each matrix: bits or sparsity."""
        return "bits" if self.sparsity is None and self.levels is None else "sparsity"

    def sparsities(self) -> tuple[float, ...]:
        """Those to choose from, falling: the smallest result first."""
        if self.levels is not None:
            return self.levels
        assert self.sparsity is not None
        found = (round(self.sparsity + change, 6) for change in _AROUND)
        usable = [each for each in found if 0 < each < 1]
        beyond = [] if usable[0] > self.sparsity else [round((1 + self.sparsity) / 2, 6)]
        return tuple(beyond + usable)

    def held_out(self, num_sequences: int) -> int:
        """How many of so many calibration sequences judge, while the others make the candidates; at most half.

        A candidate fits the text it was made on. Judged on that text, the matrices where this matters most, those of
        the first blocks, would look better than they are. A single sequence has to serve for both.
        """
        return min(max(self.num_sequences, self.num_measured), num_sequences // 2) or num_sequences

    @field_validator("bits", mode="before")
    @classmethod
    def _bits(cls, value: object) -> float | None:
        number = _number(value)
        if value is not None and (number is None or not 0 < number < math.inf):
            raise ValueError(f"{str(value)!r} is no average of bits; give a number above 0 such as 3.3")
        return number

    @field_validator("sparsity", mode="before")
    @classmethod
    def _sparsity(cls, value: object) -> float | None:
        number = _number(value)
        if value is not None and (number is None or not 0 < number < 1):
            raise ValueError(f"{str(value)!r} is no sparsity; give a fraction between 0 and 1 such as 0.6")
        return number

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: str | int | None) -> int | None:
        found = None if value is None else parse_size(value)
        if found == 0:
            raise ValueError(f"{str(value)!r} leaves no room; give a size such as 60MiB")
        return found

    @field_validator("widths")
    @classmethod
    def _widths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < 2:
            raise ValueError("widths need at least two different numbers of bits to choose from, such as [3, 4]")
        return None if value is None else tuple(sorted(set(value)))

    @field_validator("levels")
    @classmethod
    def _levels(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (len(set(value)) < 2 or not all(0 < each < 1 for each in value)):
            raise ValueError("levels need at least two different sparsities between 0 and 1, such as [0.5, 0.7]")
        return None if value is None else tuple(sorted(set(value), reverse=True))

    @model_validator(mode="after")
    def _one_target(self) -> "Search":
        if sum(each is not None for each in (self.bits, self.sparsity, self.size)) != 1:
            raise ValueError(
                "give one of bits, the average of the searched matrices, sparsity, what they lose, or size, of the "
                "whole result"
            )
        if self.widths is not None and self.setting == "sparsity":
            raise ValueError("widths are bits to choose from, and here sparsities are chosen; give levels")
        if self.bits is not None and self.levels is not None:
            raise ValueError("levels are sparsities to choose from, bits a target for bits; give a sparsity or a size")
        return self


def _number(value: object) -> float | None:
    """What a text or number says; None: nothing that is a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except ValueError:
        return None
