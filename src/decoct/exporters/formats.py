"""Each format: what it refuses, how it is written, and how the result is tried."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from decoct.exporters import awq, compressed_tensors, dense, gguf, gptq, mlx, onnx, openvino, peft
from decoct.exporters.in_peft import verify_in_peft
from decoct.exporters.in_transformers import verify_in_transformers
from decoct.exporters.integer_folder import stored_integers, verify_folder
from decoct.exporters.report import Check
from decoct.exporters.vllm_rules import Stored
from decoct.model import Model


@dataclass(frozen=True, slots=True)
class Request:
    """One export.

    Attributes:
        model: what to write.
        variant: of the format; None: its default.
        out: file or folder.
        fold: write as dense, or round again, what the format cannot hold.
        load: try the result in the engine that it is for.
        importance: of each input feature, by slot, for types that are fitted.
    """

    model: Model
    variant: str | None
    out: Path
    fold: bool
    load: bool
    importance: dict[str, Tensor] = field(default_factory=dict)


Verified = tuple[list[Check], str | None]
"""What was checked, and what the engine wrote."""


@dataclass(frozen=True, slots=True)
class Exporter:
    """A format.

    Attributes:
        check: refuses a model (given its variant, and whether to fold) by descriptions alone.
        write: writes it; gives notes for the user.
        verify: tries what was written.
        stored: the matrices that vLLM would load quantized, of a model (given whether to fold); None: it reads no such
            folders.
        variants: what may stand after its name and a colon.
        suffix: of the file; "" where the export is a folder.
    """

    check: Callable[[Model, str | None, bool], object]
    write: Callable[[Request], tuple[str, ...]]
    verify: Callable[[Request], Verified]
    stored: Callable[[Model, bool], list[Stored]] | None = None
    variants: tuple[str, ...] = ()
    suffix: str = ""


_NOT_LOADED = Check("load", ok=None, detail="left out as asked")


def _write_compressed_tensors(request: Request) -> tuple[str, ...]:
    compressed_tensors.export_compressed_tensors(request.model, request.out, fold=request.fold)
    return ()


def _verify_compressed_tensors(request: Request) -> Verified:
    if not request.load:
        return [_NOT_LOADED], None
    found = [s for s in compressed_tensors.find_schemes(request.model, fold=request.fold).values() if s is not None]
    unpack = any(not s.symmetric or s.format not in _LOADED_PACKED for s in found)
    nearly = any(s.inputs is not None for s in found)
    return verify_in_transformers(request.model, request.out, unpack=unpack, nearly=nearly, unrounded=False)


_LOADED_PACKED = ("pack-quantized", "int-quantized", "float-quantized")


def _write_dense(request: Request) -> tuple[str, ...]:
    dense.export_dense(request.model, request.out, fold=request.fold)
    return ()


def _verify_dense(request: Request) -> Verified:
    if not request.load:
        return [_NOT_LOADED], None
    return verify_in_transformers(request.model, request.out, unpack=False, nearly=False, unrounded=True)


def _write_peft(request: Request) -> tuple[str, ...]:
    peft.export_peft(request.model, request.out, fold=request.fold)
    return (f"{peft.BASE}/ is the model that the adapter is for, unpacked",)


def _verify_peft(request: Request) -> Verified:
    return verify_in_peft(request.model, request.out) if request.load else ([_NOT_LOADED], None)


def _write_gguf(request: Request) -> tuple[str, ...]:
    plan = gguf.plan_gguf(request.model, request.variant, fold=request.fold)
    gguf.write_gguf(plan, request.out, request.importance)
    return plan.notes()


def _verify_gguf(request: Request) -> Verified:
    plan = gguf.plan_gguf(request.model, request.variant, fold=request.fold)
    return gguf.verify_gguf(plan, request.out, load=request.load)


_NO_ENGINE = "no engine that reads it is run here; what was written was read back"


def _write_gptq(request: Request) -> tuple[str, ...]:
    return gptq.write_gptq(gptq.plan_gptq(request.model, request.variant, fold=request.fold), request.out)


def _verify_gptq(request: Request) -> Verified:
    plan = gptq.plan_gptq(request.model, request.variant, fold=request.fold)
    return [*verify_folder(plan, request.out), Check("load", ok=None, detail=_NO_ENGINE)], None


def _write_awq(request: Request) -> tuple[str, ...]:
    return awq.write_awq(awq.plan_awq(request.model, fold=request.fold), request.out)


def _verify_awq(request: Request) -> Verified:
    checks = verify_folder(awq.plan_awq(request.model, fold=request.fold), request.out)
    return [*checks, Check("load", ok=None, detail=_NO_ENGINE)], None


def _write_mlx(request: Request) -> tuple[str, ...]:
    return mlx.write_mlx(mlx.plan_mlx(request.model, fold=request.fold), request.out)


def _verify_mlx(request: Request) -> Verified:
    checks = mlx.verify_mlx(mlx.plan_mlx(request.model, fold=request.fold), request.out)
    return [
        *checks,
        Check("load", ok=None, detail="MLX runs on Apple's machines; read back here"),
    ], None


def _write_onnx(request: Request) -> tuple[str, ...]:
    plan = onnx.plan_onnx(request.model, request.variant, fold=request.fold)
    onnx.write_onnx(plan, request.out)
    return plan.notes()


def _verify_onnx(request: Request) -> Verified:
    plan = onnx.plan_onnx(request.model, request.variant, fold=request.fold)
    return onnx.verify_onnx(plan, request.out, load=request.load)


def _write_openvino(request: Request) -> tuple[str, ...]:
    plan = openvino.plan_openvino(request.model, fold=request.fold)
    openvino.write_openvino(plan, request.out)
    return plan.notes()


def _verify_openvino(request: Request) -> Verified:
    plan = openvino.plan_openvino(request.model, fold=request.fold)
    return openvino.verify_openvino(plan, request.out, load=request.load)


EXPORTERS: dict[str, Exporter] = {
    "compressed_tensors": Exporter(
        lambda model, _, fold: compressed_tensors.find_schemes(model, fold=fold),
        _write_compressed_tensors,
        _verify_compressed_tensors,
        lambda model, fold: compressed_tensors.stored_matrices(model, fold=fold),
    ),
    "dense": Exporter(lambda model, _, fold: dense.check_dense(model, fold=fold), _write_dense, _verify_dense),
    "peft": Exporter(lambda model, _, fold: peft.check_peft(model, fold=fold), _write_peft, _verify_peft),
    "gguf": Exporter(
        lambda model, variant, fold: gguf.plan_gguf(model, variant, fold=fold),
        _write_gguf,
        _verify_gguf,
        variants=tuple(gguf.VARIANTS),
        suffix=".gguf",
    ),
    "gptq": Exporter(
        lambda model, variant, fold: gptq.plan_gptq(model, variant, fold=fold),
        _write_gptq,
        _verify_gptq,
        lambda model, fold: stored_integers(model, gptq.plan_gptq(model, None, fold=fold).layouts, ("in", "out")),
        gptq.VARIANTS,
    ),
    "awq": Exporter(
        lambda model, _, fold: awq.plan_awq(model, fold=fold),
        _write_awq,
        _verify_awq,
        lambda model, fold: stored_integers(model, awq.plan_awq(model, fold=fold).layouts, ("out",)),
    ),
    "mlx": Exporter(lambda model, _, fold: mlx.plan_mlx(model, fold=fold), _write_mlx, _verify_mlx),
    "onnx": Exporter(
        lambda model, variant, fold: onnx.plan_onnx(model, variant, fold=fold),
        _write_onnx,
        _verify_onnx,
        variants=tuple(onnx.VARIANTS),
    ),
    "openvino": Exporter(
        lambda model, _, fold: openvino.plan_openvino(model, fold=fold), _write_openvino, _verify_openvino
    ),
}
