"""Speed and peak memory of an engine, in turn with a baseline, each in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from statistics import median
from typing import Any

import torch

from decoct.engine.budget import peak_resident_bytes
from decoct.serving.engine import Engine, Timing
from decoct.serving.networks import GPU, check_gpu

BASELINE = "eager"
"""The engine that is only measured against: transformers, everything unpacked to bfloat16."""

_BASELINES = {GPU: f"{BASELINE}-{GPU}"}
"""For engines that are not measured against the baseline on the CPU."""

_STREAMED = 512 << 20  # bytes, far more than any cache holds
_WARM = (8, 4)  # tokens of a prompt and after it, before anything counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians of several rounds, and the peak memory of the process that ran them.

    Attributes:
        engine: as `--engine` spells it.
        about: one line: what computed.
        decode_tokens_per_second: after the first token, one sequence.
        prefill_tokens_per_second: of the prompt.
        time_to_first_token: seconds.
        peak_memory_bytes: of the process, the interpreter and its libraries included; on a GPU: of what torch
            allocated there.
        loaded_memory_bytes: of the process with its libraries, before a model was loaded; on a GPU: 0.
        weight_nbytes: of the weights that a token passes through.
        rounds: of each kind.
    """

    engine: str
    about: str
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    time_to_first_token: float
    peak_memory_bytes: int
    loaded_memory_bytes: int
    weight_nbytes: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A measurement in turn.

    Attributes:
        model: what was measured.
        speed: of the engine.
        baseline: of bfloat16 in eager transformers; None: left out.
        bandwidth: of this machine's memory, bytes a second, read by as many threads; of the GPU's where one computed.
        threads: that computed.
        prompt_tokens: of each round.
        decode_tokens: of each round.
    """

    model: str
    speed: Speed
    baseline: Speed | None
    bandwidth: float
    threads: int
    prompt_tokens: int
    decode_tokens: int

    @property
    def bandwidth_share(self) -> float:
        """Bytes of weights that decoding read each second, as a fraction of what memory gives."""
        return self.speed.weight_nbytes * self.speed.decode_tokens_per_second / self.bandwidth

    def as_json(self) -> dict[str, Any]:
        """Flat, the engine's own figures first."""
        speed = asdict(self.speed)
        baseline = None if self.baseline is None else asdict(self.baseline)
        ratio = None
        if self.baseline is not None:
            ratio = self.speed.decode_tokens_per_second / self.baseline.decode_tokens_per_second
        return {
            **speed, "threads": self.threads, "model": self.model, "prompt_tokens": self.prompt_tokens,
            "decode_tokens": self.decode_tokens, "bandwidth_bytes_per_second": self.bandwidth,
            "bandwidth_share": self.bandwidth_share, "baseline": baseline, "decode_times_baseline": ratio,
        }  # fmt: skip


