"""What every method owes, whatever it does. There is no code per method here: adding one to METHODS tests it.

What a method needs and may do is derived from its class: `stat`, the base class, and fields whose names mean the same
everywhere (`bits`, `group_size`). A correction is exercised on what the data-free baseline made of a matrix.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from decoct.engine.block import apply_method
from decoct.engine.rules import Method
from decoct.methods import METHODS, LinearCorrection, LinearMethod
from decoct.recipe import RecipeError, build_method, method_settings
from decoct.store import open_safetensors, save_safetensors
from decoct.weights import (
    Binary,
    Dense,
    LowRank,
    Masked,
    QuantizedInput,
    Shared,
    Sparse,
    Sum,
    Ternary,
    Weight,
    describe,
    rebuild,
    tensor_specs,
)
from tests.reference.inputs import correlated, gaussian, output_error

OUT, IN, TOKENS = 24, 64, 200  # the default group size divides IN
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINGLE: dict[str, type[LinearMethod] | type[LinearCorrection]] = {
    name: cls for name, cls in METHODS.items() if issubclass(cls, LinearMethod | LinearCorrection)
}
BASELINE, PRUNING_BASELINE = SINGLE["rtn"], SINGLE["magnitude"]

EVERY = pytest.mark.parametrize("cls", SINGLE.values(), ids=SINGLE.keys())
METHOD_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def whole_rows(cls: type[Method]) -> Method:
    """The defaults, but with groups that fit any width, so that any factor can be quantized."""
    whole = "token" if cls.quantizes_inputs else "channel"
    return cls(**{"group_size": whole} if "group_size" in names(cls) else {})


def names(cls: type[Method]) -> list[str]:
    return [field.name for field in fields(cls)]


def statistic(method: Method, x: torch.Tensor) -> Any:
    if method.stat is None:
        return None
    stat = method.stat.empty(x.shape[1])
    stat.add(x)
    return stat


def run(method: Method, original: Weight, x: torch.Tensor, weight: Weight | None = None) -> Weight:
    """Apply a method to `original`, or to what `weight` an earlier step made of it."""
    if weight is None:
        weight = original
        if isinstance(method, LinearCorrection):
            weight = corrected(type(method), Dense.of(original.unpack().nan_to_num(0, 0, 0)))
    return apply_method(method, weight, statistic(method, x), original, "3.mlp.down")


def corrected(cls: type[LinearCorrection], original: Weight, **settings: Any) -> Weight:
    """What a correction is given: the matrix rounded, or pruned if it corrects nothing else."""
    plain = Dense.of(matrix())
    rounded = whole_rows(BASELINE).compress(plain, None)
    prunes = attempt(cls(), plain, inputs(), rounded)[0] is None
    if prunes:
        return PRUNING_BASELINE().compress(original, None)
    return (BASELINE(**settings) if settings else whole_rows(BASELINE)).compress(original, None)


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return gaussian(OUT, IN, seed=1, dtype=dtype)


def inputs() -> torch.Tensor:
    return correlated(TOKENS, IN)


def state(thing: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in vars(thing).items() if isinstance(value, torch.Tensor)}


def finite(weight: Weight) -> bool:
    return bool(torch.isfinite(weight.unpack()).all())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


Outcome = tuple[Weight | None, str]


def attempt(method: Method, original: Weight, x: torch.Tensor, weight: Weight | None = None) -> Outcome:
    """As `run`; a refusal gives None and what was said."""
    try:
        return run(method, original, x, weight), ""
    except ValueError as error:
        return None, str(error)


def finite_or_refused(method: Method, original: torch.Tensor, x: torch.Tensor) -> Weight | None:
    """The result, which must be finite; None if the method said, with the slot's name, why there is none."""
    weight, refusal = attempt(method, Dense.of(original), x)
    if weight is None:
        assert refusal.startswith("3.mlp.down: ")
    else:
        assert finite(weight), "the result is not finite, and nothing was said"
    return weight


@EVERY
def test_defaults_construct_a_frozen_dataclass_of_one_of_the_two_bases(cls: type[Method]) -> None:
    method = cls()
    assert is_dataclass(cls)
    assert issubclass(cls, LinearMethod) != issubclass(cls, LinearCorrection)
    assert method == cls()
    assert hash(method) == hash(cls())
    assert not hasattr(method, "__dict__")
    with pytest.raises(AttributeError):
        setattr(method, names(cls)[0], getattr(method, names(cls)[0]))
    with pytest.raises(TypeError):
        cls(4)  # type: ignore[call-arg]


