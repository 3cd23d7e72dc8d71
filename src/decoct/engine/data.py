"""Calibration tokens: from a file, from a dataset of the hub, or written by the model itself."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from decoct.arch.hf import dense_model
from decoct.model import Model
from decoct.store import FolderSource, open_safetensors, save_safetensors
from decoct.store.gguf_source import GgufSource

SELF = "self"
_SELF_BATCH = 64
_CHARACTERS_AT_ONCE = 1 << 20


class Data(BaseModel):
    """Which text calibrates, and how much of it.

    Attributes:
        source: a text file, a hub dataset ("name" or "name:config:split", its text column), or "self".
        num_sequences: how many.
        sequence_length: tokens in each.
        seed: for "self"; files are read from their start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = SELF
    num_sequences: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return self.num_sequences * self.sequence_length


def load_tokens(data: Data, model: Model, on_progress: Callable[[str], None]) -> Int[Tensor, "sequences length"]:
    """Calibration tokens, without special tokens (but "self" starts each sequence with BOS).

    Raises:
        ValueError: no such text, or too short a one; the message says how many tokens there are.
    """
    check_length(data, model)
    if data.source == SELF:
        return self_tokens(data, model, on_progress)
    tokens = text_tokens(data.source, model, data.num_tokens)
    if len(tokens) < data.num_tokens:
        most = len(tokens) // data.sequence_length
        fewer = f"data.num_sequences={most}" if most else "data.num_sequences and data.sequence_length lower"
        raise ValueError(
            f"{data.source} has {len(tokens)} tokens, {data.num_sequences} sequences of {data.sequence_length} need "
            f"{data.num_tokens}; set {fewer} or take a longer text"
        )
    return tokens[: data.num_tokens].reshape(data.num_sequences, data.sequence_length)


def check_text(data: Data, model: Model) -> None:
    """Refuse a text file that is too short, or no text. A hub dataset is not looked at: that takes a network.

    Raises:
        ValueError: as `load_tokens`.
    """
    if data.source != SELF and Path(data.source).expanduser().is_file():
        load_tokens(data, model, lambda _: None)


def check_length(data: Data, model: Model) -> None:
    """Refuse sequences that the model was not made for.

    Raises:
        ValueError: they are longer than its limit.
    """
    if model.max_length is not None and data.sequence_length > model.max_length:
        limit = model.max_length
        raise ValueError(
            f"sequence_length {data.sequence_length} is more than the model's limit of {limit} tokens; "
            f"set data.sequence_length={limit} or less"
        )


def check_source(data: Data) -> None:
    """Refuse a text that is meant to be a file and is not there; whether the hub has a dataset shows when it is read.

    Raises:
        ValueError: no such file.
    """
    if data.source != SELF and not Path(data.source).expanduser().is_file():
        _refuse_missing_file(data.source)


def text_tokens(source: str, model: Model, at_most: int | None = None) -> Int[Tensor, " tokens"]:
    """Tokens of a text file or hub dataset, from its start, without special tokens.

    Args:
        source: see Data.
        model: whose tokenizer to use.
        at_most: stop reading once there are this many; None: the whole text, tokenized in one piece.

    Raises:
        ValueError: no such text.
    """
    tokenizer = load_tokenizer(model)
    if at_most is None:
        return torch.tensor(_encode(tokenizer, read_text(source)))
    characters = _CHARACTERS_AT_ONCE
    while True:
        text = read_text(source, characters)
        tokens = _encode(tokenizer, text)
        if len(tokens) > at_most or len(text) < characters:  # more, so that the last token kept is not a cut word
            return torch.tensor(tokens[:at_most])
        characters *= 2


