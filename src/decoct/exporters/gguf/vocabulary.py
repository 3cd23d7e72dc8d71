"""A Hugging Face tokenizer as GGUF's keys: tokens, kinds of token, scores or merges, special tokens, chat template."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from decoct.exporters.misfit import MisfitError
from decoct.model import Model
from decoct.store import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    _QWEN2: "qwen2",
    _QWEN2.replace(r"\p{N}| ", r"\p{N}{1,3}| "): "llama-bpe",
}
"""llama.cpp's names for the patterns that text is split by before merging."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp needs to turn text into tokens and back.

    Attributes:
        model: "llama" (sentencepiece: merges by score) or "gpt2" (bytes, merges by rank).
        split: llama.cpp's name of how text is split first.
        tokens: in order; names of unused ones where the embedding has more rows.
        kinds: of each token: 1 normal, 2 unknown, 3 control, 4 the user's, 5 unused, 6 a byte.
        scores: of each token, for "llama".
        add_space: a space is put before the text, for "llama".
    """

    model: str
    split: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    add_space: bool


def read_vocabulary(model: Model) -> tuple[Vocabulary, Any]:
    """The vocabulary of a checkpoint, and its special tokens and chat template as the gguf package reads them.

    Raises:
        MisfitError: the checkpoint has no tokenizer.json, or of a kind that llama.cpp does not know.
    """
    import gguf

    with TemporaryDirectory() as folder:
        found = _read(model, Path(folder))
        special = gguf.SpecialVocab(folder, load_merges=found.model == "gpt2", n_vocab=len(found.tokens))
        for role in ("bos", "eos", "unk", "pad"):
            token = model.config.get(f"{role}_token_id")
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                special.special_token_ids.setdefault(role, token)
    return found, special


def check_vocabulary(model: Model) -> None:
    """Refuse a tokenizer that llama.cpp does not know.

    Raises:
        MisfitError: see `read_vocabulary`.
    """
    with TemporaryDirectory() as folder:
        _read(model, Path(folder))


def _read(model: Model, folder: Path) -> Vocabulary:
    """The vocabulary; the tokenizer's files are then in the folder."""
    model.source.save_extras(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise _refused("it has no tokenizer.json")
    return vocabulary_of(read_json(path), model.shape(model.family.embed)[0])


def vocabulary_of(tokenizer: dict[str, Any], rows: int) -> Vocabulary:
    """From what tokenizer.json says.

    Args:
        tokenizer: its content.
        rows: of the embedding; tokens without a name are added, as unused, up to there.

    Raises:
        MisfitError: llama.cpp has no such tokenizer.
    """
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        raise _refused(f"its tokenizer is of the kind {model['type']}, which llama.cpp does not know in this form")
    names = {int(i): token for token, i in model["vocab"].items()}
    names |= {int(token["id"]): token["content"] for token in added}
    if max(names) >= rows:
        raise _refused(f"its tokenizer has {max(names) + 1} tokens, its embedding {rows} rows")
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [_NORMAL if i in names else _UNUSED for i in range(rows)]
    for token in added:
        kinds[int(token["id"])] = _CONTROL if token.get("special") else _USER
    if not model.get("merges"):
        raise _refused("its tokenizer merges nothing, which llama.cpp does not load")
    if not model.get("byte_fallback"):
        return Vocabulary("gpt2", split_name(tokenizer), tokens, kinds, None, add_space=False)
    if model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = _UNKNOWN
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = _BYTE
    return Vocabulary("llama", "default", tokens, kinds, _scores(model, tokens), add_space=_adds_space(tokenizer))


def split_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text before it merges.

    Raises:
        MisfitError: it splits in a way that is not known here.
    """
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel":
        raise _refused("its tokenizer neither merges bytes nor falls back to them")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    pattern = (steps[0].get("pattern") or {}).get("Regex", "") if kinds == ["Split", "ByteLevel"] else ""
    if pattern in _SPLITS:
        return _SPLITS[pattern]
    raise _refused(f"its tokenizer splits text by {pattern or kinds}, for which llama.cpp has no name known here")


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """llama.cpp merges the pair with the highest score first: so a token's is how early its merge comes, negated."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token] + 1) if token in ranks else -1e6 for token in tokens]


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    if any(step["type"] == "Prepend" for step in _steps(tokenizer.get("normalizer"), "normalizers")):
        return True
    splits = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in splits)


def _steps(stated: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if stated is None:
        return []
    return list(stated[key]) if stated["type"] == "Sequence" else [stated]


def _refused(why: str) -> MisfitError:
    advice = "export it as compressed_tensors or dense"
    return MisfitError(f"GGUF needs the tokenizer in the file, and {why}", advice, advice)
