"""Rotations change every weight and nothing that the model predicts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.engine.compress import Watch, compress_job
from decoct.engine.rotate import RotatedModel, rotated
from decoct.engine.runner import Runner
from decoct.engine.stages import plan_stages
from decoct.methods import METHODS
from decoct.model import Model, open_model
from decoct.weights import Rotated
from tests.engine.running import AUTOROUND, DATA, EORA, GPTQ, RTN, WANDA, digests, make_base, make_job, run
from tests.tiny import CONFIGS, save_model

QUAROT: dict[str, Any] = {"quarot": {}}
INSIDE: dict[str, Any] = {"quarot": {"online": False}}
SEPARATE_VALUES = {"values": True}
FUSED = {"values": False}
STAYS = {"residual": False}
SETTINGS: dict[str, dict[str, bool]] = {
    "phi3": FUSED, "gpt2": FUSED, "gpt_neox": FUSED, "gemma2": STAYS, "gemma3_text": STAYS, "olmo2": STAYS,
}  # fmt: skip


def predictions(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, block by block."""
    runner = Runner(model, torch.float32)
    hidden = runner.embed(tokens, model.weight(model.family.embed).unpack(torch.float32))
    for number in range(model.num_blocks):
        weights = {
            model.prefix(number) + s.name: model.weight(model.prefix(number) + s.name) for s in model.block_slots
        }
        hidden = runner.run(number, runner.lay_out(number, weights), hidden)
    head = model.weight(model.family.embed if model.tied else model.family.head).unpack(torch.float32)
    return runner.logits(hidden, head)


def some_tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_predicts_the_same(name: str, tmp_path: Path) -> None:
    reference = save_model(name, tmp_path)
    base = open_model(tmp_path)
    model = rotated(base, [METHODS["quarot"](**SETTINGS.get(name, {}))])
    assert isinstance(model, RotatedModel)
    tokens = some_tokens()
    torch.testing.assert_close(predictions(model, tokens), reference(tokens).logits, rtol=1e-3, atol=1e-4)