def read_text(source: str, at_most: int | None = None) -> str:
    """The first `at_most` characters of a text file or hub dataset.

    Raises:
        ValueError: it is neither, or cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        try:
            with path.open(encoding="utf-8", newline="") as handle:
                return handle.read(at_most if at_most is not None else -1)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason})") from None
    _refuse_missing_file(source)
    return _dataset_text(source, at_most)


def _refuse_missing_file(source: str) -> None:
    """What looks like a file's path is no hub dataset."""
    path = Path(source).expanduser()
    if path.suffix or source.startswith((".", "/", "~")):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; give a text file or a hub dataset (to calibrate, also self)")


def load_tokenizer(model: Model) -> Any:
    """The model's own tokenizer.

    Raises:
        ValueError: its files are missing or damaged.
    """
    from transformers import AutoTokenizer

    source = model.source
    try:
        if isinstance(source, GgufSource):
            return AutoTokenizer.from_pretrained(source.path.parent, gguf_file=source.path.name)
        assert isinstance(source, FolderSource)
        return AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0].removesuffix(" from one of: ")
        raise ValueError(
            f"{source.label}: its tokenizer cannot be loaded ({reason}); copy tokenizer.json there"
        ) from None


def tokens_digest(tokens: Tensor) -> str:
    """Identifies calibration tokens in a result's lineage."""
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def self_tokens(data: Data, model: Model, on_progress: Callable[[str], None]) -> Int[Tensor, "sequences length"]:
    """Text that the model writes itself (arXiv 2305.17888): BOS, a random token of its vocabulary, then its own words.

    Seeded, and cached by model, counts and seed. The whole model is held in memory meanwhile.
    """
    path = _cache_folder() / f"self-{_self_key(data, model)}.safetensors"
    if path.exists():
        return open_safetensors(path).read("tokens")
    network = dense_model(model.config, model.family, dense_tensors(model))
    bos = model.config.get("bos_token_id")
    batches = []
    generator = torch.Generator().manual_seed(data.seed)
    for start in range(0, data.num_sequences, _SELF_BATCH):
        count = min(_SELF_BATCH, data.num_sequences - start)
        on_progress(f"the model writes its calibration text: {start} of {data.num_sequences} sequences")
        seeds = torch.randint(int(model.config["vocab_size"]), (count, 1), generator=generator)
        prompt = seeds if bos is None else torch.cat([torch.full_like(seeds, int(bos)), seeds], dim=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data.seed * 1_000_003 + start)
            batches.append(
                network.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_length=data.sequence_length,
                    max_new_tokens=None,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            )
    tokens = torch.cat(batches)
    save_safetensors(path, {"tokens": tokens})
    return tokens


def writing_bytes(data: Data, model: Model) -> int:
    """Memory that the whole model takes while it writes its calibration text; 0 if the text comes from elsewhere."""
    return int(1.2 * model.num_parameters * model.dtype.itemsize) if data.source == SELF else 0


def _self_key(data: Data, model: Model) -> str:
    text = "|".join([model.source.fingerprint(), str(data.num_sequences), str(data.sequence_length), str(data.seed)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def dense_tensors(model: Model) -> dict[str, Tensor]:
    """The whole model, unpacked, as the checkpoint lays it out."""
    found = {}
    for name, slot in model.slots().items():
        matrix = model.weight(name).unpack()
        found[name] = matrix.T if slot.transposed else matrix
    for block in (None, *range(model.num_blocks)):
        found.update({name: model.tensor(name) for name in model.others(block)})
    return found


def _cache_folder() -> Path:
    base = os.environ.get("DECOCT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decoct"
    return Path(base)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _dataset_text(source: str, at_most: int | None) -> str:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ValueError("reading hub datasets needs the datasets package: pip install 'decoct[eval]'") from None
    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        texts: list[str] = []
        size = 0
        for row in rows:
            texts.append(str(row["text"]))
            size += len(texts[-1]) + 2
            if at_most is not None and size > at_most:
                break
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{source} is no file, and not to be had as a hub dataset ({reason}); give a text file or self"
        ) from None
    return "\n\n".join(texts)[:at_most]
