"""Methods that make a model narrower: they choose MLP neurons and attention heads to take out, and refit the rest."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.methods.base import ModelMethod
from decoct.ops.least_squares import refit_columns
from decoct.stats import Gram, Moments

_NO_CHANNELS = (
    "keep_hidden: this method scores neurons and heads, not hidden channels; set it to 1, or take minitron, flap or "
    "magnitude_width"
)


@dataclass(frozen=True, slots=True)
class Channels:
    """An edge inside a block whose channels can be taken out: the middle of the MLP, or of attention.

    Attributes:
        reader: the matrix that reads the edge, float32.
        writers: the matrices whose rows make its channels, float32, each with the rows of one channel side by side in
            the same order as the reader's columns; keys and values of grouped queries appear once for each query head.
        repeats: how often each writer's rows appear.
        unit: neighbouring channels that can only go together: 1 in an MLP, a key-value head's share in attention.
        stats: statistics of the edge, by kind.
        information: the Fisher information of a factor on what each unit puts out, up to a common factor, or what a
            mask on it has learned; None: the method does not go by gradients.
    """

    reader: Float[Tensor, "out channels"]
    writers: tuple[Float[Tensor, "channels in"], ...]
    repeats: tuple[int, ...]
    unit: int
    stats: Mapping[type[Any], Any]
    information: Float[Tensor, " units"] | None = None

    @property
    def num_units(self) -> int:
        """How many there are."""
        return self.reader.shape[1] // self.unit

    def by_unit(self, scores: Float[Tensor, " channels"]) -> Float[Tensor, " units"]:
        """The sum over each unit's channels."""
        return scores.reshape(-1, self.unit).sum(1)

    def columns(self, units: Int[Tensor, " kept"]) -> Int[Tensor, " channels"]:
        """The channels of some units."""
        return (units.unsqueeze(1) * self.unit + torch.arange(self.unit)).reshape(-1)


@dataclass(frozen=True, slots=True)
class Narrowed:
    """What is left of an edge.

    Attributes:
        units: those that stay, ascending.
        reader: the matrix that reads what is left, float32.
        bias: what must be added to its output, float32; None: nothing.
    """

    units: Int[Tensor, " kept"]
    reader: Float[Tensor, "out kept_channels"]
    bias: Float[Tensor, " out"] | None = None


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream, as the whole model writes and reads it; norms in the order of computing, the final one last.

    Attributes:
        written: sum of squares of what makes each channel: its rows of all matrices that write the stream, and its
            column of the embedding.
        read: of each norm, the same of a channel's columns of the matrices that read it, the output projection among
            them.
        gains: of the norms.
        mean_abs: mean over tokens of |what each norm puts out|.
        variance: over tokens, of the same.
    """

    written: Float[Tensor, " channels"]
    read: Float[Tensor, "norms channels"]
    gains: Float[Tensor, "norms channels"]
    mean_abs: Float[Tensor, "norms channels"]
    variance: Float[Tensor, "norms channels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthMethod(ModelMethod, ABC):
    """Takes as many MLP neurons, and attention heads, out of every block: the result is a plain, smaller checkpoint.

    A stage of its own in a recipe, before those that compress matrices.

    Attributes:
        keep: fraction of the model's parameters that stays, embedding included; neurons go until that is reached.
        keep_heads: fraction of the key-value heads that stays, each with all its query heads.
        keep_hidden: fraction of the residual stream's channels that stays, the same ones in every block.
        reconstruct: refit the matrix behind what is taken out by least squares on the calibration text.
        bias: let that matrix have a bias, if the architecture has room for one, to make up for what the missing
            channels were on average.
        multiple_of: the numbers of neurons and of hidden channels left are divisible by it, so that kernels and the
            usual group sizes fit.
        uneven: let all blocks' neurons compete, so that each block keeps as many as its own deserve; decoct reads the
            result, other engines see zeros where neurons are missing. False: every block keeps as many, and the result
            is a plain checkpoint.
    """

    keep: float = 0.8
    keep_heads: float = 1.0
    keep_hidden: float = 1.0
    reconstruct: bool = True
    bias: bool = False
    multiple_of: int = 64
    uneven: bool = False

    scoring: ClassVar[frozenset[type[Any]]] = frozenset()
    """Kinds of statistic that `scores` reads."""

    by_gradient: ClassVar[bool] = False
    """Whether `scores` reads `Channels.information`."""

    def __post_init__(self) -> None:
        shares = {"keep": self.keep, "keep_heads": self.keep_heads, "keep_hidden": self.keep_hidden}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {share}")
        if self.keep == self.keep_heads == self.keep_hidden == 1:
            raise ValueError("keep, keep_heads and keep_hidden are all 1: nothing would be taken out")
        if self.keep_hidden < 1 and type(self).hidden_scores is WidthMethod.hidden_scores:
            raise ValueError(_NO_CHANNELS)
        if self.uneven and (self.keep == 1 or min(self.keep_heads, self.keep_hidden) < 1):
            raise ValueError("uneven is for neurons alone; set keep below 1, keep_heads and keep_hidden to 1")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, not {self.multiple_of}")

    @property
    def needs_data(self) -> bool:
        """Whether it reads any calibration text."""
        return bool(self.stats) or self.by_gradient or self.keep_hidden < 1

    @property
    def stats(self) -> frozenset[type[Any]]:
        """Kinds of statistic of the edges that it needs."""
        refitting = {Gram} if self.reconstruct else set()
        return self.scoring | refitting | ({Moments} if self.bias else set())

    @abstractmethod
    def scores(self, channels: Channels) -> Float[Tensor, " units"]:
        """How much each unit matters; the least go."""

    def hidden_scores(self, residual: Residual) -> Float[Tensor, " channels"]:
        """How much each channel of the residual stream matters.

        Raises:
            ValueError: the method does not say.
        """
        del residual
        raise ValueError(_NO_CHANNELS)

    def narrow(self, channels: Channels, num_kept: int) -> Narrowed:
        """Choose, and refit.

        Raises:
            ValueError: numbers that are not finite.
        """
        scores = self.scores(channels)
        if not torch.isfinite(scores).all():
            raise ValueError(
                "weights or activations hold NaN or infinite values; the checkpoint or the text is damaged"
            )
        order = torch.argsort(scores, descending=True, stable=True)
        return self.refitted(channels, order[:num_kept].sort().values)

    def refitted(self, channels: Channels, units: Int[Tensor, " kept"]) -> Narrowed:
        """What is left when these units stay, as the settings say."""
        columns = channels.columns(units)
        reader = channels.reader[:, columns]
        mean = channels.stats[Moments].mean.float() if self.bias else None
        if self.reconstruct:
            reader = refit_columns(channels.reader, channels.stats[Gram].matrix(), columns, mean)
        missing = None if mean is None else channels.reader @ mean - reader @ mean[columns]
        return Narrowed(units, reader, missing)
