"""Every product agrees with the matrix that its weight unpacks to, in float64."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from decoct.native.library import library, start_of_torch_threads
from decoct.ops.grid import Grid
from decoct.runtime import kernels
from decoct.runtime.kernels.compiled import Compiled
from decoct.weights import Codebook, Dense, GroupInt, Sparse, Trellis, Weight
from decoct.weights.trellis import sequences_of
from tests.weights.samples import samples

FOUND = library()
LEVELS = FOUND.levels if FOUND else ()
needs_library = pytest.mark.skipif(FOUND is None, reason="decoct was installed without its compiled kernels")
SHAPES = [(1, 8), (5, 24), (16, 32), (33, 40), (37, 168), (64, 256)]


def inputs(rows: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(bits: int, shape: tuple[int, int], group_size: int, form: str, seed: int = 0) -> GroupInt:
    """Random codes, scales and zero points."""
    out, cols = shape
    generator = torch.Generator().manual_seed(seed)
    groups = cols // group_size
    scale = (
        torch.rand(out, groups, generator=generator).add(0.1).to(torch.bfloat16 if form == "symmetric" else torch.half)
    )
    zero = None
    if form == "integer":
        zero = torch.randint(2**bits, (out, groups), generator=generator, dtype=torch.uint8)
    elif form == "real":
        zero = (torch.rand(out, groups, generator=generator) * 2**bits).half()
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    return GroupInt.of(codes, Grid(scale, zero, bits, group_size), torch.float32)


def agrees(product: kernels.Product, weight: Weight, x: torch.Tensor) -> None:
    """Within what float32 sums may lose, against float64."""
    exact = x.double() @ weight.unpack(torch.float32).double().T
    size = x.double().abs() @ weight.unpack(torch.float32).double().abs().T
    found = product(x)
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    step = torch.finfo(x.dtype).eps
    assert ((found.double() - exact).abs() <= 4e-6 * size + step * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("kind", sorted(samples()))
def test_every_kind_of_weight(kind: str) -> None:
    weight = samples()[kind]
    product = kernels.linear(weight)
    assert product.shape == weight.shape
    x = inputs(6, weight.shape[1]).reshape(2, 3, -1)
    assert torch.allclose(product(x), weight.apply(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(product.unpack(torch.float32), weight.unpack(torch.float32))
    ids = torch.tensor([[0, 2], [1, 0]]) % weight.shape[0]
    assert torch.equal(product.rows(ids), weight.unpack_rows(ids))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("form", ["symmetric", "integer", "real"])
def test_integers(bits: int, form: str, level: str) -> None:
    for shape in SHAPES:
        for group_size in {8, 24, 32, 64, shape[1]}:
            if shape[1] % group_size:
                continue
            weight = integers(bits, shape, group_size, form)
            product = kernels.linear(weight)
            assert isinstance(product, Compiled), product.kernel
            product.at_level(level)
            for rows in (1, 3, 9):
                agrees(product, weight, inputs(rows, shape[1]))
            assert torch.equal(product.unpack(), weight.unpack())


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_sixteen_bits(dtype: torch.dtype, level: str) -> None:
    for weight in (integers(4, (37, 168), 24, "integer"), Dense.of(inputs(37, 168)), Dense.of(inputs(37, 168, dtype))):
        product = kernels.linear(weight)
        assert isinstance(product, Compiled)
        product.at_level(level)
        for rows in (1, 5):
            agrees(product, weight, inputs(rows, 168, dtype))
        assert torch.equal(product.unpack(dtype), weight.unpack(dtype))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [k for k, w in samples().items() if not w.children() and w.kind != "Shared"])
def test_other_layouts(kind: str, level: str) -> None:
    weight = samples()[kind]
    product = kernels.linear(weight)
    if not isinstance(product, Compiled):
        assert product.kernel in {"unpack", "Columns"}
        return
    product.at_level(level)
    for rows in (1, 4, 6):
        agrees(product, weight, inputs(rows, weight.shape[1]))
    assert torch.equal(product.unpack(torch.float32), weight.unpack(torch.float32))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", range(1, 5))
def test_tables_of_rows(bits: int, level: str) -> None:
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
        table = torch.randn(shape[0], 2**bits, 1, generator=generator).half()
        weight = Codebook.of(codes, table, torch.float32)
        product = kernels.linear(weight)
        assert isinstance(product, Compiled)
        product.at_level(level)
        agrees(product, weight, inputs(2, shape[1]))
        assert torch.equal(product.unpack(), weight.unpack())


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_times_bfloat16(bits: int, level: str) -> None:
    """Two codes at a time, where the processor does that: groups of whole units, one group a row, and smaller ones."""
    for shape in [(5, 24), (16, 32), (33, 96), (37, 192), (20, 168)]:
        for group_size in {8, 32, 64, 96, shape[1]}:
            if shape[1] % group_size:
                continue
            for form in ("symmetric", "integer", "real"):
                weight = integers(bits, shape, group_size, form)
                product = kernels.linear(weight)
                assert isinstance(product, Compiled)
                product.at_level(level)
                for rows in (1, 3, 9):
                    agrees(product, weight, inputs(rows, shape[1], torch.bfloat16))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sparse_and_dense_rows(dtype: torch.dtype, level: str) -> None:
    """Rows that end anywhere, and bitmaps from empty to full."""
    for shape in [(3, 8), (17, 40), (5, 168), (33, 200), (16, 512)]:
        for keep in (0.0, 0.3, 0.9, 1.0):
            matrix = inputs(*shape, dtype)
            kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < keep
            for weight in (Sparse.of(matrix, kept), Dense.of(matrix)):
                product = kernels.linear(weight)
                assert isinstance(product, Compiled)
                product.at_level(level)
                for rows in (1, 2, 7):
                    agrees(product, weight, inputs(rows, shape[1], dtype))
                assert torch.equal(product.unpack(), weight.unpack())


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("bits", "state_bits"), [(1, 10), (1, 16), (2, 10), (2, 15), (3, 10), (3, 16), (4, 10), (4, 16)]
)
def test_trellises(bits: int, state_bits: int, level: str) -> None:
    """Rows that fill half a block, sequences that end within one, stripes that are not full."""
    generator = torch.Generator().manual_seed(bits)
    for rows, cols, stripe in [(8, 16, 16), (24, 40, 16), (136, 20, 8), (200, 48, 16), (64, 24, 8)]:
        size = (-(-cols // stripe), *sequences_of(rows * stripe))
        digits = torch.randint(2**bits, size, generator=generator, dtype=torch.uint8)
        for scale in (torch.rand(1, 1, generator=generator), torch.rand(rows, 1, generator=generator).half()):
            weight = Trellis.of(
                digits, (rows, cols), scale, torch.float32, bits=bits, state_bits=state_bits, stripe=stripe
            )
            product = kernels.linear(weight)
            assert isinstance(product, Compiled)
            product.at_level(level)
            for count in (1, 3, 9):
                agrees(product, weight, inputs(count, cols))
            assert torch.equal(product.unpack(), weight.unpack())


@needs_library
@pytest.mark.skipif("avx512bf16" not in LEVELS, reason="the processor has no such instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_many_inputs_rounded_to_bytes(bits: int, dtype: torch.dtype) -> None:
    """The product of inputs that are rounded 64 at a time, or as many as a group has."""
    for shape, group_size in [((33, 96), 96), ((16, 192), 64), ((20, 168), 8), ((70, 256), 128), ((37, 250), 250)]:
        for form in ("symmetric", "integer", "real"):
            weight, x = integers(bits, shape, group_size, form), inputs(41, shape[1], dtype)
            x[3] = 0.0
            x[:, 5] *= 30
            product = kernels.linear(weight)
            assert isinstance(product, Compiled)
            assert product.can_round
            product.rounds_prompts = True
            size = group_size if group_size < shape[1] and group_size <= 128 else 64
            parts = [part.float() for part in x.split(size, dim=1)]
            steps = [(part.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30) for part in parts]
            rounded = torch.cat([(part / step).round() * step for part, step in zip(parts, steps, strict=True)], 1)
            wanted = rounded @ weight.unpack(torch.float32).T
            assert (product(x).float() - wanted).abs().max() <= (
                1e-4 if dtype == torch.float32 else 5e-3
            ) * wanted.abs().max()


@needs_library
def test_many_inputs_take_the_dense_product() -> None:
    weight = integers(4, (64, 256), 64, "symmetric")
    x = inputs(40, 256)
    assert torch.allclose(kernels.linear(weight)(x), weight.apply(x), rtol=1e-4, atol=1e-3)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_spoil_their_own_row_alone(bad: float, level: str) -> None:
    for weight in (
        integers(4, (20, 64), 32, "integer"),
        integers(3, (20, 64), 8, "symmetric"),
        Dense.of(inputs(20, 64)),
    ):
        product = kernels.linear(weight)
        assert isinstance(product, Compiled)
        product.at_level(level)
        x = inputs(3, 64)
        good = product(x)
        x[1, 33] = bad
        spoilt = product(x)
        assert torch.equal(spoilt[[0, 2]], good[[0, 2]])
        touched = weight.unpack()[:, 33] != 0
        assert not torch.isfinite(spoilt[1][touched]).any()


@needs_library
def test_half_precision_overflows_to_infinity_as_torch_does() -> None:
    product = kernels.linear(Dense.of(torch.full((4, 16), 3000.0)))
    assert isinstance(product, Compiled)
    for level in LEVELS:
        found = product.at_level(level)(torch.full((1, 16), 100.0, dtype=torch.float16))
        assert torch.equal(found, torch.full((1, 4), torch.inf, dtype=torch.float16))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_sixteen_bit_numbers_come_back_as_torch_has_them(level: str) -> None:
    """Every float16 and bfloat16 there is, subnormal ones, infinities and NaN among them."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    for dtype, other in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        weight = Dense.of(every.view(dtype))
        product = kernels.linear(weight)
        assert isinstance(product, Compiled)
        product.at_level(level)
        for to in (torch.float32, other):
            assert torch.equal(product.unpack(to).nan_to_num(3.0), weight.unpack(to).nan_to_num(3.0)), (dtype, to)


