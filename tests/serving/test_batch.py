"""Sequences that share a network: the same text as alone, seats given back, limits, cancelling, time-outs."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import decoct
from decoct.model import open_model
from decoct.runtime.sampling import Sampling
from decoct.serving import batch as batch_module
from decoct.serving.batch import Batch, Task
from decoct.serving.engine import Options, Piece
from decoct.serving.networks import open_network
from decoct.serving.text import Answer, Text
from tests.engine.running import RTN, make_base, run

PROMPTS = ["Once upon a time", "abc", "The quick brown fox jumps over it", "Hello", "zyx"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("batch"), "llama")


def test_together_as_alone_and_as_transformers(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    together = decoct.generate(folder, PROMPTS, max_tokens=12)
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        theirs = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
        assert found.text == tokenizer.decode(theirs, skip_special_tokens=True)
        (alone,) = decoct.generate(folder, prompt, max_tokens=12)
        assert (found.text, found.tokens) == (alone.text, alone.tokens)
        assert found.prompt_tokens == ids.shape[1]
        assert 0 < found.first_token_seconds <= found.seconds


def test_other_families_and_the_transformers_engine(tmp_path: Path) -> None:
    base = make_base(tmp_path, "gpt2")
    out = run(base, tmp_path / "out", RTN).folder
    ours, theirs = (decoct.generate(out, PROMPTS[:2], max_tokens=8, engine=name) for name in ("decoct", "transformers"))
    assert [each.text for each in ours] == [each.text for each in theirs]
    network = open_network(open_model(out), "decoct", context=32)
    assert network.about == "transformers, since the family gpt2 is not in decoct's decode loop"


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_both_engines_write_the_same_also_with_a_packed_cache(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, name)
    out = run(base, tmp_path / "out", stages=[{"cache": {"kivi": {"bits": 4, "group_size": 8, "window": 4}}}]).folder
    ours, theirs = (decoct.generate(out, PROMPTS[:3], max_tokens=20, engine=n) for n in ("decoct", "transformers"))
    assert [each.text for each in ours] == [each.text for each in theirs]


def test_seeds_and_stop_texts(folder: Path) -> None:
    warm = Sampling(temperature=1.5, seed=3)
    first, again = (decoct.generate(folder, PROMPTS, max_tokens=20, sampling=warm) for _ in range(2))
    assert [each.text for each in first] == [each.text for each in again]
    text = decoct.generate(folder, "abc", max_tokens=20)[0].text
    stop = text[8:10]
    found = decoct.generate(folder, "abc", max_tokens=20, stop=[stop])[0]
    assert (found.text, found.finish) == (text[: text.index(stop)], "stop")


class Run:
    """A batch and what its tasks were told."""

    def __init__(self, folder: Path, seats: int, context: int = 48) -> None:
        model = open_model(folder)
        self.network, self.text = open_network(model, "decoct", context=context, num_seats=seats), Text(model)
        self.batch = Batch(self.network, self.text)

    def add(self, prompt: str, deadline: float | None = None, **options: object) -> tuple[Task, list[Piece]]:
        pieces: list[Piece] = []
        task = Task(
            self.text.tokens(prompt), Options(**options), Answer(self.text), pieces.append, deadline  # type: ignore[arg-type]
        )  # fmt: skip
        self.batch.add(task)
        return task, pieces


def test_who_hangs_up_or_waits_too_long_frees_a_seat(folder: Path) -> None:
    it = Run(folder, seats=1)
    first, told = it.add("abc", max_tokens=30, ignore_end=True)
    _, told_late = it.add("abc", max_tokens=3, deadline=time.monotonic() - 1)
    _, told_last = it.add("xyz", max_tokens=3, ignore_end=True)
    for _ in range(4):
        it.batch.step()
    assert told_late[-1].finish == "timeout"
    assert (it.batch.num_running, it.batch.num_waiting) == (1, 1)
    first.cancelled = True
    while it.batch.step():
        pass
    assert told[-1].finish == "cancelled"
    assert 1 <= len(first.answer.tokens) < 30
    assert told_last[-1].finish == "length"
    assert it.network.length(0) == 0
    assert (it.batch.num_running, it.batch.num_waiting) == (0, 0)


def test_a_prompt_in_pieces_writes_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decoct.generate(folder, PROMPTS[2], max_tokens=9)[0].text
    monkeypatch.setattr(batch_module, "_PIECE", 5)
    assert decoct.generate(folder, PROMPTS[2], max_tokens=9)[0].text == whole


def test_what_does_not_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match="the prompt has 40 tokens, the context is 32; shorten it"):
        decoct.generate(folder, "a" * 40, max_tokens=1, context=32)
    with pytest.raises(ValueError, match="max_tokens is 30, the context is 32; ask for at most 22"):
        decoct.generate(folder, "a" * 10, max_tokens=30, context=32)
    found = decoct.generate(folder, "a" * 10, max_tokens=None, context=32, sampling=Sampling(temperature=1, seed=0))[0]
    assert found.tokens <= 22
    with pytest.raises(ValueError, match="context 100 is more than the model's limit of 64"):
        decoct.generate(folder, "a", context=100)
    with pytest.raises(ValueError, match="at least one prompt"):
        decoct.generate(folder, [])


def test_engines_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'lama.cpp'; did you mean llama.cpp\?"):
        decoct.generate(folder, "a", engine="lama.cpp")
    with pytest.raises(ValueError, match=r"unknown engine 'x'; known: decoct, .*, onnxruntime, openvino"):
        decoct.generate(folder, "a", engine="x")
    with pytest.raises(ValueError, match="max_tokens must be 1 or more"):
        Options(max_tokens=0)
    with pytest.raises(ValueError, match="stop text must not be empty"):
        Options(stop=("",))


def test_a_network_takes_the_dtype(folder: Path) -> None:
    network = open_network(open_model(folder), "decoct", context=16, dtype=torch.bfloat16)
    assert network.nbytes < open_network(open_model(folder), "decoct", context=16).nbytes
