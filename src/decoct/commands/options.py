"""Options that the commands share which write text."""

from typing import Annotated

import typer

EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="decoct, decoct-int8 (prompts rounded to 8 bits: read faster), transformers, cuda (transformers on a "
        "GPU), llama.cpp, onnxruntime or openvino.",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", min=2, help="Tokens of prompt and answer together (the model's own, at most 4096)."),
]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="The most tokens to write.")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0, help="0: always the likeliest token; higher: more varied.")
]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Draw from the k likeliest tokens (0: all).")]
TopPOption = Annotated[
    float, typer.Option("--top-p", help="Draw from the likeliest tokens that add up to this (1: all).")
]
MinPOption = Annotated[
    float, typer.Option("--min-p", help="Draw from tokens at least this times as likely as the likeliest (0: all).")
]
PenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: tokens that were there become less likely.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of the draws: the same seed, the same text.")]
StopOption = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End at this text (repeatable).")]
