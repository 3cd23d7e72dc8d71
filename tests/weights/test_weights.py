"""What every kind of weight owes its readers: a matrix, some of its rows, its exact size."""

import dataclasses

import pytest
import torch

from decoct.ops.packing import packed_width, unpack_mask
from decoct.weights import (
    Dense,
    GroupInt,
    LowRank,
    Masked,
    QuantizedInput,
    Shared,
    Sparse,
    Sum,
    Weight,
    ready,
    scale_index,
)
from tests.reference.inputs import gaussian
from tests.weights.samples import (
    IN,
    OUT,
    RANK,
    binary,
    dense,
    float_block,
    group_int,
    low_rank,
    mask,
    real_zeros,
    samples,
    sparse,
    sparse_int,
    ternary,
)

SAMPLES = samples()
EVERY = pytest.mark.parametrize("weight", SAMPLES.values(), ids=SAMPLES.keys())
ROWS = [
    slice(None), slice(2, 7), slice(None, None, 3), torch.tensor(3), torch.tensor([5]), torch.tensor([0, 11, 3, 3]),
    torch.tensor([[1, 2, 3], [9, 9, 0]]), torch.zeros(2, 1, 3, dtype=torch.long),
    torch.tensor([-1, 2], dtype=torch.int32),
]  # fmt: skip


@EVERY
def test_unpack_has_the_declared_shape_and_any_dtype_asked_for(weight: Weight) -> None:
    assert weight.unpack().shape == torch.Size(weight.shape)
    assert weight.unpack().dtype == weight.dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = weight.unpack(dtype)
        assert matrix.dtype == dtype
        assert bool(torch.isfinite(matrix).all())
    torch.testing.assert_close(weight.unpack(), weight.unpack(torch.float32).to(weight.dtype), rtol=1e-2, atol=1e-2)


@EVERY
def test_unpack_rows_gives_rows_of_unpack(weight: Weight) -> None:
    for dtype in (None, torch.float32):
        whole = weight.unpack(dtype)
        for rows in ROWS if weight.shape[0] > 1 else [slice(None), torch.zeros(2, 3, dtype=torch.long)]:
            check_rows(weight, weight.unpack_rows(rows, dtype), whole[rows])