def variations(method: Method) -> Iterator[Method]:
    """The method with one field after another changed to a value of its own type, where that is allowed."""
    for field in fields(method):
        value = getattr(method, field.name)
        match value:
            case bool():
                changed: Any = not value
            case int():
                changed = value + 1
            case float():
                changed = value / 2 or 0.1
            case _:
                continue
        with contextlib.suppress(ValueError):
            yield replace(method, **{field.name: changed})


@EVERY
def test_yaml_round_trip(cls: type[Method]) -> None:
    methods = [cls(), whole_rows(cls), *variations(cls())]
    assert len(set(methods)) >= len(names(cls)) - 2
    for method in methods:
        settings = yaml.safe_load(yaml.safe_dump(method_settings(method)))
        (name,) = settings
        assert METHODS[name] is cls
        assert build_method(name, settings[name], "stages[0]") == method
    assert build_method(name, None, "stages[0]") == build_method(name, {}, "stages[0]") == cls()


@EVERY
def test_an_unknown_key_names_the_nearest(cls: type[Method]) -> None:
    (name,) = method_settings(cls())
    for field in names(cls):
        for wrong in (f"{field}s", f"{field}_"):
            with pytest.raises(RecipeError, match=rf"\.{name}: unknown key '{wrong}'; did you mean '{field}'"):
                build_method(name, {wrong: 1}, "stages[0]")
    with pytest.raises(RecipeError, match=f"unknown method '{name}x'; did you mean '{name}'"):
        build_method(f"{name}x", {}, "stages[0]")


@EVERY
def test_a_value_of_another_type_is_refused_by_its_full_name(cls: type[Method]) -> None:
    (name,) = method_settings(cls())
    for field in names(cls):
        with pytest.raises(RecipeError, match=rf"^stages\[0\]\.{name}\.{field}: "):
            build_method(name, {field: {"a": 1}}, "stages[0]")


@EVERY
@METHOD_DTYPE
def test_shape_and_dtype_are_kept(cls: type[Method], dtype: torch.dtype) -> None:
    for shape in ((OUT, IN), (IN, OUT)):
        x = inputs()[:, : shape[1]]
        weight = run(whole_rows(cls), Dense.of(matrix(dtype).reshape(shape)), x)
        assert weight.shape == shape
        assert weight.dtype == dtype
        assert weight.unpack().shape == shape
        assert weight.unpack().dtype == dtype
        assert finite(weight)


@EVERY
@METHOD_DTYPE
def test_nothing_given_is_changed(cls: type[Method], dtype: torch.dtype) -> None:
    method, original, x = cls(), Dense.of(matrix(dtype)), inputs()
    base = corrected(type(method), original) if isinstance(method, LinearCorrection) else original
    stat = statistic(method, x)
    before = {name: t.clone() for name, t in base.tensors().items()}, {} if stat is None else state(stat)
    apply_method(method, base, stat, original, "slot")
    assert torch.equal(original.values, matrix(dtype))
    assert same(base.tensors(), before[0])
    assert stat is None or same(state(stat), before[1])


@EVERY
@METHOD_DTYPE
def test_the_same_input_gives_the_same_bits(cls: type[Method], dtype: torch.dtype) -> None:
    first, second = (run(cls(), Dense.of(matrix(dtype)), inputs()) for _ in range(2))
    assert describe(first) == describe(second)
    assert same(first.tensors(), second.tensors())


@EVERY
@METHOD_DTYPE
def test_declared_and_stored_bytes_agree(cls: type[Method], dtype: torch.dtype, tmp_path: Path) -> None:
    weight = run(cls(), Dense.of(matrix(dtype)), inputs())
    save_safetensors(tmp_path / "w.safetensors", weight.tensors())
    file = open_safetensors(tmp_path / "w.safetensors")
    assert weight.nbytes == sum(info.nbytes for info in file.tensors.values())
    description = json.loads(json.dumps(describe(weight)))
    specs = tensor_specs(description)
    assert {name: (info.dtype, list(info.shape)) for name, info in file.tensors.items()} == specs
    again = rebuild(description, {name: file.read(name) for name in file.tensors})
    assert torch.equal(again.unpack(), weight.unpack())
    if isinstance(weight, QuantizedInput) and isinstance(weight.inner, Dense):
        assert weight.nbytes == OUT * IN * dtype.itemsize  # only inputs are rounded
    else:
        grows = isinstance(weight, Sum)  # a term of the default rank is as large as a matrix this small
        assert issubclass(cls, LinearCorrection) or grows or weight.nbytes < OUT * IN * dtype.itemsize


