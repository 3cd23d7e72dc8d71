"""Slots that many families have in common."""

from decoct.arch.schema import Config, Norm, Slot, Stream


def pre_norms(_: Config) -> tuple[Norm, ...]:
    """A norm before attention, another before the MLP, the residual stream around both."""
    return Norm("input_layernorm.weight", "attn_in"), Norm("post_attention_layernorm.weight", "mlp_in")


def pre_norm_stream(config: Config) -> Stream:
    """Read through these norms alone."""
    return Stream({norm.writes: norm.name for norm in pre_norms(config)}, final="model.norm.weight")


def post_norm_stream(_: Config) -> Stream:
    """A norm between a sublayer and the residual stream scales single channels of what is added to it.

    Raises:
        ValueError: always.
    """
    raise ValueError("its norms after each sublayer scale what is added to the residual stream, channel by channel")


def attention(prefix: str = "self_attn.", out: str = "o_proj", reads: str = "attn_in") -> tuple[Slot, ...]:
    """Separate query, key and value projections, and the output projection."""
    return (
        Slot(f"{prefix}q_proj.weight", "attn.q", reads, "q"),
        Slot(f"{prefix}k_proj.weight", "attn.k", reads, "k"),
        Slot(f"{prefix}v_proj.weight", "attn.v", reads, "v", carries="attn_mid"),
        Slot(f"{prefix}{out}.weight", "attn.o", "attn_mid", "resid"),
    )


def gated_mlp(reads: str = "mlp_in") -> tuple[Slot, ...]:
    """Gate and up side by side, then down."""
    return (
        Slot("mlp.gate_proj.weight", "mlp.gate", reads, "mlp_mid"),
        Slot("mlp.up_proj.weight", "mlp.up", reads, "mlp_mid", carries="mlp_mid"),
        Slot("mlp.down_proj.weight", "mlp.down", "mlp_mid", "resid"),
    )


def experts(prefix: str, names: tuple[str, str, str], count: int) -> tuple[Slot, ...]:
    """Every expert's gate, up and down; transformers keeps all of a layer's experts in two fused tensors.

    Args:
        prefix: path of the experts in the checkpoint, e.g. "mlp.experts.".
        names: the checkpoint's names of gate, up and down.
        count: number of experts.
    """
    gate, up, down = names
    found: list[Slot] = []
    for e in range(count):
        reads, mid = f"expert.{e}.in", f"expert.{e}.mid"
        fused, final = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
        found += [
            Slot(f"{prefix}{e}.{gate}.weight", "moe.gate", reads, mid, param=fused, expert=e, half=0),
            Slot(f"{prefix}{e}.{up}.weight", "moe.up", reads, mid, param=fused, expert=e, half=1, carries=mid),
            Slot(f"{prefix}{e}.{down}.weight", "moe.down", mid, "resid", param=final, expert=e),
        ]
    return tuple(found)


def llama_like(_: Config) -> tuple[Slot, ...]:
    """Llama, Mistral, Qwen2, Qwen3, Gemma: attention then gated MLP."""
    return attention() + gated_mlp()
