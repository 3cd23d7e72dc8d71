"""GPT-2, OPT and GPT-NeoX: LayerNorm, biases, an MLP without a gate."""

from decoct.arch.parts import attention, post_norm_stream, pre_norms
from decoct.arch.schema import Config, Family, Norm, Slot, Stream


def _gpt2(_: Config) -> tuple[Slot, ...]:
    """GPT-2 stores its matrices [in, out] (Conv1D)."""
    return (
        Slot("attn.c_attn.weight", "attn.qkv", "attn_in", "qkv", transposed=True),
        Slot("attn.c_proj.weight", "attn.o", "attn_mid", "resid", transposed=True),
        Slot("mlp.c_fc.weight", "mlp.up", "mlp_in", "mlp_mid", transposed=True),
        Slot("mlp.c_proj.weight", "mlp.down", "mlp_mid", "resid", transposed=True),
    )


def _opt(_: Config) -> tuple[Slot, ...]:
    return (
        *attention(out="out_proj"),
        Slot("fc1.weight", "mlp.up", "mlp_in", "mlp_mid"),
        Slot("fc2.weight", "mlp.down", "mlp_mid", "resid"),
    )


def _opt_norms(config: Config) -> tuple[Norm, ...]:
    """The smallest OPT but one normalises after each sublayer: there a gain writes the residual stream itself."""
    if not config.get("do_layer_norm_before", True):
        return ()
    return Norm("self_attn_layer_norm.weight", "attn_in"), Norm("final_layer_norm.weight", "mlp_in")


def _gpt_neox(_: Config) -> tuple[Slot, ...]:
    return (
        Slot("attention.query_key_value.weight", "attn.qkv", "attn_in", "qkv"),
        Slot("attention.dense.weight", "attn.o", "attn_mid", "resid"),
        Slot("mlp.dense_h_to_4h.weight", "mlp.up", "mlp_in", "mlp_mid"),
        Slot("mlp.dense_4h_to_h.weight", "mlp.down", "mlp_mid", "resid"),
    )


def _gpt2_norms(_: Config) -> tuple[Norm, ...]:
    return Norm("ln_1.weight", "attn_in"), Norm("ln_2.weight", "mlp_in")


def _gpt2_stream(config: Config) -> Stream:
    return Stream(_by_edge(_gpt2_norms(config)), "transformer.ln_f.weight", True, ("transformer.wpe.weight",))


def _opt_stream(config: Config) -> Stream:
    norms = _by_edge(_opt_norms(config))
    if not norms:
        return post_norm_stream(config)
    if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
        raise ValueError("its embedding is projected to another width on its way into the residual stream")
    return Stream(norms, "model.decoder.final_layer_norm.weight", True, ("model.decoder.embed_positions.weight",))


def _gpt_neox_stream(config: Config) -> Stream:
    return Stream(_by_edge(pre_norms(config)), "gpt_neox.final_layer_norm.weight", True)


def _by_edge(norms: tuple[Norm, ...]) -> dict[str, str]:
    return {norm.writes: norm.name for norm in norms}


GPT2 = Family(
    "gpt2",
    ("gpt2",),
    _gpt2,
    _gpt2_norms,
    _gpt2_stream,
    blocks="transformer.h",
    embed="transformer.wte.weight",
    num_blocks_key="n_layer",
    base_prefix="transformer.",
)
OPT = Family(
    "opt",
    ("opt",),
    _opt,
    _opt_norms,
    _opt_stream,
    blocks="model.decoder.layers",
    embed="model.decoder.embed_tokens.weight",
)
GPT_NEOX = Family(
    "gpt_neox",
    ("gpt_neox",),
    _gpt_neox,
    pre_norms,
    _gpt_neox_stream,
    blocks="gpt_neox.layers",
    embed="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    renames=(("embed_out.", "lm_head."),),
    base_prefix="gpt_neox.",
    parallel=lambda config: bool(config.get("use_parallel_residual", True)),
)
