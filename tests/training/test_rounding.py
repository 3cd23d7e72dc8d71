"""Models that round their inputs are trained as they run: rounded forwards, straight through backwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

import decoct
from decoct.engine.budget import Budget
from decoct.engine.data import Data
from decoct.engine.job import Watch
from decoct.engine.runner import Runner
from decoct.engine.stages import Before
from decoct.losses import Batch, Projected
from decoct.methods.heal.distill import Distill
from decoct.model import Model, open_model
from decoct.ops.input_grid import InputGrid
from decoct.training.network import Student, Teacher
from decoct.training.objective import objective_of
from decoct.training.plan import numbers_of
from decoct.training.views.choose import vectors_of, views_of
from decoct.weights import Dense, QuantizedInput, Sum
from tests.engine.running import DATA, RTN, Settings, make_base, run

TOKENS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(3))
A8: Settings = {"linear": {"inputs": {"bits": 8}}}
A4: Settings = {"linear": {"inputs": {"bits": 4}}}
W8: Settings = {"linear": {"rtn": {"bits": 8, "group_size": "channel"}}}  # multiplies integers
FORMS: dict[str, tuple[Settings, ...]] = {
    "dense": (A4,),
    "integers": (W8, A8),
    "groups": (RTN, A4),
    "floats": (RTN, {"linear": {"inputs": {"format": "fp8"}}}),
    "a fixed scale": (RTN, {"linear": {"inputs": {"bits": 8, "group_size": "tensor"}}}),
    "features kept": ({"linear": {"llm_int8": {}}},),
    "factors": ({"linear": {"svd_llm": {"keep": 0.7}}}, A8),
    "rotated": ({"quarot": {}}, RTN, A4),
    "a correction": (RTN, A8, {"linear": {"eora": {"rank": 2}}}),
    "a trellis": ({"linear": {"qtip": {"bits": 2, "state_bits": 6}}}, A8),
    "sparse": ({"linear": {"wanda": {"sparsity": 0.5}}}, A8),
}


def settings_of(form: str, *stages: Settings) -> dict[str, Any]:
    return {"stages": [{"blocks": list(FORMS[form])}, *stages], "data": {**DATA}}


def last_states(model: Model) -> torch.Tensor:
    """What the head reads, by the runner that the engine streams with, float32."""
    runner = Runner(model, torch.float32)
    hidden = runner.embed(TOKENS, model.weight(model.family.embed).unpack(torch.float32))
    for block in range(model.num_blocks):
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        hidden = runner.run(block, runner.lay_out(block, {name: model.weight(name) for name in names}), hidden)
    return runner.final(hidden).flatten(0, 1)


@pytest.mark.parametrize("form", FORMS)
def test_student_and_teacher_run_as_the_model_does(form: str, base: Path, tmp_path: Path) -> None:
    model = open_model(run(base, tmp_path / "out", **settings_of(form)).folder)
    method = Distill()
    student = Student(model, views_of(model, method), vectors_of(model, method), torch.float32, recompute=True)
    wanted = last_states(model)
    for seen in (student.seen(TOKENS), Teacher(model, torch.float32).seen(TOKENS)):
        assert isinstance(seen.predictions, Projected)
        torch.testing.assert_close(seen.predictions.hidden, wanted, rtol=1e-4, atol=1e-4)
    matrices = student.blocks[0].rounding
    assert len(matrices) == 7
    student(TOKENS, objective_of("cross_entropy"), None, Batch.of(TOKENS)).backward()
    trained = [number for matrix in matrices for number in matrix.parameters()]
    assert trained
    assert all(number.grad is not None and number.grad.abs().max() > 0 for number in trained)


@pytest.mark.parametrize("form", ["rotated", "factors"])
def test_student_and_teacher_agree_in_bfloat16(form: str, base: Path, tmp_path: Path) -> None:
    """To the bit: both run as the model does without training, also where autocast would change a product."""
    model = open_model(run(base, tmp_path / "out", **settings_of(form)).folder)
    method = Distill(train=("matrices",))
    student = Student(model, views_of(model, method), {}, torch.bfloat16, recompute=False)
    found = student.seen(TOKENS).predictions, Teacher(model, torch.bfloat16).seen(TOKENS).predictions
    own, wanted = (each.hidden for each in found if isinstance(each, Projected))
    assert torch.equal(own, wanted)


@pytest.mark.parametrize("train", ["matrices", "norms", "corrections", "lora", "qa_lora"])
@pytest.mark.parametrize("form", ["a correction", "factors", "a trellis", "rotated"])
def test_the_plan_counts_what_is_trained(form: str, train: Any, base: Path, tmp_path: Path) -> None:
    model = open_model(run(base, tmp_path / "out", **settings_of(form)).folder)
    method = Distill(train=(train,), rank=2)
    planned = numbers_of(Before(model, model, Data(source="self"), Budget(), (), (), torch.float32), method).trained
    views, vectors = views_of(model, method), vectors_of(model, method)
    parameters = [*(p for view in views.values() for p in view.parameters())]
    parameters += [p for vector in vectors.values() for p in vector.parameters()]
    count = sum(parameter.numel() for parameter in parameters)
    assert count <= planned
    if train in ("norms", "corrections", "lora"):
        assert count == planned
    nothing = {"corrections": ("factors", "a trellis", "rotated"), "qa_lora": ("factors", "a trellis")}
    assert (count == 0) == (form in nothing.get(train, ()))


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_families_with_biases(name: str, tmp_path: Path) -> None:
    """Transposed matrices and biases; every number has a gradient."""
    base = make_base(tmp_path, name)
    model = open_model(run(base, tmp_path / "out", RTN, A8).folder)
    method = Distill()
    student = Student(model, views_of(model, method), vectors_of(model, method), torch.float32, recompute=True)
    seen = student.seen(TOKENS).predictions
    assert isinstance(seen, Projected)
    torch.testing.assert_close(seen.hidden, last_states(model), rtol=1e-4, atol=1e-4)
    student(TOKENS, objective_of("cross_entropy"), None, Batch.of(TOKENS)).backward()
    assert all(p.grad is not None for matrix in student.blocks[0].rounding for p in matrix.parameters())


@pytest.mark.parametrize("settings", [{"on_policy": 0.5}, {"replay": 4, "evaluate_every": 2}])
def test_texts_of_its_own_are_refused(settings: Settings, base: Path) -> None:
    stages = [{"blocks": [RTN, A8]}, {"distill": {"num_steps": 2, "sequence_length": 16, **settings}}]
    with pytest.raises(ValueError, match="would write its texts without"):
        decoct.plan(base, {"stages": stages, "data": {"source": str(base.parent / "text.txt"), **DATA}})


def test_gradients_pass_straight_through() -> None:
    """By the inputs as if they had not been rounded, by the matrix of what it was really multiplied with."""
    generator = torch.Generator().manual_seed(0)
    x, matrix, g = (torch.randn(shape, generator=generator) for shape in ((5, 16), (8, 16), (5, 8)))
    weight = QuantizedInput.of(Dense.of(matrix), InputGrid("int", 4, "token", True, 1.0))
    given = x.clone().requires_grad_()
    out = weight.apply(given)
    torch.testing.assert_close(out, weight.rounded(x) @ matrix.T)
    assert not torch.equal(out, x @ matrix.T)
    out.backward(g)
    torch.testing.assert_close(given.grad, g @ matrix)


@pytest.mark.parametrize("form", ["groups", "rotated", "a correction"])
def test_healing_keeps_the_form(form: str, base: Path, tmp_path: Path) -> None:
    before = open_model(run(base, tmp_path / "before", **settings_of(form)).folder)
    heard: dict[float, list[float]] = {1e-6: [], 3e-3: []}
    for rate, losses in heard.items():
        settings: Settings = {"num_steps": 16, "batch_size": 4, "sequence_length": 16, "learning_rate": rate}
        watch = Watch(event=lambda event, to=losses: to.append(event.loss) if event.loss is not None else None)
        stages = settings_of(form, {"distill": settings})
        after = open_model(run(base, tmp_path / f"after {rate}", watch=watch, **stages).folder)
    assert after.described == before.described
    name = after.prefix(0) + after.block_slots[0].name
    old, new = before.weight(name).tensors(), after.weight(name).tensors()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed
    assert not any("codes" in key for key in changed)
    still, healed = (sum(losses[8:]) for losses in heard.values())
    assert healed < 0.98 * still


def test_qat_and_lora_lie_inside(base: Path, tmp_path: Path) -> None:
    """4-bit weights and 8-bit inputs learned together, and a correction that reads them as they come."""
    settings: Settings = {"num_steps": 2, "batch_size": 2, "sequence_length": 16}
    stages: tuple[Settings, ...] = (
        {"qat": {**settings, "bits": 4, "group_size": 8}},
        {"distill": {**settings, "train": ["lora"], "rank": 2}},
    )
    qat, lora = (
        open_model(run(base, tmp_path / str(n), **settings_of("dense", stage)).folder) for n, stage in enumerate(stages)
    )
    name = qat.prefix(0) + qat.block_slots[0].name
    weight, corrected = qat.weight(name), lora.weight(name)
    assert [node.kind for node in weight.walk()] == ["QuantizedInput", "GroupInt"]
    assert isinstance(corrected, Sum)
    assert [term.kind for term in corrected.terms] == ["QuantizedInput", "LowRank"]


def test_a_plan_says_what_comes_of_it(base: Path, tmp_path: Path) -> None:
    """Bytes of the result, to the byte."""
    text = {"source": str(base.parent / "text.txt"), **DATA}
    qat: Settings = {"qat": {"num_steps": 1, "sequence_length": 16, "bits": 4, "group_size": 8}}
    recipe = {"stages": [{"blocks": [A8]}, qat], "data": text}
    planned = decoct.plan(base, recipe).stages[-1].output_bytes
    assert planned == decoct.compress(base, recipe, tmp_path / "out").nbytes
