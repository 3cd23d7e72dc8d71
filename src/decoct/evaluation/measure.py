"""One streamed pass over a text: perplexity, and divergence from a base model on the same tokens."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.budget import peak_resident_bytes
from decoct.engine.data import read_text, text_tokens
from decoct.engine.runner import Runner
from decoct.evaluation.base_states import BaseStates
from decoct.evaluation.divergence import Tally
from decoct.methods.policy import policy_name, read_policy
from decoct.model import Model
from decoct.runtime.cache import WholeWindow, places
from decoct.version import __version__
from decoct.weights import Weight

_LOGITS_AT_ONCE = 1 << 24  # entries of one chunk of logits


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured, and exactly how.

    Attributes:
        model: label of the measured model.
        against: label of the base model, or None.
        text: name of the text.
        text_sha256: of its characters, UTF-8.
        windows: non-overlapping windows evaluated.
        length: tokens in a window.
        bos: whether each window starts with BOS in place of a token of text.
        dtype: what the models ran in.
        num_tokens: predicted tokens that the figures average over.
        perplexity: exp of the mean negative log-likelihood, nats.
        nbytes: bytes of all tensors on disk.
        bits_per_weight: 8 · nbytes / parameters, everything counted.
        seconds: the evaluation took.
        peak_bytes: most memory that the process held.
        date: UTC, ISO 8601.
        decoct: version.
        protocol: in words, the policy for keys and values included.
        cache: that policy and its settings; None: keys and values as they are.
        cache_bits: bits of a packed key or value, everything that is stored with it counted; None: nothing is packed.
        cache_token_bytes: bytes of keys and values for each token at a window's end, all blocks together, the tokens in
            full precision counted in the model's own dtype.
        base_perplexity: the base model's; this and what follows is None without one.
        kl_mean: mean KL(base ‖ model) a token, nats.
        kl_p99: its 99th percentile.
        kl_p999: its 99.9th percentile.
        top1_agreement: fraction of tokens where both rank the same token first.
        base_nbytes: the base model's.
        base_bits_per_weight: the base model's.
    """

    model: str
    against: str | None
    text: str
    text_sha256: str
    windows: int
    length: int
    bos: bool
    dtype: str
    num_tokens: int
    perplexity: float
    nbytes: int
    bits_per_weight: float
    seconds: float
    peak_bytes: int
    date: str
    decoct: str
    protocol: str
    cache: dict[str, Any] | None
    cache_bits: float | None
    cache_token_bytes: float | None
    base_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    top1_agreement: float | None = None
    base_nbytes: int | None = None
    base_bits_per_weight: float | None = None


OnProgress = Callable[[int, int], None]


