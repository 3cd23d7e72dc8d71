"""For every family: blocks run one by one through our path give transformers' logits."""

from pathlib import Path

import pytest
import torch

from decoct.arch import find_family
from decoct.engine.runner import Runner
from decoct.model import Model, open_model
from decoct.weights import Dense
from tests.tiny import CONFIGS, save_model


def our_logits(model: Model, tokens: torch.Tensor, unpack: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits in float32; `unpack`: what each matrix of a block is rounded to before it is used."""
    runner = Runner(model, torch.float32)
    hidden = runner.embed(tokens, model.weight(model.family.embed).unpack(torch.float32))
    for block in range(model.num_blocks):
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        laid = runner.lay_out(block, {name: Dense.of(model.weight(name).unpack(unpack)) for name in names})
        hidden = runner.run(block, laid, hidden)
    head = model.weight(model.family.embed if model.tied else model.family.head)
    return runner.logits(hidden, head.unpack(torch.float32))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_blocks_give_transformers_logits(name: str, tmp_path: Path) -> None:
    reference = save_model(name, tmp_path)
    model = open_model(tmp_path)
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(our_logits(model, tokens), reference(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_slots_and_others_cover_the_checkpoint(name: str, tmp_path: Path) -> None:
    reference = save_model(name, tmp_path)
    model = open_model(tmp_path)
    counted = {p.data_ptr(): p.numel() for p in reference.parameters()}
    assert model.num_parameters == sum(counted.values())
    assert model.nbytes == 4 * model.num_parameters
    listed = [*model.slots(), *model.others(None), *(n for b in range(model.num_blocks) for n in model.others(b))]
    assert len(listed) == len(set(listed))
    assert not any(slot.role in ("", None) for slot in model.slots().values())


def test_unknown_architecture_lists_what_is_supported() -> None:
    with pytest.raises(ValueError, match=r"'mamba' is not supported; supported: llama.*add-an-architecture"):
        find_family({"model_type": "mamba"})
