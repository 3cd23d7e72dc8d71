"""A search as a whole: targets are met, what goes together gets the same bits, and nothing is done twice."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="searching is an extra: pip install 'decoct[search]'")

import yaml

import decoct
from decoct.engine.activations import Activations
from decoct.engine.job import Watch
from decoct.model import Model, open_model
from decoct.recipe import RecipeError
from decoct.search import Found, find
from tests.engine.running import Crash, crash_at, digests, make_base

SEARCH = {"widths": [2, 4, 8], "num_sequences": 2, "num_measured": 2, "generations": 2, "offspring": 4}
LINEAR: list[dict[str, Any]] = [
    {"match": "embed", "rtn": {"bits": 8, "group_size": 8}},
    {"match": "*", "gptq": {"bits": 4, "group_size": "channel"}},
]


def recipe(base: Path, linear: Any = LINEAR, stages: Any = (), **search: Any) -> dict[str, Any]:
    target = {} if "size" in search else {"bits": 4.0}
    return {
        "data": {"source": str(base.parent / "text.txt"), "num_sequences": 6, "sequence_length": 16},
        "stages": [{"blocks": [{"linear": linear}]}, *stages],
        "search": {**SEARCH, **target, **search},
    }


def searched(base: Path, out: Path, value: dict[str, Any], **options: Any) -> tuple[Found, Model]:
    found: list[Found] = []
    decoct.compress(base, value, out, on_found=found.append, **options)
    return found[0], open_model(out)


def tied(found: Found) -> list[list[str]]:
    """The names of each block's matrices that read one edge."""
    groups: dict[str, list[str]] = {}
    for name in found.choice:
        module = name.split(".")[-2]
        edge = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(module, module)
        groups.setdefault(name.replace(module, edge), []).append(name)
    return list(groups.values())


def raising(made: Model, names: list[str], found: Found) -> int:
    """Bytes of the next width, twice the bits, for these matrices; rows are whole bytes here."""
    bits = found.choice[names[0]]
    return sum(made.shape(name)[0] * made.shape(name)[1] for name in names) * bits // 8


@pytest.mark.parametrize("bits", [2.6, 3.7, 5.0])
def test_the_target_is_met_to_a_step(base: Path, tmp_path: Path, bits: float) -> None:
    found, made = searched(base, tmp_path / "out", recipe(base, bits=bits, generations=0))
    stored = {name: made.weight(name) for name in found.choice}
    entries = sum(weight.shape[0] * weight.shape[1] for weight in stored.values())
    nbytes = sum(weight.nbytes for weight in stored.values())
    assert nbytes == found.nbytes
    assert found.bits == 8 * nbytes / entries <= bits
    left = bits * entries / 8 - nbytes
    assert 0 <= left < min(raising(made, names, found) for names in tied(found) if found.choice[names[0]] < 8)
    assert {description["bits"] for name, description in made.described.items() if name in found.choice} == set(
        found.choice.values()
    )


def test_a_size_is_met_by_the_whole_result(base: Path, tmp_path: Path) -> None:
    size = 28_000
    found, made = searched(base, tmp_path / "out", recipe(base, size=size))
    assert size - 2000 < made.nbytes <= size
    assert len(set(found.choice.values())) > 1


def test_what_reads_one_edge_gets_the_same_bits(base: Path, tmp_path: Path) -> None:
    found, _ = searched(base, tmp_path / "out", recipe(base, bits=3.3))
    for block in range(3):
        of = {name.split(".")[-2]: bits for name, bits in found.choice.items() if f"layers.{block}." in name}
        assert of["q_proj"] == of["k_proj"] == of["v_proj"]
        assert of["gate_proj"] == of["up_proj"]
    assert len(found.choice) == 21


def test_experts_are_tied_each_by_itself(tmp_path: Path) -> None:
    moe = make_base(tmp_path, "mixtral", num_hidden_layers=1)
    found, made = searched(moe, tmp_path / "out", recipe(moe, bits=3.3, generations=0))
    for expert in range(4):
        of = [bits for name, bits in found.choice.items() if f"experts.{expert}." in name and ".w2." not in name]
        assert len(of) == 2
        assert len(set(of)) == 1
    assert not any("gate.weight" in name and "experts" not in name for name in found.choice)  # the router
    text = json.dumps(made.lineage[-1]["stage"])
    assert "moe." in text