@EVERY
def test_leaves_are_the_shapes_a_later_step_finds(cls: type[Method]) -> None:
    method = cls()
    method.check((OUT, IN))
    leaves = method.leaves((OUT, IN))
    found = run(method, Dense.of(matrix()), inputs())
    if isinstance(found, LowRank):
        assert leaves == (found.left.shape, found.right.shape)
    else:
        assert leaves == (found.shape,)
    assert method.workspace((OUT, IN)) > 0
    assert method.operations((OUT, IN)) > 0


@EVERY
def test_a_layer_that_no_token_reached_is_served_by_neutral_statistics(cls: type[Method]) -> None:
    kind = cls().stat
    if kind is None:
        return
    original = Dense.of(matrix())
    base = corrected(cls, original) if issubclass(cls, LinearCorrection) else original
    weight = apply_method(cls(), base, kind.neutral(IN), original, "slot")
    assert finite(weight)
    with pytest.raises(ValueError, match=r"^slot: no calibration token reached this layer"):
        apply_method(cls(), base, kind.empty(IN), original, "slot")


@EVERY
@METHOD_DTYPE
def test_dead_columns_zero_rows_and_few_tokens_are_handled(cls: type[Method], dtype: torch.dtype) -> None:
    w = matrix(dtype)
    w[[0, 7, 20]] = 0
    x = inputs()
    x[:, [0, 1, 32, 50]] = 0
    for seen in (x, x[:3], x[:1]):
        weight = finite_or_refused(cls(), w, seen)
        assert weight is not None
        assert float(weight.unpack(torch.float32)[[0, 7, 20]].abs().max()) < 1e-3


@EVERY
@METHOD_DTYPE
def test_a_matrix_of_zeros_and_inputs_of_zero_are_handled(cls: type[Method], dtype: torch.dtype) -> None:
    weight = finite_or_refused(cls(), torch.zeros(OUT, IN, dtype=dtype), inputs())
    assert weight is not None
    assert not weight.unpack().any()
    finite_or_refused(cls(), matrix(dtype), torch.zeros(5, IN))


@EVERY
@METHOD_DTYPE
@pytest.mark.parametrize("size", [1e3, 0.9], ids=["1000", "largest"])
def test_huge_outliers_are_handled(cls: type[Method], dtype: torch.dtype, size: float) -> None:
    w, x = matrix(dtype), inputs()
    largest = torch.finfo(dtype).max
    w[3, 5], w[3, 40], w[20, 63] = (s * (size if size > 1 else size * largest) for s in (1, -1, 1))
    weight = finite_or_refused(cls(), w, x)
    if weight is not None and size > 1 and not _few_sizes(weight):
        assert float(weight.unpack()[3, 5]) == pytest.approx(size, rel=0.1)
    loud = inputs()
    loud[:, 9] *= 1e4
    assert finite_or_refused(cls(), matrix(dtype), loud) is not None


def _few_sizes(weight: Weight) -> bool:
    """One or two bits an entry: a group has one or two sizes, and none for an outlier of its own."""
    return any(isinstance(node, Binary | Ternary) for node in weight.walk())


@EVERY
@METHOD_DTYPE
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_the_size_of_weights_and_inputs_hardly_matters(cls: type[Method], dtype: torch.dtype, scale: float) -> None:
    """Small and large layers lose about the same share: nothing is added to, or cut from, an absolute size.

    Feedback turns the rounding of the scaled weights themselves into other codes, and in so small a matrix into a loss
    that is a tenth larger or smaller.
    """
    w, x = gaussian(OUT, IN, seed=1), inputs()
    losses = []
    for scaled, seen in ((w.to(dtype), x), ((w * scale).to(dtype), x), (w.to(dtype), x * scale)):
        weight = finite_or_refused(cls(), scaled, seen)
        assert weight is not None
        losses.append(output_error(weight.unpack(torch.float32) - scaled.float(), x) / output_error(scaled, x))
    assert max(losses) <= 1.25 * min(losses) + 1e-6


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(cls: type[Method], bad: float) -> None:
    w = matrix()
    w[3, 5] = bad
    assert finite_or_refused(cls(), w, inputs()) is None
    for tokens in ([0], list(range(TOKENS))):
        x = inputs()
        x[tokens, 9] = bad
        finite_or_refused(cls(), matrix(), x)


