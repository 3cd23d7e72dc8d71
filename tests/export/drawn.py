"""What the tests of drawn decoders share: everything was checked, and the logits agree."""

from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.exporters import ExportReport
from decoct.exporters.compare import our_logits
from decoct.model import open_model

WIDE = {"hidden_size": 64, "intermediate_size": 176, "head_dim": 16, "num_hidden_layers": 2}


class Decoder(Protocol):
    """An engine with a folder in it."""

    def advance(self, seat: int, tokens: list[int]) -> Float[Tensor, " vocab"]:
        """Logits after the last token."""

    def release(self, seat: int) -> None:
        """Forget a sequence."""

    def length(self, seat: int) -> int:
        """Tokens so far."""


def all_ok(report: ExportReport) -> None:
    """Nothing differs, and everything was looked at."""
    assert [check for check in report.checks if check.ok is not True] == []
    assert {"values", "load", "logits"} == {check.name for check in report.checks}


def largest_difference(folder: Path, decoder: Decoder) -> float:
    """Of logits, ours and the engine's: after another sequence, a prompt in two pieces, then token by token."""
    model = open_model(folder)
    tokens = torch.randint(3, 60, (30,), generator=torch.Generator().manual_seed(3)).tolist()
    ours = our_logits(model, torch.tensor(tokens))
    decoder.advance(0, tokens[5:9])
    decoder.release(0)
    decoder.advance(0, tokens[:11])
    theirs = {19: decoder.advance(0, tokens[11:20]).clone()}
    theirs |= {i: decoder.advance(0, [tokens[i]]).clone() for i in range(20, 30)}
    assert decoder.length(0) == 30
    return max(float((ours[i] - row).abs().max()) for i, row in theirs.items())
