"""Perplexity and divergence against plain loops over transformers' own model."""

import hashlib
import json
from dataclasses import asdict
from math import exp
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import decoct
import decoct.hf
from decoct.evaluation import append_measurement, evaluate_model, measure
from decoct.evaluation.divergence import Tally
from decoct.model import open_model
from tests.engine.running import RTN, make_base, run

LENGTH, WINDOWS = 128, 6


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(story_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the sample: enough, and quick to tokenize."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(story_text.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compressed(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rtn = {"linear": {"match": ["embed", "*"], "rtn": {"bits": 4, "group_size": 4}}}
    return decoct.compress(stories, {"stages": [{"blocks": [rtn]}]}, tmp_path_factory.mktemp("c") / "out").folder


def tokens_of(folder: Path, text: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])


@torch.no_grad()
def plain_losses(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Transformers' own logits, window by window, float32; losses in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for window in windows:
        logp = model(window[None]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-logp.gather(1, window[1:, None])[:, 0])
    return torch.cat(losses)


def test_perplexity_is_that_of_a_plain_loop(stories: Path, text: Path) -> None:
    found = decoct.evaluate(stories, text=text, windows=WINDOWS, length=LENGTH)
    windows = torch.tensor(tokens_of(stories, text)[: WINDOWS * LENGTH]).reshape(WINDOWS, LENGTH)
    losses = plain_losses(stories, windows)
    assert found.num_tokens == len(losses) == WINDOWS * (LENGTH - 1)
    assert found.perplexity == pytest.approx(exp(float(losses.mean())), rel=1e-4)
    assert 2 < found.perplexity < 20, "a real model on its own kind of text"
    assert (found.against, found.base_perplexity, found.kl_mean, found.top1_agreement) == (None,) * 4


def test_bos_takes_the_place_of_a_token(stories: Path, text: Path) -> None:
    found = decoct.evaluate(stories, text=text, windows=WINDOWS, length=LENGTH, bos=True)
    step = LENGTH - 1
    cut = torch.tensor(tokens_of(stories, text)[: WINDOWS * step]).reshape(WINDOWS, step)
    windows = torch.cat([torch.ones(WINDOWS, 1, dtype=torch.long), cut], dim=1)
    assert found.num_tokens == WINDOWS * step
    assert found.perplexity == pytest.approx(exp(float(plain_losses(stories, windows).mean())), rel=1e-4)
    assert "BOS" in found.protocol
    assert "no BOS" not in found.protocol


def test_against_itself(stories: Path, text: Path) -> None:
    found = decoct.evaluate(stories, text=text, against=stories, windows=3, length=LENGTH)
    assert found.kl_mean == pytest.approx(0.0, abs=1e-7)
    assert found.kl_p999 == pytest.approx(0.0, abs=1e-6)
    assert found.top1_agreement == 1.0
    assert found.base_perplexity == found.perplexity


@torch.no_grad()
def test_divergence_is_that_of_a_plain_loop(stories: Path, compressed: Path, text: Path) -> None:
    found = decoct.evaluate(compressed, text=text, against=stories, windows=WINDOWS, length=LENGTH)
    windows = torch.tensor(tokens_of(stories, text)[: WINDOWS * LENGTH]).reshape(WINDOWS, LENGTH)
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in (stories, compressed)]
    p, q = (torch.cat([model(w[None]).logits[0, :-1].double().log_softmax(-1) for w in windows]) for model in models)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4, abs=1e-7)
    assert found.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert found.kl_p999 == pytest.approx(float(kl.quantile(0.999)), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=2e-3)
    assert found.kl_mean is not None
    assert found.kl_mean > 1e-4
    targets = windows[:, 1:].reshape(-1, 1)
    assert found.perplexity == pytest.approx(exp(-float(q.gather(1, targets).mean())), rel=1e-4)
    assert found.base_perplexity == pytest.approx(exp(-float(p.gather(1, targets).mean())), rel=1e-4)


def test_tally_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    base, logits = (torch.randn(50, 40, generator=generator) * 4 for _ in range(2))
    targets = torch.randint(40, (50,), generator=generator)
    tally = Tally()
    for start in range(0, 50, 7):
        cut = slice(start, start + 7)
        tally.add(logits[cut], targets[cut], base[cut])
    p, q = base.double().log_softmax(-1), logits.double().log_softmax(-1)
    torch.testing.assert_close(tally.kl(), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-6)
    assert tally.perplexity() == pytest.approx(exp(-float(q[range(50), targets].mean())), rel=1e-6)
    assert tally.base_perplexity() == pytest.approx(exp(-float(p[range(50), targets].mean())), rel=1e-6)
    assert tally.top1_agreement() == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_divergence_of_equal_logits_is_never_negative() -> None:
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 10
    tally = Tally()
    tally.add(logits, torch.zeros(200, dtype=torch.long), logits + 3.0)  # a constant changes nothing
    assert (tally.kl() >= 0).all()
    assert float(tally.kl().max()) < 1e-5
    assert tally.top1_agreement() == 1.0