def measure_bandwidth(rounds: int = 5, device: str = "cpu") -> float:
    """Bytes a second that memory gives, to as many threads as torch uses on the CPU: the best of some sums."""
    block = torch.ones(_STREAMED // 4, dtype=torch.float32, device=device)
    block.sum().item()
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        block.sum().item()
        best = max(best, block.nbytes / (time.perf_counter() - began))
    return best


def bench(
    model: str,
    *,
    engine: str = "decoct",
    against: str | None = None,
    prompt_tokens: int = 512,
    decode_tokens: int = 64,
    rounds: int = 3,
    on_round: Callable[[int, int], None] = lambda _done, _total: None,
) -> Bench:
    """Measure an engine, and unpacked bfloat16 in eager transformers, in turn: A B A B.

    Args:
        model: folder, .gguf file, or hub id.
        engine: what to measure.
        against: the uncompressed checkpoint for the baseline; None: the model itself, unpacked; "": no baseline.
        prompt_tokens: of each round.
        decode_tokens: of each round, after the first.
        rounds: of each of the two.
        on_round: told (rounds done, rounds in all).

    Raises:
        ValueError: an engine cannot run the model; the process's own line.
    """
    if engine == GPU:
        check_gpu()
    both = [(engine, model)]
    if against != "":
        both.append((_BASELINES.get(engine, BASELINE), against or model))
    speeds = in_turn(both, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, rounds=rounds, on_round=on_round)
    return Bench(
        model=model,
        speed=speeds[0],
        baseline=speeds[1] if len(speeds) > 1 else None,
        bandwidth=measure_bandwidth(device=GPU if engine == GPU else "cpu"),
        threads=torch.get_num_threads(),
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
    )


def in_turn(
    several: Sequence[tuple[str, str]],
    *,
    prompt_tokens: int,
    decode_tokens: int,
    rounds: int,
    on_round: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Speed]:
    """Measure several pairs of engine and model in turn, A B C A B C; all are loaded the whole time.

    Raises:
        ValueError: an engine cannot run its model; the process's own line.
    """
    timings: list[list[Timing]] = [[] for _ in several]
    with _started(several, prompt_tokens + decode_tokens + 1, torch.get_num_threads()) as workers:
        for number in range(rounds * len(several)):
            which = number % len(several)
            timings[which].append(workers[which].time(prompt_tokens, decode_tokens))
            on_round(number + 1, rounds * len(several))
        return [worker.speed(found) for worker, found in zip(workers, timings, strict=True)]


class _Process:
    """An engine in a process of its own: requests and answers are lines of JSON."""

    def __init__(self, engine: str, model: str, context: int, threads: int) -> None:
        code = "from decoct.serving.bench import work; work()"
        settings = json.dumps({"engine": engine, "model": model, "context": context, "threads": threads})
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our own code
            [sys.executable, "-c", code, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._engine = engine
        self._began: dict[str, Any] = {}

    def wait(self) -> None:
        """Until the model is loaded, and warm."""
        self._began = self._read()

    def time(self, prompt_tokens: int, decode_tokens: int) -> Timing:
        """One round."""
        return Timing(**self._ask({"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens}))

    def speed(self, timings: Sequence[Timing]) -> Speed:
        """What came out of the rounds."""
        return Speed(
            engine=self._engine,
            about=self._began["about"],
            decode_tokens_per_second=median(each.decode_tokens / each.decode_seconds for each in timings),
            prefill_tokens_per_second=median(each.prompt_tokens / each.prefill_seconds for each in timings),
            time_to_first_token=median(each.first_token_seconds for each in timings),
            peak_memory_bytes=self._ask({})["peak"],
            loaded_memory_bytes=self._began["before"],
            weight_nbytes=self._began["weight_nbytes"],
            rounds=len(timings),
        )

    def close(self) -> None:
        """End the process."""
        with self._process as process:  # leaving it closes both pipes and waits
            assert process.stdin is not None
            process.stdin.close()

    def _ask(self, value: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(
                f"the engine {self._engine} ended while it was measured (exit code {self._process.wait()})"
            )
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ValueError(found["error"])
        return found


@contextmanager
def _started(several: Sequence[tuple[str, str]], context: int, threads: int) -> Iterator[list[_Process]]:
    workers: list[_Process] = []
    try:
        for engine, model in several:  # one after another: loading all at once would need more memory
            workers.append(_Process(engine, model, context, threads))
            workers[-1].wait()
        yield workers
    finally:
        for worker in workers:
            worker.close()


def work() -> None:
    """A measured process's whole life: load, say so, answer one line for each line, until there are no more."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    try:
        _load_libraries(given["engine"], given["model"])
        before = _peak(given["engine"])
        engine = _open(given["engine"], given["model"], given["context"])
    except ValueError as error:
        _say({"error": str(error)})
        return
    engine.time(*_WARM)
    _say({"about": engine.about, "weight_nbytes": engine.weight_nbytes, "before": before})
    for line in sys.stdin:
        asked = json.loads(line)
        _say(asdict(engine.time(**asked)) if asked else {"peak": _peak(given["engine"])})
    engine.close()


def _load_libraries(engine: str, model: str) -> None:
    """What an engine's code takes, transformers' for the model's family among it, is not what the model takes."""
    if engine == "llama.cpp":
        return
    import_module("decoct.hf")
    if engine.startswith((BASELINE, "decoct")):
        from decoct.engine.runner import Runner
        from decoct.model import open_model

        Runner(open_model(model), torch.bfloat16)


def _open(engine: str, model: str, context: int) -> Engine:
    from decoct.serving.engines import open_engine

    if not engine.startswith(BASELINE):
        return open_engine(engine, model, context=context)
    from decoct.arch.hf import dense_model
    from decoct.engine.data import dense_tensors
    from decoct.hf import TransformersNetwork
    from decoct.model import open_model
    from decoct.serving.network_engine import NetworkEngine

    opened = open_model(model)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in dense_tensors(opened).items()}
    network = dense_model(opened.config, opened.family, tensors).to(GPU if engine.endswith(GPU) else "cpu")
    return NetworkEngine(
        engine, opened, TransformersNetwork(network, opened, "transformers, bfloat16", context=context)
    )


def _peak(engine: str) -> int:
    return torch.cuda.max_memory_allocated() if engine.endswith(GPU) else peak_resident_bytes()


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