def test_the_recipe_that_is_found_gives_the_same_files(base: Path, tmp_path: Path) -> None:
    written = tmp_path / "found.yaml"
    searched(base, tmp_path / "out", recipe(base, bits=3.3), write_recipe=written)
    value = yaml.safe_load(written.read_text())
    assert "search" not in value
    assert "bits per weight" in value["about"]
    rules = value["stages"][0]["blocks"][0]["linear"]
    assert rules[0]["match"] == ["embed"]
    assert rules[-1]["match"] == ["*"]
    assert any(pattern.startswith("1.") for rule in rules for pattern in rule["match"])
    decoct.compress(base, written, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    lineage = open_model(tmp_path / "out").lineage[-1]
    assert lineage["stage"]["blocks"][0]["linear"] == rules


def test_other_steps_and_stages_stay(base: Path, tmp_path: Path) -> None:
    value = recipe(base, bits=7.0, generations=0, stages=[{"e2e_qp": {"num_steps": 1, "batch_size": 1}}])
    blocks = value["stages"][0]["blocks"]
    blocks[:] = [{"linear": {"wanda": {"sparsity": 0.5}}}, blocks[0], {"linear": {"eora": {"rank": 1}}}]
    found, made = searched(base, tmp_path / "out", value)
    # Masks, scales and the low-rank term count.
    assert sum(made.weight(name).nbytes for name in found.choice) == found.nbytes
    assert made.weight("model.layers.0.mlp.down_proj.weight").kind == "Sum"
    assert [next(iter(entry["stage"])) for entry in made.lineage] == ["blocks", "e2e_qp"]


def test_without_statistics(base: Path, tmp_path: Path) -> None:
    linear = [{"match": ["embed", "lm_head", "*"], "rtn": {"bits": 4, "group_size": 8}}]
    found, made = searched(base, tmp_path / "out", recipe(base, linear, bits=6.5))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= found.choice.keys()
    assert made.bits_per_weight < 6.7


def test_a_tied_embedding(tmp_path: Path) -> None:
    tied = make_base(tmp_path, "llama-tied", num_hidden_layers=1)
    linear = [{"match": ["embed", "*"], "rtn": {"bits": 4, "group_size": 8}}]
    found, _ = searched(tied, tmp_path / "out", recipe(tied, linear, bits=6.5))
    assert "model.embed_tokens.weight" in found.choice


POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "making candidates": (find, "make_candidates", 0, False),
    "a candidates' shard": (Activations, "commit", 2, True),
    "amid the gradients": (find, "write_json", 2, True),
    "a gradient": (Activations, "commit", 9, True),
    "before the costs are whole": (find, "write_json", 4, False),
    "after a generation": (find, "write_json", 6, True),
    "before the rest goes": (find, "write_json", 8, True),
}


@pytest.fixture(scope="module")
def uninterrupted(base: Path) -> dict[str, str]:
    decoct.compress(base, recipe(base, bits=3.3), base.parent / "uninterrupted")
    return digests(base.parent / "uninterrupted")


@pytest.mark.parametrize("point", POINTS)
def test_it_goes_on_where_it_was(
    base: Path, tmp_path: Path, uninterrupted: dict[str, str], point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, call, after = POINTS[point]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash_at(call, getattr(owner, name), after=after))
        with pytest.raises(Crash):
            decoct.compress(base, recipe(base, bits=3.3), tmp_path / "out")
    decoct.compress(base, recipe(base, bits=3.3), tmp_path / "out")
    assert digests(tmp_path / "out") == uninterrupted


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this had been done before")


def stop_before_compressing(base: Path, out: Path, value: dict[str, Any], patch: Callable[..., None]) -> None:
    patch("decoct.api.compress_job", crash_at(0, forbidden))
    with pytest.raises(Crash):
        decoct.compress(base, value, out)


def test_another_target_has_the_same_costs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"generations": 0}
    with monkeypatch.context() as patch:
        stop_before_compressing(base, tmp_path / "out", recipe(base, bits=3.3, **quick), patch.setattr)
    monkeypatch.setattr(find, "find_costs", forbidden)
    monkeypatch.setattr(find, "make_candidates", forbidden)
    assert not list((tmp_path / "out" / ".run" / "search").glob("model-*"))
    found, _ = searched(base, tmp_path / "out", recipe(base, bits=4.5, **quick))
    assert found.bits > 4.3
    assert not (tmp_path / "out" / ".run").exists()