@pytest.mark.parametrize("at_once", [1 << 9, 1 << 12])
def test_logits_in_pieces_give_the_same(
    at_once: int, stories: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decoct.evaluate(stories, text=text, windows=2, length=32)
    monkeypatch.setattr("decoct.evaluation.measure._LOGITS_AT_ONCE", at_once)
    pieces = decoct.evaluate(stories, text=text, windows=2, length=32)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_all_windows_by_default(stories: Path, text: Path) -> None:
    done: list[tuple[int, int]] = []
    found = decoct.evaluate(stories, text=text, on_progress=lambda *each: done.append(each))
    assert found.length == 512, "the model's limit"
    assert found.windows == len(tokens_of(stories, text)) // 512
    assert done == [(n + 1, 5) for n in range(5)]
    assert found.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert found.protocol == f"stories.txt, first {found.windows} non-overlapping windows of 512 tokens, no BOS"


def test_bfloat16_is_close(stories: Path, text: Path) -> None:
    exact = decoct.evaluate(stories, text=text, windows=3, length=64)
    rough = decoct.evaluate(stories, text=text, windows=3, length=64, dtype=torch.bfloat16)
    assert (exact.dtype, rough.dtype) == ("float32", "bfloat16")
    assert rough.perplexity == pytest.approx(exact.perplexity, rel=0.05)


def test_what_is_refused(stories: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"short\.txt has \d+ tokens; give a text of at least 64, or a smaller --length"
    ):
        decoct.evaluate(stories, text=short, length=64)
    with pytest.raises(ValueError, match=r"at most \d+ windows of 512, not 9999"):
        decoct.evaluate(stories, text=text, windows=9999)
    with pytest.raises(ValueError, match="length 513 must lie between 2 and the model's limit of 512 tokens"):
        decoct.evaluate(stories, text=text, length=513)
    with pytest.raises(ValueError, match=r"nowhere\.txt does not exist"):
        decoct.evaluate(stories, text=tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1") * 100)
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        decoct.evaluate(stories, text=tmp_path / "latin.txt")


def test_a_base_with_another_vocabulary(stories: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different vocabularies; KL needs the same"):
        decoct.evaluate(stories, text=text, against=make_base(tmp_path), windows=1, length=32)


def test_a_base_with_a_shorter_limit(tmp_path: Path) -> None:
    """Beyond its limit the base's logits mean nothing, and divergence from them as little."""
    short = make_base(tmp_path)
    (tmp_path / "longer").mkdir()
    longer = make_base(tmp_path / "longer", max_position_embeddings=256)
    with pytest.raises(ValueError, match="limit"):
        decoct.evaluate(longer, text=tmp_path / "text.txt", against=short, windows=1, length=128)


def test_no_bos_token(tmp_path: Path) -> None:
    base = make_base(tmp_path, bos_token_id=None)
    with pytest.raises(ValueError, match="has no BOS token; leave --bos away"):
        decoct.evaluate(base, text=tmp_path / "text.txt", length=16, bos=True)


def test_a_base_of_another_depth(tmp_path: Path) -> None:
    """A pruned model may have fewer blocks than its base."""
    base = make_base(tmp_path)
    (tmp_path / "less").mkdir()
    shallow = make_base(tmp_path / "less", num_hidden_layers=2)
    done: list[tuple[int, int]] = []
    found = decoct.evaluate(
        shallow, text=tmp_path / "text.txt", against=base, windows=2, length=16, on_progress=lambda *e: done.append(e)
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    alone = decoct.evaluate(shallow, text=tmp_path / "text.txt", windows=2, length=16)
    assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-6)


def test_an_opened_model_may_be_given(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    out = run(base, tmp_path / "out", RTN).folder
    settings = {"text": str(tmp_path / "text.txt"), "windows": 2, "length": 16}
    a = evaluate_model(open_model(out), against=open_model(base), **settings)  # type: ignore[arg-type]
    b = decoct.evaluate(out, against=base, **settings)  # type: ignore[arg-type]
    assert (a.perplexity, a.kl_mean) == (b.perplexity, b.kl_mean)
    assert a.bits_per_weight == open_model(out).bits_per_weight
    assert a.nbytes == open_model(out).nbytes


def test_records_are_json_lines(stories: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench" / "measured.jsonl"
    measured = [decoct.evaluate(stories, text=text, windows=n, length=32) for n in (1, 2)]
    for each in measured:
        append_measurement(path, each)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [asdict(each) for each in measured]
    assert lines[1]["date"].endswith("+00:00")
    assert lines[1]["decoct"] == decoct.__version__
    assert lines[1]["model"] == str(stories)


def test_a_kept_base_gives_the_same_figures_without_running(
    stories: Path, compressed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(windows: int, keep: Path | None) -> tuple[float | None, ...]:
        found = decoct.evaluate(compressed, text=text, against=stories, windows=windows, length=LENGTH, keep_base=keep)
        return found.perplexity, found.base_perplexity, found.kl_mean, found.kl_p999, found.top1_agreement

    ran: list[str] = []
    advance = measure._advance
    monkeypatch.setattr(
        measure, "_advance", lambda runner, *rest: ran.append(runner.model.source.label) or advance(runner, *rest)
    )
    plain = measured(WINDOWS, None)
    assert measured(WINDOWS, tmp_path) == plain
    assert str(stories) in ran
    ran.clear()
    assert measured(WINDOWS, tmp_path) == plain
    assert set(ran) == {str(compressed)}  # the base had run already
    ran.clear()
    assert measured(WINDOWS - 1, tmp_path) != plain
    assert str(stories) in ran  # other windows, other states
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_kept_base_is_said(stories: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    decoct.evaluate(compressed, text=text, against=stories, windows=1, length=LENGTH, keep_base=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        decoct.evaluate(compressed, text=text, against=stories, windows=1, length=LENGTH, keep_base=tmp_path)
