"""What the scripts of other tools share: arguments, the same calibration tokens, timing, peak memory, a dense result.

Every script quantizes each Linear but lm_head, and leaves in OUT_DIR
  dense/       an ordinary bf16 folder whose weights are the quantized-dequantized ones, which any evaluator can read
  result.json  tool, version, settings, seconds and peak memory; the same goes to stdout, the tool's messages to stderr
"seconds" is the tool's own quantizing call alone, model loading and saving left out. "peak_rss_bytes" is the peak of the
whole process up to the end of that call: imports, model and tokenizer included, dense/ not.
"""

import argparse
import contextlib
import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments(about, methods, argv=None):
    """The command line of every script."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--pattern", default="50 %", help="weights to prune: 60 %%, or 2:4 (that survive)")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)  # some tools visit the sequences in random order
    return args


def calibration_tokens(args):
    """The first sequences x length tokens of the file, int64."""
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    ids = tokenizer(args.calibration.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    wanted = args.sequences * args.length
    if len(ids) < wanted:
        raise SystemExit(f"{args.calibration}: {len(ids)} tokens, {wanted} needed")
    return torch.tensor(ids[:wanted]).reshape(args.sequences, args.length)


def load_model(model_dir):
    """In bfloat16 on the CPU."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)


class Timer:
    """Seconds and the process's peak memory at the end of a with block."""

    def __enter__(self):
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = round(time.perf_counter() - self._start, 3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.peak_rss_bytes = peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def save_dense(args, values):
    """Put values, by parameter name, into a plain copy of the model, and save that."""
    plain = load_model(args.model_dir)
    parameters = dict(plain.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value.to(torch.bfloat16))
    plain.save_pretrained(args.out_dir / "dense")
    AutoTokenizer.from_pretrained(args.model_dir).save_pretrained(args.out_dir / "dense")


def report(args, tool, package, timer, settings):
    """Write result.json and print it."""
    for other in ("torch", "transformers"):
        settings[other] = importlib.metadata.version(other)
    result = {
        "tool": tool, "version": importlib.metadata.version(package), "method": args.method, "bits": args.bits,
        "group_size": args.group_size, "sequences": args.sequences, "length": args.length, "seconds": timer.seconds,
        "peak_rss_bytes": timer.peak_rss_bytes, "settings": {**settings, "threads": args.threads},
    }  # fmt: skip
    args.out_dir.mkdir(parents=True, exist_ok=True)
    (args.out_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def main(run):
    """Call run() with the tool's own prints on stderr; print its result."""
    with contextlib.redirect_stdout(sys.stderr):
        result = run()
    print(json.dumps(result, indent=2))