@torch.no_grad()
def evaluate_model(
    model: Model,
    *,
    text: str,
    against: Model | None = None,
    windows: int | None = None,
    length: int | None = None,
    bos: bool = False,
    dtype: torch.dtype = torch.float32,
    keep_base: Path | None = None,
    on_progress: OnProgress = lambda _done, _total: None,
) -> Measurement:
    """Measure a model, block by block, so that it may be larger than memory.

    Args:
        model: what to measure.
        text: a text file or hub dataset; tokenized once as a whole.
        against: the base model to compare with, on the same tokens.
        windows: how many windows from the text's start; None: all whole ones.
        length: tokens in a window; None: 2048 or the model's limit.
        bos: start each window with BOS.
        dtype: what to compute in; float32 keeps rounding out of small divergences.
        keep_base: a folder for what the base made of the text; None: it is not kept.
        on_progress: told (blocks done, blocks in all).

    Raises:
        ValueError: a text too short, a window longer than the model's limit, or another vocabulary than the base's.
    """
    started = time.perf_counter()
    tokens = _windows(model, text, windows, length, bos)
    _check_base(model, against, tokens.shape[1])
    tally, held = _run(model, against, tokens, dtype, _kept(against, tokens, dtype, keep_base), on_progress)
    return Measurement(
        model=model.source.label,
        against=None if against is None else against.source.label,
        text=Path(text).name,
        text_sha256=hashlib.sha256(read_text(text).encode()).hexdigest(),
        windows=tokens.shape[0],
        length=tokens.shape[1],
        bos=bos,
        dtype=str(dtype).removeprefix("torch."),
        num_tokens=tokens[:, 1:].numel(),
        perplexity=tally.perplexity(),
        nbytes=model.nbytes,
        bits_per_weight=model.bits_per_weight,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_resident_bytes(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        decoct=__version__,
        protocol=_protocol(text, tokens, bos) + _words(model),
        cache=model.cache and model.cache["policy"],
        cache_bits=held.bits,
        cache_token_bytes=held.token_bytes(model.dtype),
        **_beside(against, tally),
    )


def _beside(against: Model | None, tally: Tally) -> dict[str, Any]:
    """What there is to say beside a base model."""
    if against is None:
        return {}
    kl = tally.kl()
    return {
        "base_perplexity": tally.base_perplexity(),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(torch.quantile(kl, 0.99)),
        "kl_p999": float(torch.quantile(kl, 0.999)),
        "top1_agreement": tally.top1_agreement(),
        "base_nbytes": against.nbytes,
        "base_bits_per_weight": against.bits_per_weight,
    }


def _kept(
    against: Model | None, tokens: Int[Tensor, "windows length"], dtype: torch.dtype, folder: Path | None
) -> BaseStates | None:
    """Where the base's hidden states are kept, if they are."""
    return None if against is None or folder is None else BaseStates.of(against, tokens, dtype, folder)


def _check_base(model: Model, against: Model | None, length: int) -> None:
    """Refuse a base that cannot be run on the same windows."""
    if against is None:
        return
    limit = against.max_length
    if limit is not None and length > limit:
        raise ValueError(f"{against.source.label} has a limit of {limit} tokens; give --length {limit} or less")
    if against.shape(against.family.embed)[0] != model.shape(model.family.embed)[0]:
        raise ValueError(
            f"{model.source.label} and {against.source.label} have different vocabularies; KL needs the same"
        )


def append_measurement(path: Path, measurement: Measurement) -> None:
    """Add a line of JSON to a file of measurements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(asdict(measurement)) + "\n")


def _windows(
    model: Model, text: str, windows: int | None, length: int | None, bos: bool
) -> Int[Tensor, "windows length"]:
    limit = model.max_length or 2048
    size = min(2048, limit) if length is None else length
    if not 2 <= size <= limit:
        raise ValueError(f"length {size} must lie between 2 and the model's limit of {limit} tokens")
    step = size - 1 if bos else size
    tokens = text_tokens(text, model)
    most = len(tokens) // step
    count = most if windows is None else windows
    if most < 1:
        raise ValueError(f"{text} has {len(tokens)} tokens; give a text of at least {step}, or a smaller --length")
    if count < 1 or count > most:
        raise ValueError(f"{text} has {len(tokens)} tokens: at most {most} windows of {size}, not {count}")
    cut = tokens[: count * step].reshape(count, step)
    if not bos:
        return cut
    token = model.config.get("bos_token_id")
    if token is None:
        raise ValueError(f"{model.source.label} has no BOS token; leave --bos away")
    return torch.cat([torch.full((count, 1), int(token)), cut], dim=1)


@dataclass(slots=True)
class _Held:
    """What the measured model's cache holds at the end of a window, all blocks together.

    Attributes:
        num_tokens: of the window.
        num_values: keys and values, packed or not.
        num_packed_values: those that are packed.
        packed_nbytes: what these take.
    """

    num_tokens: int = 0
    num_values: int = 0
    num_packed_values: int = 0
    packed_nbytes: int = 0

    def add(self, cache: WholeWindow, num_sequences: int, length: int) -> None:
        """A block's, after it ran on so many sequences."""
        values = cache.num_values // num_sequences
        self.num_tokens = length
        self.num_values += values
        self.num_packed_values += values * cache.num_packed // length
        self.packed_nbytes += cache.nbytes // num_sequences

    @property
    def bits(self) -> float | None:
        """Of a packed key or value; None: nothing is packed."""
        return 8 * self.packed_nbytes / self.num_packed_values if self.num_packed_values else None

    def token_bytes(self, dtype: torch.dtype) -> float | None:
        """Bytes for each token where the tokens that are not packed are held in `dtype`; None: there is no policy."""
        if self.num_tokens == 0:
            return None
        return (self.packed_nbytes + (self.num_values - self.num_packed_values) * dtype.itemsize) / self.num_tokens


def _protocol(text: str, tokens: Int[Tensor, "windows length"], bos: bool) -> str:
    """What was measured on, in words."""
    (count, size), start = tokens.shape, "BOS" if bos else "no BOS"
    return f"{Path(text).name}, first {count} non-overlapping windows of {size} tokens, {start}"


def _words(model: Model) -> str:
    """The policy for keys and values, and how it was applied, for the protocol."""
    policy = read_policy(model)
    if policy is None:
        return ""
    settings = ", ".join(f"{key} {value}" for key, value in asdict(policy.method).items() if value is not None)
    return f"; keys and values as in decoding token by token with {policy_name(policy.method)} ({settings})"


def _run(
    model: Model,
    against: Model | None,
    tokens: Int[Tensor, "windows length"],
    dtype: torch.dtype,
    kept: BaseStates | None,
    on_progress: OnProgress,
) -> tuple[Tally, _Held]:
    """Every block of both models in turn, then the logits; each with its own policy for keys and values."""
    runners = [Runner(each, dtype) for each in (model, against) if each is not None]
    known = None if kept is None else kept.read()
    running = runners if known is None else runners[:1]
    states = [_embed(runner, tokens) for runner in running]
    caches = [_caches(runner) for runner in running]
    held = _Held()
    depth = max(runner.model.num_blocks for runner in running)
    for block in range(depth):
        for runner, hidden, of_blocks in zip(running, states, caches, strict=True):
            if block < runner.model.num_blocks:
                size = _advance(runner, block, hidden, of_blocks[block])
                if runner.model is model and (cache := of_blocks[block]) is not None:
                    held.add(cache, size, tokens.shape[1])
        on_progress(block + 1, depth)
    if known is not None:
        states.append(known)
    elif kept is not None:
        kept.write(states[1])
    heads = [_head(runner.model).unpack(dtype) for runner in runners]
    tally = Tally()
    rows = max(1, _LOGITS_AT_ONCE // heads[0].shape[0])
    for i, window in enumerate(tokens):
        for start in range(0, len(window) - 1, rows):
            stop = min(start + rows, len(window) - 1)
            logits = [
                runner.logits(hidden[i : i + 1, start:stop], head)[0]
                for runner, hidden, head in zip(runners, states, heads, strict=True)
            ]
            tally.add(logits[0], window[start + 1 : stop + 1], logits[1] if len(logits) > 1 else None)
    return tally, held


def _embed(runner: Runner, tokens: Int[Tensor, "windows length"]) -> Tensor:
    table = runner.model.weight(runner.model.family.embed).unpack(runner.dtype)
    return runner.embed_all(tokens, table)


def _caches(runner: Runner) -> list[WholeWindow | None]:
    """What each block's keys and values go through."""
    policy = read_policy(runner.model)
    if policy is None:
        return [None] * runner.model.num_blocks
    return [WholeWindow(policy.method, place) for place in places(policy, runner.attentions())]


def _advance(runner: Runner, block: int, hidden: Tensor, cache: WholeWindow | None) -> int:
    """Replace hidden states by the block's outputs, in place; gives how many sequences ran at a time."""
    model = runner.model
    weights = {
        model.prefix(block) + slot.name: model.weight(model.prefix(block) + slot.name) for slot in model.block_slots
    }
    laid = runner.lay_out(block, weights)
    size = runner.batch_size(*hidden.shape[:2])
    for start in range(0, hidden.shape[0], size):
        hidden[start : start + size] = runner.run(block, laid, hidden[start : start + size], cache)
    return size


def _head(model: Model) -> Weight:
    return model.weight(model.family.embed if model.tied else model.family.head)
