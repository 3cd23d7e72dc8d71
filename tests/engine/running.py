"""Small models with a tokenizer, small texts, and recipes to run on them."""

import hashlib
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from decoct.engine.compress import compress_job
from decoct.engine.job import Job, Watch
from decoct.engine.summary import Result
from decoct.model import open_model
from decoct.recipe import parse_recipe
from tests.tiny import save_model

Settings = dict[str, Any]
GPTQ: Settings = {"linear": {"gptq": {"bits": 4, "group_size": 8}}}
RTN: Settings = {"linear": {"rtn": {"bits": 4, "group_size": 8}}}
WANDA: Settings = {"linear": {"wanda": {"sparsity": 0.5}}}
EORA: Settings = {"linear": {"eora": {"rank": 2}}}
AUTOROUND: Settings = {"autoround": {"num_steps": 3, "batch_size": 2}}
EVERYTHING: Settings = {
    "linear": [
        {"match": ["embed", "lm_head"], "rtn": {"bits": 8, "group_size": 8}},
        {"match": "*", "gptq": {"bits": 4, "group_size": 8}},
    ]
}
DATA: Settings = {"num_sequences": 4, "sequence_length": 16}


def save_tokenizer(folder: Path) -> None:
    """One token a character (and one for 00): letters, digits and a few marks, after <pad>, <s>, </s>."""
    tokens = ["<pad>", "<s>", "</s>", *"ĠĊ.,", *string.ascii_letters, *string.digits]  # as bytes are spelled: " \n.,"
    vocabulary = {token: i for i, token in enumerate([*tokens, "00"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("0", "0")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_text(path: Path, characters: int = 4000) -> Path:
    """Words drawn with a seed: all characters appear, none too rarely."""
    drawn = torch.randint(len(string.ascii_letters), (characters,), generator=torch.Generator().manual_seed(7))
    letters = [string.ascii_letters[i] for i in drawn.tolist()]
    path.write_text("".join(" " if i % 5 == 4 else letter for i, letter in enumerate(letters)), encoding="utf-8")
    return path


def make_base(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny model in `folder`/base with a tokenizer, and `folder`/text.txt."""
    save_model(name, folder / "base", dtype, **changes)
    save_tokenizer(folder / "base")
    write_text(folder / "text.txt")
    return folder / "base"


def make_job(base: Path, out: Path, *blocks: Settings, fresh: bool = False, **scopes: Any) -> Job:
    """One stage of these steps; `stages`, `data` and `budget` replace the defaults."""
    data = {"source": str(base.parent / "text.txt"), **DATA, **scopes.pop("data", {})}
    recipe = parse_recipe({"stages": [{"blocks": list(blocks)}], "data": data, **scopes})
    return Job(open_model(base), recipe.stages, recipe.data, recipe.budget, out, fresh)


def run(base: Path, out: Path, *blocks: Settings, watch: Watch | None = None, **changes: Any) -> Result:
    """Compress, or go on with it."""
    return compress_job(make_job(base, out, *blocks, **changes), watch or Watch())


def digests(folder: Path) -> dict[str, str]:
    """Every file of a result but the run's own times, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "decoct-run.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


_whole: dict[str, dict[str, str]] = {}


def whole(base: Path, *blocks: Settings, **changes: Any) -> dict[str, str]:
    """What a run that nothing stops gives; each recipe runs once."""
    key = json.dumps([str(base), blocks, changes])
    if key not in _whole:
        _whole[key] = digests(run(base, base.parent / f"whole-{len(_whole)}", *blocks, **changes).folder)
    return _whole[key]


class Crash(BaseException):
    """Ends a run at once; nothing may catch it."""


def crash_at(call: int, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """A stand-in for `function` that crashes at its call number `call` (from 0), before or after doing it."""
    calls = iter(range(1_000_000))

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)
        if number == call and not after:
            raise Crash
        result = function(*args, **kwargs)
        if number == call:
            raise Crash
        return result

    return stand_in
