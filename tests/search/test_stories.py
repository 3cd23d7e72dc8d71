"""On a real model: estimates are near true divergences, and what is chosen by them is better than bits all alike."""

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="searching is an extra: pip install 'decoct[search]'")

import torch
from torch import Tensor

from decoct.arch import Slot
from decoct.engine.data import text_tokens
from decoct.engine.journal import Journal
from decoct.engine.runner import Runner
from decoct.model import Model, open_model
from decoct.recipe import parse_recipe
from decoct.search.candidates import Candidates, make_candidates
from decoct.search.measure import Measurer
from decoct.search.sensitivity import Costs, find_costs
from decoct.search.settings import Search
from decoct.search.solve import solve
from decoct.search.target import Target, find_target

RECIPE = {"stages": [{"blocks": [{"linear": {"gptq": {"bits": 3, "group_size": "channel"}}}]}]}


@dataclass
class Searched:
    """Candidates of the small model, what they cost, and text that they have not seen."""

    model: Model
    target: Target
    candidates: Candidates
    costs: Costs
    judging: Tensor
    unseen: Measurer

    def table(self) -> tuple[list[list[float]], list[list[int]]]:
        """Costs and bytes of each group's options."""
        levels = self.target.levels
        costs = [[sum(self.costs[n][b] for n in tie.names) for b in levels] for tie in self.target.ties]
        sizes = [[sum(self.candidates.nbytes(n, b) for n in tie.names) for b in levels] for tie in self.target.ties]
        return costs, sizes

    def solved(self, budget: int) -> dict[str, int]:
        """The estimates' choice."""
        options = solve(*self.table(), budget)
        return {
            name: self.target.levels[option]
            for tie, option in zip(self.target.ties, options, strict=True)
            for name in tie.names
        }


@pytest.fixture(scope="module")
def searched(stories: Path, story_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("stories")
    model = open_model(stories)
    target = find_target(model, parse_recipe(RECIPE).stages, Search(bits=3, widths=(2, 3, 4, 6)))
    tokens = text_tokens(str(story_text), model)[: 96 * 128].reshape(96, 128)
    making, judging, unseen = tokens[:64], tokens[64:80], tokens[80:]
    candidates = make_candidates(target, making, torch.float32, folder, Journal(folder, {}, folder), lambda _: None)
    costs = find_costs(target, candidates, judging, 0, folder / "states", {}, lambda _: None, lambda _: None)
    return Searched(model, target, candidates, costs, judging, Measurer(target, candidates, unseen))


def test_estimates_are_near_true_divergences(searched: Searched) -> None:
    measurer = Measurer(searched.target, searched.candidates, searched.judging)
    for bits in (4, 6):
        ties = searched.target.ties[::3]
        true = measurer.divergences([dict.fromkeys(tie.names, bits) for tie in ties], 16)
        for tie, found in zip(ties, true, strict=True):
            assert sum(searched.costs[name][bits] for name in tie.names) == pytest.approx(found, rel=0.25)


def test_the_choice_is_better_than_bits_all_alike(searched: Searched) -> None:
    uniform = dict.fromkeys(searched.target.names, 3)
    budget = sum(searched.candidates.nbytes(name, 3) for name in uniform)
    mixed = searched.solved(budget)
    assert sum(searched.candidates.nbytes(name, bits) for name, bits in mixed.items()) <= budget
    alike, better = searched.unseen.divergences([uniform, mixed], 16)
    assert better < alike


def test_more_bits_are_never_worse(searched: Searched) -> None:
    _, sizes = searched.table()
    low, high = sum(each[0] for each in sizes), sum(each[-1] for each in sizes)
    choices = [searched.solved(low + (high - low) * step // 6) for step in range(7)]
    found = searched.unseen.divergences(choices, 16)
    assert found == sorted(found, reverse=True)


def test_measurements_are_those_of_the_model_itself(searched: Searched) -> None:
    """Block by block with candidates in their places, one sequence at a time, against the measurer's shared work."""
    model, tokens = searched.model, searched.judging[:2]
    names = searched.target.names
    choices = [dict.fromkeys(names[:7], 2), {**dict.fromkeys(names[:7], 2), names[-1]: 3}, {}]
    found = Measurer(searched.target, searched.candidates, tokens).divergences(choices, 2)
    base = _log_chances(searched, {}, tokens)
    for choice, divergence in zip(choices, found, strict=True):
        own = _log_chances(searched, choice, tokens)
        expected = (base.exp() * (base - own)).sum(-1).mean()
        assert divergence == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert found[0] != found[1]
    assert model.num_blocks == 5


@torch.no_grad()
def _log_chances(searched: Searched, choice: dict[str, int], tokens: Tensor) -> Tensor:
    model, runner = searched.model, Runner(searched.model, torch.float32)
    table = model.weight(model.family.embed).unpack(torch.float32)
    rows = []
    for row in tokens:
        hidden = runner.embed(row.unsqueeze(0), table)
        for block in range(model.num_blocks):
            slots: tuple[Slot, ...] = model.block_slots
            weights = {
                name: searched.candidates.weight(name, choice[name]) if name in choice else model.weight(name)
                for name in (model.prefix(block) + slot.name for slot in slots)
            }
            hidden = runner.run(block, runner.lay_out(block, weights), hidden)
        rows.append(torch.log_softmax(runner.logits(hidden, table)[0], dim=-1))
    return torch.stack(rows)