@pytest.fixture(params=["torch's threads", "threads of its own"])
def whose(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the threads that are borrowed by default, where torch's can be, and with those of the library."""
    assert FOUND is not None
    torchs = start_of_torch_threads()
    if request.param == "torch's threads" and torchs is None:
        pytest.skip("torch's threads cannot be borrowed here")
    FOUND.borrow_threads(torchs if request.param == "torch's threads" else None)
    yield
    FOUND.borrow_threads(torchs)


@needs_library
@pytest.mark.usefixtures("whose")
def test_threads_at_once() -> None:
    """Callers in many threads get what a single one gets."""
    weight = integers(4, (512, 1024), 64, "symmetric")
    product = kernels.linear(weight)
    wanted = [product(inputs(1, 1024, seed=n)) for n in range(8)]
    wrong: list[int] = []

    def call(n: int) -> None:
        wrong.extend(n for _ in range(30) if not torch.equal(product(inputs(1, 1024, seed=n)), wanted[n]))

    callers = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@needs_library
@pytest.mark.usefixtures("whose")
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    product, x, before = (
        kernels.linear(integers(3, (512, 1024), 64, "symmetric")),
        inputs(1, 1024),
        torch.get_num_threads(),
    )
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(product(x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_library
def test_gradients_of_inputs() -> None:
    weight = integers(4, (16, 32), 32, "symmetric")
    x = inputs(2, 32).requires_grad_()
    kernels.linear(weight)(x).sum().backward()
    assert torch.allclose(x.grad, weight.unpack().sum(0).expand(2, 32), rtol=1e-4, atol=1e-4)


@pytest.fixture
def another_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Lets kernels be looked for elsewhere during a test."""

    def look(where: str) -> None:
        monkeypatch.setenv("DECOCT_KERNELS", where)
        library.cache_clear()

    yield look
    library.cache_clear()


def test_without_the_library_weights_are_unpacked(another_library: Callable[[str], None]) -> None:
    another_library("none")
    assert kernels.linear(integers(4, (16, 32), 32, "symmetric")).kernel == "unpack"


@pytest.mark.parametrize("where", ["/nowhere/decoct_kernels.so", __file__])
def test_a_library_that_is_none_is_refused(where: str, another_library: Callable[[str], None]) -> None:
    another_library(where)
    with pytest.raises(ValueError, match="cannot be loaded"):
        kernels.linear(Dense.of(inputs(2, 2)))


def test_it_says_once_that_there_are_no_kernels(
    another_library: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    another_library("")
    monkeypatch.setattr("decoct.native.library.FOLDER", tmp_path)
    with pytest.warns(UserWarning, match="without its compiled kernels") as said:
        first, second = (kernels.linear(Dense.of(inputs(2, 2))) for _ in range(2))
    assert first.kernel == second.kernel == "unpack"
    assert len(said) == 1


@needs_library
@pytest.mark.usefixtures("whose")
def test_a_forked_child_multiplies_too() -> None:
    product, x = kernels.linear(integers(4, (512, 1024), 64, "symmetric")), inputs(1, 1024)
    wanted = product(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks beside threads: that is the point
        child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(x), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0
