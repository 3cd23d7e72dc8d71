"""Adapters that were trained elsewhere: LoRA's low-rank terms (arXiv 2106.09685), from a folder in peft's format."""

from dataclasses import dataclass

from decoct.methods.base import ModelMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(ModelMethod):
    """Put an adapter's low-rank terms beside a model's matrices, whatever form these have.

    A stage of its own in a recipe. The matrices stay as they are: a quantized one becomes a sum. `distill` with
    `train: [corrections]` trains the terms further, and `decoct export --to peft` writes them back.

    Attributes:
        folder: with adapter_config.json and adapter_model.safetensors.
    """

    folder: str
