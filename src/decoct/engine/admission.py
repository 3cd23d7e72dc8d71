"""What is looked at before anything is done or discarded: the output folder, the weights, the calibration text."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.engine.data import Data, load_tokens, tokens_digest
from decoct.engine.disk import RUN_FOLDER
from decoct.engine.job import Job, Watch
from decoct.engine.journal import JOURNAL, LOCK, same_json
from decoct.engine.stages import completed
from decoct.engine.summary import Result, read_result
from decoct.model import Model
from decoct.store import MANIFEST, FolderSource, open_safetensors, read_json, save_safetensors

TOKENS = "tokens.safetensors"
"""The calibration tokens' name in a run's folder."""


def check_output(job: Job, run: Path) -> None:
    """Refuse to write over anything that is not ours to finish.

    Raises:
        ValueError: the output folder holds something else, the model itself, or a finished result.
    """
    out = job.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder for the result")
    source = job.model.source
    if isinstance(source, FolderSource) and source.folder.resolve().is_relative_to(out.resolve()):
        verb = "is" if out.samefile(source.folder) else "holds"
        raise ValueError(f"{out} {verb} the model itself; choose another folder for the result")
    finished, unfinished = (out / MANIFEST).exists(), _has_journal(run)
    if job.fresh and (finished or run.exists()):
        return
    if finished and not unfinished:
        raise ValueError(f"{out} already holds a finished model; choose another folder, or add --fresh to replace it")
    if out.exists() and not run.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run of decoct; choose another folder")


def discard(out: Path, run: Path) -> None:
    """Remove an unfinished run, but the held lock and new tokens, and, where decoct wrote it, the result beside it."""
    ours = [path for path in run.iterdir() if path.name not in (LOCK, TOKENS)]
    if (out / MANIFEST).exists():
        ours += [path for path in out.iterdir() if path != run]
    for path in ours:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def calibration_tokens(job: Job, run: Path, watch: Watch) -> Tensor:
    """Calibration tokens, saved with the run so that a resumed one has the same; read anew for a fresh one."""
    path = run / TOKENS
    key = short_digest(json.dumps(job.data.model_dump(), sort_keys=True) + job.model.source.fingerprint())
    if path.exists() and not job.fresh:
        saved = open_safetensors(path)
        if saved.metadata.get("key") == key:
            return saved.read("tokens")
    tokens = load_tokens(job.data, job.model, watch.message)
    save_safetensors(path, {"tokens": tokens}, {"key": key})
    return tokens


def check_source_tensors(model: Model) -> None:
    """Find damage before hours are spent: checksums where there are any, and numbers that are none.

    Raises:
        ValueError: something is damaged.
    """
    if isinstance(model.source, FolderSource):
        model.source.verify()
    for name in model.source.names():
        tensor = model.source.read(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise ValueError(f"{model.source.label}: {name} holds NaN or infinite values; the checkpoint is damaged")


def data_record(data: Data, tokens: Tensor) -> dict[str, Any]:
    """Calibration as the lineage tells it; a file by its name alone, so that a moved one is still the same."""
    return {**data.model_dump(), "source": _text_name(data), "tokens": tokens_digest(tokens)}


def _text_name(data: Data) -> str:
    return Path(data.source).name if Path(data.source).exists() else data.source


def is_result_of(folder: Path, job: Job) -> bool:
    """Whether a folder holds the finished result of a job: the same stages on the same model with the same data."""
    if not (folder / MANIFEST).exists() or _has_journal(folder / RUN_FOLDER):
        return False
    stages = completed(job.model, job.stages)
    made = read_json(folder / MANIFEST)["lineage"][-len(stages) :]
    if not same_json([entry["stage"] for entry in made], [stage.description for stage in stages]):
        return False
    data = {**job.data.model_dump(), "source": _text_name(job.data)}
    read = [{k: v for k, v in entry["data"].items() if k != "tokens"} for entry in made if entry["data"]]
    same_model = made[0]["source"]["fingerprint"] == short_digest(job.model.source.fingerprint())
    if not same_model or not all(each == data for each in read):
        return False
    texts = {entry["data"]["tokens"] for entry in made if entry["data"]}
    if not texts or not Path(job.data.source).exists():  # a data set by its name is the same
        return True
    return texts == {tokens_digest(load_tokens(job.data, job.model, lambda _: None))}


def undamaged(folder: Path) -> Result:
    """A finished result.

    Raises:
        ValueError: something of it is missing.
    """
    try:
        return read_result(folder)
    except ValueError as error:
        raise ValueError(f"{folder} holds this command's result, damaged ({error}); add --fresh to redo it") from error


def short_digest(text: str) -> str:
    """Enough of a checksum to tell two texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _has_journal(run: Path) -> bool:
    """Whether a run folder holds work, and not a mere lock."""
    return any(run.glob(f"stage-*/{JOURNAL}"))
