"""`decoct bench`: how fast a checkpoint runs here, and in how much memory."""

from typing import TYPE_CHECKING, Annotated

import typer

from decoct.commands.common import JsonOption, ModelArgument, answer, errors
from decoct.commands.options import EngineOption
from decoct.console import Console

if TYPE_CHECKING:
    from decoct.serving.bench import Bench, Speed


def bench(
    model: ModelArgument,
    engine: EngineOption = "decoct",
    against: Annotated[
        str | None, typer.Option("--against", metavar="BASE", help="The uncompressed model (MODEL, unpacked).")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Measure unpacked bfloat16 in eager transformers in turn.")] = True,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Of each round.")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Written in each round.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of each; medians are shown.")] = 3,
    json: JsonOption = False,
) -> None:
    """Measure decoding, prefill, time to the first token and peak memory, in turn with bfloat16 in transformers."""
    with errors(json=json):
        from decoct.serving.bench import bench as measure
        from decoct.serving.engines import check_engine

        check_engine(engine)
        with Console.for_stderr().counter("round") as on_round:
            found = measure(
                model, engine=engine, against=against if baseline else "", prompt_tokens=prompt_tokens,
                decode_tokens=tokens, rounds=rounds, on_round=on_round,
            )  # fmt: skip
        answer(json=json, value=found.as_json(), show=lambda console: _show(console, found))


def _show(console: Console, found: "Bench") -> None:
    shown = [found.speed] if found.baseline is None else [found.speed, found.baseline]
    for each in shown:
        console.line(f"{each.engine}: {_line(each)}")
        console.line(f"    {each.about}")
    if found.baseline is not None:
        times = found.speed.decode_tokens_per_second / found.baseline.decode_tokens_per_second
        console.line(f"decoding {times:.2f} times as fast as bfloat16 in eager transformers")
    share = f"decoding reads {100 * found.bandwidth_share:.1f} % of that in weights"
    console.line(f"memory gives {found.bandwidth / 1e9:.1f} GB/s; {share}")
    console.line(
        f"medians of {found.speed.rounds} rounds, {found.prompt_tokens} tokens of prompt, "
        f"{found.decode_tokens} written, one sequence, {found.threads} threads"
    )


def _line(speed: "Speed") -> str:
    return (
        f"{speed.decode_tokens_per_second:.1f} tokens/s, prefill {speed.prefill_tokens_per_second:.0f} tokens/s, "
        f"first token after {speed.time_to_first_token:.3f} s, peak memory {speed.peak_memory_bytes / 2**20:.1f} MiB"
    )
