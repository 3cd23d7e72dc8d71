"""Triton's kernels, interpreted on the CPU, agree with what weights unpack to; run on a GPU where there is one."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import decoct
from decoct.model import open_model
from decoct.runtime.kernels import gpu
from decoct.runtime.kernels.gpu import available, linear_on_gpu
from decoct.runtime.kernels.product import MOST_DIRECT
from decoct.serving import open_engine
from decoct.weights import Dense, GroupInt
from tests.runtime.test_kernels import inputs, integers

SHAPES = [((37, 128), 64), ((5, 70), 70), ((24, 48), 16)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU too."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton is not installed, or does not interpret")
    monkeypatch.setattr(gpu, "_DEVICES", ("cpu", "cuda"))


@pytest.fixture(scope="module")
def quantized_stories(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its matrices in 4 bits, but not its embedding."""
    out = tmp_path_factory.mktemp("gpu") / "rounded"
    stages = [{"blocks": [{"linear": {"rtn": {"bits": 4, "group_size": "channel"}}}]}]
    decoct.compress(stories, {"stages": stages}, out)
    return out


def agrees(weight: GroupInt, x: torch.Tensor, found: torch.Tensor) -> None:
    """Within what float32 sums, and rounding the result, may lose; many inputs meet the matrix in their own dtype."""
    matrix = weight.unpack(torch.float32 if len(x) <= MOST_DIRECT else x.dtype).double()
    exact, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    grid = weight.grid().scale.double().abs().max() * 2**weight.bits  # codes and zero points are added up apart
    size = size + x.double().abs().sum(-1, keepdim=True) * grid
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= 4e-6 * size + torch.finfo(x.dtype).eps * exact.abs()).all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("form", ["symmetric", "integer", "real"])
def test_products_and_matrices(bits: int, form: str) -> None:
    for shape, group_size in SHAPES:
        weight = integers(bits, shape, group_size, form)
        for dtype, tokens in ((torch.float32, 3), (torch.float16, MOST_DIRECT + 1)):
            x = inputs(tokens, shape[1], dtype)
            agrees(weight, x, linear_on_gpu(weight, x))
            span = gpu._span(weight)
            assert span is not None
            assert torch.equal(gpu._unpack(weight, span, dtype), weight.unpack(dtype))


@pytest.mark.usefixtures("interpreted")
def test_one_scale_for_all_rows() -> None:
    weight = integers(4, (24, 64), 64, "integer")
    shared = weight.with_tensors({**weight.tensors(), "scale": weight.scale[:1], "zero": weight.zero[:1]})
    x = inputs(2, 64)
    torch.testing.assert_close(linear_on_gpu(shared, x), x @ shared.unpack(torch.float32).T)
    assert linear_on_gpu(shared, x[:0]).shape == (0, 24)


@pytest.mark.usefixtures("interpreted")
def test_biases_and_gradients() -> None:
    weight, bias = integers(4, (24, 64), 64, "integer"), inputs(1, 24)[0]
    for tokens in (2, MOST_DIRECT + 1):
        x = inputs(tokens, 64).requires_grad_()
        y = linear_on_gpu(weight, x, bias)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight.unpack(torch.float32), bias))
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight.unpack(torch.float32).sum(0).expand(tokens, 64))
        with torch.no_grad():
            torch.testing.assert_close(linear_on_gpu(weight, x, bias), y.detach())


@pytest.mark.usefixtures("interpreted")
def test_what_triton_does_not_know_is_unpacked() -> None:
    x = inputs(2, 24)
    for weight in (Dense.of(inputs(5, 24)), integers(4, (5, 24), 8, "symmetric")):
        assert gpu._span(weight) is None
        torch.testing.assert_close(linear_on_gpu(weight, x), x @ weight.unpack(torch.float32).T)


@pytest.mark.usefixtures("interpreted")
def test_modules_use_it(quantized_stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.hf import load_whole

    mlp = load_whole(open_model(quantized_stories), torch.float32).model.layers[0].mlp
    x, calls = inputs(2, mlp.gate_proj.packed.expression().shape[1]), []

    def counted(weight: GroupInt, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(weight.kind)
        return linear_on_gpu(weight, x, bias)

    monkeypatch.setattr("decoct.runtime.packed.linear_on_gpu", counted)
    by_kernels = mlp(x)
    monkeypatch.setattr(gpu, "_DEVICES", ("cuda",))
    torch.testing.assert_close(mlp(x), by_kernels)
    assert calls == ["GroupInt"] * 3


def test_only_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not available(torch.device("cpu"))
    monkeypatch.setattr(gpu, "_has_triton", lambda: False)
    assert not available(torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(quantized_stories: Path) -> None:
    with pytest.raises(ValueError, match=r"the engine cuda needs a GPU.*use --engine decoct"):
        open_engine("cuda", quantized_stories)


@needs_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_on_a_gpu(bits: int) -> None:
    assert type(gpu._source().multiply).__name__ == "JITFunction"  # not interpreted
    weight = integers(bits, (256, 512), 64, "integer")
    moved = weight.with_tensors({name: tensor.cuda() for name, tensor in weight.tensors().items()})
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for tokens in (1, 16, 40):
            x = inputs(tokens, 512, dtype)
            agrees(weight, x, linear_on_gpu(moved, x.cuda()).cpu())


@needs_gpu
def test_a_model_on_a_gpu(quantized_stories: Path) -> None:
    from decoct.hf import load_whole

    opened, tokens = open_model(quantized_stories), torch.tensor([[1, 5, 9]])
    there = load_whole(opened, torch.float32, "cuda")(tokens.cuda()).logits.cpu()
    torch.testing.assert_close(there, load_whole(opened, torch.float32)(tokens).logits, rtol=1e-3, atol=1e-3)