@pytest.mark.parametrize(
    "name", ["dense", "sparse-bitmap", "masked(int)", "low_rank-bf16", "int3-8-sym", "int4-8-sym", "ternary", "binary"]
)
def test_no_rows_are_no_rows(name: str) -> None:
    for rows in (slice(4, 4), torch.zeros(0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        check_rows(SAMPLES[name], SAMPLES[name].unpack_rows(rows), SAMPLES[name].unpack()[rows])


@EVERY
def test_what_rounds_no_inputs_multiplies_with_its_matrix(weight: Weight) -> None:
    x = gaussian(5, 7, IN)[..., : weight.shape[1]]
    assert weight.quantizes_inputs == any(isinstance(node, QuantizedInput) for node in weight.walk())
    found = weight.apply(x)
    assert found.shape == (5, 7, weight.shape[0])
    assert found.dtype == x.dtype
    product = torch.nn.functional.linear(x, weight.unpack(torch.float32))
    if weight.quantizes_inputs:
        lost = float((found - product).square().sum() / product.square().sum())
        assert 0 < lost < 0.2
    else:
        torch.testing.assert_close(found, product, rtol=1e-5, atol=1e-5)
    again = ready(weight, torch.float32)
    assert again.quantizes_inputs == weight.quantizes_inputs
    torch.testing.assert_close(again.apply(x), found, rtol=1e-4, atol=1e-5)


def check_rows(weight: Weight, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if any(isinstance(node, LowRank | Sum) for node in weight.walk()):  # a product of other shape sums otherwise
        tolerance = 1e-2 if found.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(found, expected)


@EVERY
def test_nbytes_is_exactly_what_is_stored(weight: Weight) -> None:
    stored = weight.tensors()
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert weight.bits_per_weight == pytest.approx(8 * weight.nbytes / (weight.shape[0] * weight.shape[1]))
    assert all(t.untyped_storage().nbytes() < t.nbytes + 8 for t in stored.values()), "a view keeps more alive"


@EVERY
def test_with_its_own_tensors_it_is_itself_and_with_others_it_changes(weight: Weight) -> None:
    own = weight.tensors()
    same = weight.with_tensors(own)
    assert type(same) is type(weight)
    assert torch.equal(same.unpack(), weight.unpack())
    other = weight.with_tensors({name: torch.zeros_like(t) for name, t in own.items()})
    assert {name: (t.shape, t.dtype) for name, t in other.tensors().items()} == {
        name: (t.shape, t.dtype) for name, t in own.items()
    }
    assert not any(t.any() for t in other.tensors().values())
    assert torch.equal(same.unpack(), weight.unpack())


@EVERY
def test_walk_and_tensors_agree(weight: Weight) -> None:
    nodes = list(weight.walk())
    assert nodes[0] is weight
    assert sum(len(node.own_tensors()) for node in nodes) == len(weight.tensors())
    for name, child in weight.children().items():
        for key, tensor in child.tensors().items():
            assert weight.tensors()[f"{name}.{key}"] is tensor


@EVERY
def test_weights_are_frozen(weight: Weight) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.shape = (1, 1)  # type: ignore[misc]


@EVERY
def test_compressed_weights_unpack_into_memory_of_their_own(weight: Weight) -> None:
    if isinstance(weight, Dense | Shared) or (isinstance(weight, QuantizedInput) and isinstance(weight.inner, Dense)):
        return  # a dense matrix is not copied
    before = weight.unpack().clone()
    weight.unpack().zero_()
    weight.unpack_rows(slice(0, 1)).zero_()
    assert torch.equal(weight.unpack(), before)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_group_int_costs_its_bits_and_its_side_data(bits: int, symmetric: bool) -> None:
    weight = group_int(64, 128, bits, 32, symmetric)
    zero_bytes = 0 if symmetric else 64 * packed_width(4, bits)
    assert weight.nbytes == 64 * 128 * bits // 8 + 64 * 4 * 2 + zero_bytes
    assert weight.symmetric == symmetric
    assert int(weight.unpack_codes().max()) < 2**bits


def test_real_zero_points_cost_16_bits_each() -> None:
    for size, groups in ((8, IN // 8), ("channel", 1)):
        weight = real_zeros(size, bits=4)
        assert weight.nbytes == OUT * IN // 2 + OUT * groups * (2 + 2)
        assert not weight.symmetric
    assert real_zeros("tensor", bits=4).nbytes == OUT * IN // 2 + 2 + 2


def test_real_zero_points_are_used_as_they_are() -> None:
    weight = real_zeros(bits=3)
    assert weight.zero is not None
    scale, zero = (t.float().repeat_interleave(8, 1) for t in (weight.scale, weight.zero))
    assert torch.equal(weight.unpack(), (weight.unpack_codes().float() - zero) * scale)
    assert bool((weight.zero != weight.zero.round()).any())


@pytest.mark.parametrize(
    ("element", "scale_kind", "size", "expected"),
    [
        ("e4m3", "real", "channel", 64 * 128 + 64 * 2),
        ("e4m3", "real", "tensor", 64 * 128 + 2),
        ("e4m3", "e8m0", 32, 64 * 128 + 64 * 4),
        ("e2m3", "e8m0", 32, 64 * 96 + 64 * 4),
        ("e2m1", "e8m0", 32, 64 * 64 + 64 * 4),
        ("e2m1", "e4m3", 16, 64 * 64 + 64 * 8 + 4),
    ],
)
def test_float_blocks_cost_their_bits_and_their_scales(
    element: str, scale_kind: str, size: int | str, expected: int
) -> None:
    assert float_block(element, scale_kind, size, 64, 128).nbytes == expected


def test_group_int_codes_and_grid_come_back() -> None:
    weight = group_int(bits=3, symmetric=False)
    grid = weight.grid()
    assert grid.zero is not None
    assert (grid.bits, grid.group_size) == (3, 8)
    groups = (weight.unpack_codes().float() - grid.columns(0, IN)[1]) * grid.columns(0, IN)[0]
    assert torch.equal(weight.unpack(), groups)


def test_dense_is_the_matrix_and_nothing_else_is() -> None:
    matrix = torch.randn(3, 5)
    assert torch.equal(Dense.of(matrix).unpack(), matrix)
    with pytest.raises(ValueError, match=r"a weight is a matrix \[out, in\], not a tensor of shape \[5\]"):
        Dense.of(torch.zeros(5))


def test_low_rank_is_a_product() -> None:
    left, right = dense(OUT, RANK, 1), dense(RANK, IN, 2)
    weight = LowRank.of(left, right)
    assert weight.rank == RANK
    torch.testing.assert_close(weight.unpack(), left.values @ right.values)
    with pytest.raises(ValueError, match=r"factors \[12, 8\] and \[12, 8\] do not multiply"):
        LowRank.of(left, left)


def test_sum_adds_terms_of_one_shape() -> None:
    a, b = dense(seed=1), dense(seed=2)
    assert torch.equal(Sum.of(a, b).unpack(), a.values + b.values)
    for terms in ((a,), (), (a, dense(IN, OUT))):
        with pytest.raises(ValueError, match="a sum takes two or more weights of one shape"):
            Sum.of(*terms)


def test_sum_of_half_precision_terms_is_rounded_once() -> None:
    a, b = dense(seed=1, dtype=torch.bfloat16), dense(seed=2, dtype=torch.bfloat16)
    assert torch.equal(Sum.of(a, b).unpack(), (a.values.float() + b.values.float()).bfloat16())


def test_masked_zeros_what_the_mask_drops() -> None:
    kept = mask()
    weight = Masked.of(group_int(), kept)
    assert torch.equal(weight.survivors(), kept)
    assert torch.equal(weight.unpack(), torch.where(kept, group_int().unpack(), 0))
    assert weight.nbytes == group_int().nbytes + OUT * packed_width(IN, 1)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.03, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("cols", [1, 200, 2**15, 2**15 + 8])
def test_sparse_picks_the_smaller_encoding(cols: int, keep: float) -> None:
    matrix, kept = torch.randn(4, cols), mask(4, cols, keep)
    weight = Sparse.of(matrix, kept)
    total, index = int(kept.sum()), 2 if cols <= 2**15 else 4
    values = 4 * total
    assert weight.nbytes == values + min(4 * packed_width(cols, 1), total * index + 4 * 4)
    assert (weight.bitmap is None) == (weight.columns is not None) == (weight.counts is not None)
    assert torch.equal(weight.survivors(), kept)
    assert torch.equal(weight.unpack(), torch.where(kept, matrix, 0))


def test_sparse_keeps_survivors_that_happen_to_be_zero() -> None:
    matrix, kept = torch.zeros(2, 8), mask(2, 8)
    assert torch.equal(Sparse.of(matrix, kept).survivors(), kept)


def test_shared_stores_nothing_and_reads_through_its_owner() -> None:
    weight = Shared.of("model.embed_tokens.weight", group_int())
    assert weight.nbytes == 0
    assert weight.tensors() == {}
    assert list(weight.walk()) == [weight]
    assert torch.equal(weight.unpack(), group_int().unpack())
    unresolved = Shared((OUT, IN), torch.float32, "model.embed_tokens.weight")
    for read in (unresolved.unpack, lambda: unresolved.unpack_rows(slice(0, 1))):
        with pytest.raises(ValueError, match=r"shared with model\.embed_tokens\.weight, which has not been loaded"):
            read()


def test_nested_tensors_have_dotted_names() -> None:
    weight = Sum.of(Masked.of(group_int(symmetric=False), mask()), low_rank(), sparse())
    assert sorted(weight.tensors()) == [
        "terms.0.inner.codes", "terms.0.inner.scale", "terms.0.inner.zero", "terms.0.mask", "terms.1.left.values",
        "terms.1.right.values", "terms.2.bitmap", "terms.2.values",
    ]  # fmt: skip


def test_gradients_are_not_dragged_along() -> None:
    weight = Dense.of(torch.randn(3, 4, requires_grad=True))
    assert not weight.unpack().requires_grad
    assert not weight.unpack_rows(slice(0, 2)).requires_grad


def test_every_kind_is_sampled() -> None:
    from decoct.weights import WEIGHTS

    assert {node.kind for weight in SAMPLES.values() for node in weight.walk()} == set(WEIGHTS)
    assert all(cls.kind == cls.__name__ == name for name, cls in WEIGHTS.items())
    assert GroupInt.kind in WEIGHTS


def test_signs_cost_one_bit_and_trits_eight_fifths() -> None:
    half = torch.bfloat16
    assert binary(64, 128, group_size=128, dtype=half).nbytes == 64 * (128 // 8 + 2)
    assert binary(64, 128, group_size=32, residual=True, dtype=half).nbytes == 2 * 64 * (128 // 8 + 4 * 2)
    assert binary(64, 128, group_size=128, columns=True, dtype=half).nbytes == 64 * 128 // 8 + 2 * (64 + 128)
    assert binary(64, 128, group_size=50, residual=True, salient=True, dtype=half).nbytes == (
        2 * 64 * (128 // 8 + 2 * 3 * 2) + 128 // 8
    )
    assert ternary(64, 160, 32, 64, half).nbytes == 64 * (160 // 5 + 5 * 2)
    assert ternary(64, 160, 160, 1, half).nbytes == 64 * 32 + 2


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.3, 0.9])
def test_few_integers_cost_their_codes_and_positions_below_a_bitmap(keep: float) -> None:
    weight = sparse_int(keep, 8, 1, 64, 512, torch.bfloat16)
    positions = weight.gaps if weight.bitmap is None else weight.bitmap
    assert positions is not None
    assert positions.nbytes <= 64 * 512 // 8
    assert weight.nbytes == weight.count + positions.nbytes + 64 * 2
    assert (weight.gaps is None) == (keep > 0.5)
    assert torch.equal(weight.survivors(), mask(64, 512, keep, seed=21))


def test_two_planes_are_four_values() -> None:
    weight = binary(group_size=IN, residual=True)
    assert weight.planes == 2
    assert weight.residual_scale is not None
    for row, a, b in zip(weight.unpack(), weight.scale, weight.residual_scale, strict=True):
        assert {round(float(v), 5) for v in row} <= {round(float(s * a + t * b), 5) for s in (-1, 1) for t in (-1, 1)}


def test_salient_features_share_a_second_scale_in_the_groups_that_have_any() -> None:
    weight = binary(group_size=10, salient=True)
    assert weight.salient is not None
    salient = unpack_mask(weight.salient, IN)
    groups = [j // 10 for j in range(IN)]
    with_salient = sorted({group for group, second in zip(groups, salient, strict=True) if second})
    assert weight.scale.shape[1] == 3 + len(with_salient)
    for j, group in enumerate(groups):
        column = 3 + with_salient.index(group) if salient[j] else group
        assert torch.equal(weight.unpack()[:, j].abs(), weight.scale[:, column])


def test_a_group_without_salient_features_has_one_scale() -> None:
    salient = torch.zeros(IN, dtype=torch.bool)
    salient[[9, 23]] = True
    assert scale_index(IN, 8, salient).tolist() == [0] * 8 + [1, 3] + [1] * 6 + [2] * 7 + [4]
    assert scale_index(IN, 8).tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert scale_index(5, 8, torch.ones(5, dtype=torch.bool)).tolist() == [1] * 5