def test_an_unfinished_run_has_its_bits(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("decoct.engine.stream.write_shard", crash_at(2, forbidden))
        with pytest.raises((Crash, AssertionError)):
            decoct.compress(base, recipe(base, bits=3.3), tmp_path / "out")
    with pytest.raises(ValueError, match=r"unfinished run with another choice; repeat the first command.*--fresh"):
        decoct.compress(base, recipe(base, bits=4.5), tmp_path / "out")
    monkeypatch.setattr(find, "find_costs", forbidden)
    searched(base, tmp_path / "out", recipe(base, bits=3.3))


def test_fresh(base: Path, tmp_path: Path) -> None:
    searched(base, tmp_path / "out", recipe(base, bits=3.3, generations=0))
    with pytest.raises(ValueError, match="already holds a finished model"):
        decoct.compress(base, recipe(base, bits=4.5), tmp_path / "out")
    found, _ = searched(base, tmp_path / "out", recipe(base, bits=4.5, generations=0), fresh=True)
    assert found.bits > 4.3


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "too few": ({"bits": 1.2}, LINEAR, r"1.2 bits cannot be met.* take 2\.\d\d bits per weight with 2 bits each, 8\."),
    "too small": ({"size": "1KiB"}, LINEAR, r"1.0 KiB cannot be met: the result takes .* KiB with 2 bits"),
    "no bits": ({}, {"wanda": {"sparsity": 0.5}}, "no method of this recipe has bits to choose; take one with gptq"),
    "bits it has not": ({"widths": [3, 9]}, LINEAR, "bits must be 2 to 8, not 9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_at_once(base: Path, tmp_path: Path, case: str) -> None:
    search, linear, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        decoct.compress(base, recipe(base, linear, **search), tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        decoct.plan_search(base, recipe(base, linear, **search))
    assert not (tmp_path / "out").exists()


def test_without_scipy_nothing_begins(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"pip install 'decoct\[search\]'"):
        decoct.compress(base, recipe(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_streamed_stages_are_refused(base: Path) -> None:
    value = recipe(base, stages=[{"blocks": [{"linear": {"eora": {}}}]}])
    with pytest.raises(ValueError, match="one streamed stage; put the steps of both into one blocks list"):
        decoct.plan_search(base, value)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"bits": 3, "size": "1MiB"}, "one of bits"),
        ({"widths": [3, 3]}, "at least two different"),
        ({"bit": 3}, "did you mean 'bits'"),
        ({"size": "huge"}, "not a size"),
    ],
)
def test_wrong_settings(base: Path, search: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        decoct.load_recipe({**recipe(base), "search": {"bits": 4.0, **search} if "size" not in search else search})


def test_the_plan_tells_what_can_be_had(base: Path) -> None:
    planned = decoct.plan_search(base, recipe(base, bits=3.9))
    assert planned is not None
    search, alike = planned
    assert 2 < search.least_bits < 3
    assert 8 < search.most_bits < 9
    assert search.wanted_bits == 3.9
    assert len(search.target.ties) == 12
    assert min(search.seconds, search.disk_bytes, search.peak_bytes) > 0
    gptq = {m.bits for g in alike.stages[0].groups for m in g.methods if type(m).__name__ == "GPTQ"}  # type: ignore[union-attr]
    assert gptq == {2}
    assert decoct.plan_search(base, {**recipe(base), "search": None}) is None


def test_progress_is_told(base: Path, tmp_path: Path) -> None:
    began: list[str] = []
    parts: list[str] = []
    watch = Watch(began=began.append, event=lambda event: parts.append(event.part))
    decoct.compress(base, recipe(base, bits=3.3), tmp_path / "out", watch=watch)
    assert len(began) == 4
    assert parts[:2] == ["candidates, embedding", "candidates, block 0"]
    assert "gradients, block 2" in parts
    assert "generation 2" in parts


def test_a_rotated_model_is_not_searched(base: Path, tmp_path: Path) -> None:
    value = recipe(base)
    value["stages"][0]["blocks"].insert(0, {"quarot": {}})
    with pytest.raises(ValueError, match="leave the rotation out, or give bits by hand"):
        decoct.compress(base, value, tmp_path / "out")


def test_bits_of_inputs_are_not_what_is_searched(base: Path, tmp_path: Path) -> None:
    value = recipe(base, generations=0)
    value["stages"][0]["blocks"].append({"linear": {"inputs": {"bits": 8}}})
    assert decoct.plan_search(base, value)[0].target.method.__name__ == "GPTQ"


def test_what_a_later_stage_refuses_is_refused_before_the_search(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoct.api.find_bits", forbidden)
    with pytest.raises(ValueError, match="group_size 64 does not divide heads"):
        decoct.compress(base, recipe(base, stages=[{"cache": {"kivi": {"group_size": 64}}}]), tmp_path / "out")


def test_the_time_of_the_search_counts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def slowly(*given: Any) -> Any:
        begun.append(time.time())
        time.sleep(0.5)
        return find.find_bits(*given)

    monkeypatch.setattr("decoct.api.find_bits", slowly)
    result = decoct.compress(base, recipe(base), tmp_path / "out")
    written = (tmp_path / "out" / "decoct-run.json").stat().st_mtime
    assert result.seconds > written - begun[0] - 0.3