def trade_offs(cls: type[Method]) -> list[dict[str, Any]]:
    """Settings that a calibrated quantizer shares with the baseline, as far as it offers them."""
    tried = {"bits": (2, 4, 8), "group_size": (32, "channel"), "symmetric": (True, False)}
    shared = [name for name in tried if name in names(cls) and name in names(BASELINE)]
    found = []
    for values in itertools.product(*(tried[name] for name in shared)):
        settings = dict(zip(shared, values, strict=True))
        with contextlib.suppress(ValueError):
            cls(**settings)
            found.append(settings)
    return found


@EVERY
def test_calibration_pays(cls: type[Method]) -> None:
    """A quantizer with data loses no more than rounding to nearest; a correction no more than what it corrects."""
    x, original = inputs(), Dense.of(matrix())
    corrects = issubclass(cls, LinearCorrection)
    if not corrects and (cls().stat is None or getattr(cls(), "bits", None) is None):
        return
    for settings in trade_offs(BASELINE) if corrects else trade_offs(cls):
        rounded = corrected(cls, original, **settings) if corrects else BASELINE(**settings).compress(original, None)
        found = run(cls(), original, x, rounded) if corrects else run(cls(**settings), original, x)
        before, after = (output_error(weight.unpack() - original.values, x) for weight in (rounded, found))
        assert after <= before * (1 + 1e-3), settings


def kept(node: Weight, after: Weight, *, swaps: bool = False) -> bool:
    """Whether `after` holds, somewhere within, a weight with the structure of `node`.

    `swaps`: zeros may have moved within their rows, as many as there were: what a correction may do.
    """
    return any(_same_structure(node, other, swaps) for other in after.walk())


def _same_structure(node: Weight, other: Weight, swaps: bool) -> bool:
    if node.shape != other.shape:
        return False
    if swaps and isinstance(node, Sparse | Masked) and isinstance(other, Sparse | Masked):
        return torch.equal(node.survivors().sum(1), other.survivors().sum(1))
    if isinstance(node, Sparse | Masked):
        zeros = ~node.survivors()
        return isinstance(other, Sparse | Masked) and not (other.survivors() | other.unpack().bool())[zeros].any()
    if isinstance(node, LowRank):
        return isinstance(other, LowRank) and other.rank <= node.rank
    return other.kind == node.kind and getattr(other, "bits", None) == getattr(node, "bits", None)


@pytest.mark.parametrize("second", SINGLE.values(), ids=SINGLE.keys())
@pytest.mark.parametrize("first", SINGLE.values(), ids=SINGLE.keys())
def test_a_second_method_keeps_the_firsts_structure_or_refuses(first: type[Method], second: type[Method]) -> None:
    x = inputs()
    builds: tuple[Callable[[type[Method]], Method], ...] = (lambda cls: cls(), whole_rows)
    for build in builds:
        original = Dense.of(matrix())
        before = run(build(first), original, x)
        tensors = {name: t.clone() for name, t in before.tensors().items()}
        after, refusal = attempt(build(second), original, x, before)
        if after is None:
            assert refusal.startswith("3.mlp.down: ")
            continue
        assert same(before.tensors(), tensors)
        assert after.shape == (OUT, IN)
        assert finite(after)
        for node in before.walk():
            swaps = issubclass(second, LinearCorrection)
            assert isinstance(node, Dense) or kept(node, after, swaps=swaps), (
                f"{node.kind} was lost in a {describe(after)}"
            )


@EVERY
def test_a_shared_weight_is_refused_or_kept(cls: type[Method]) -> None:
    original = Dense.of(matrix())
    shared = Shared.of("model.embed_tokens.weight", original)
    weight, refusal = attempt(cls(), original, inputs(), shared)
    assert "model.embed_tokens.weight" in refusal if weight is None else kept(shared, weight)
