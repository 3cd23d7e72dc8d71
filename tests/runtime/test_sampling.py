"""Sampling against transformers' own processors, and against probabilities worked out by hand."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoct.runtime.sampling import Sampler, Sampling, penalised, shares_of

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(temperature=1.5, top_k=5), [TemperatureLogitsWarper(1.5), TopKLogitsWarper(5)]),
        (Sampling(temperature=1.0, top_p=0.8), [TopPLogitsWarper(0.8)]),
        (Sampling(temperature=1.0, min_p=0.1), [MinPLogitsWarper(0.1)]),
        (
            Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_shares_are_those_of_transformers(sampling: Sampling, processors: list[object]) -> None:
    chain = LogitsProcessorList(processors)
    expected = chain(torch.zeros(1, 1, dtype=torch.long), LOGITS[None].clone())[0].softmax(-1)
    torch.testing.assert_close(shares_of(LOGITS, sampling), expected)


def test_the_penalty_is_that_of_transformers() -> None:
    seen = [3, 7, 7, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([seen]), LOGITS[None].clone())[0]
    torch.testing.assert_close(penalised(LOGITS, set(seen), 1.4), expected)


def test_top_p_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    found = shares_of(logits, Sampling(temperature=1.0, top_p=0.7))
    torch.testing.assert_close(found, torch.tensor([0.625, 0.375, 0.0, 0.0]))


def test_draws_follow_the_shares_and_the_seed() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    sampler = Sampler(Sampling(temperature=1.0, seed=1), [])
    drawn = [sampler.draw(logits) for _ in range(3000)]
    again = Sampler(Sampling(temperature=1.0, seed=1), [])
    assert drawn == [again.draw(logits) for _ in range(3000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=3) / 3000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1]), atol=0.04, rtol=0)
    other = Sampler(Sampling(temperature=1.0, seed=2), [])
    assert drawn != [other.draw(logits) for _ in range(3000)]


def test_the_likeliest_unless_it_was_there() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0])
    assert Sampler(Sampling(), []).draw(logits) == 0
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    assert [sampler.draw(logits) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -3}, {"repetition_penalty": 0}]
)
def test_values_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_temperature_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=float("nan"))
