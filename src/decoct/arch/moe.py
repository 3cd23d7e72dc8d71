"""Mixtral and Qwen3-MoE: each expert's matrices are slots of their own, the router is protected."""

from dataclasses import replace

from decoct.arch.parts import attention, experts, gated_mlp, pre_norm_stream, pre_norms
from decoct.arch.schema import Config, Family, Norm, Slot, Stream


def _mixtral(config: Config) -> tuple[Slot, ...]:
    router = Slot("block_sparse_moe.gate.weight", "moe.router", "mlp_in", "routing", protected=True)
    names = ("w1", "w3", "w2")
    return (*attention(), router, *experts("block_sparse_moe.experts.", names, _num_experts(config)))


def _qwen3_moe(config: Config) -> tuple[Slot, ...]:
    """Every layer is sparse, as in all published checkpoints; a config with dense layers is refused."""
    if config.get("mlp_only_layers") or int(config.get("decoder_sparse_step", 1)) != 1:
        raise ValueError("qwen3_moe with dense MLP layers (mlp_only_layers, decoder_sparse_step) is not supported")
    count = _num_experts(config)
    if count == 0:
        return attention() + gated_mlp()
    router = Slot("mlp.gate.weight", "moe.router", "mlp_in", "routing", protected=True)
    return (*attention(), router, *experts("mlp.experts.", ("gate_proj", "up_proj", "down_proj"), count))


def _num_experts(config: Config) -> int:
    """Published configs and those that transformers 5 saves spell it differently."""
    return int(config["num_local_experts"] if "num_local_experts" in config else config["num_experts"])


def _first_norm(config: Config) -> tuple[Norm, ...]:
    """Every expert and the router read what the second norm writes: only the first can take over scales."""
    return pre_norms(config)[:1]


def _stream(config: Config) -> Stream:
    """Every expert reads it through the norm that the router reads it through."""
    plain = pre_norm_stream(config)
    through = {f"expert.{expert}.in": plain.norms["mlp_in"] for expert in range(_num_experts(config))}
    return replace(plain, norms={**plain.norms, **through})


MIXTRAL = Family("mixtral", ("mixtral",), _mixtral, _first_norm, _stream, renames=((".block_sparse_moe.", ".mlp."),))
QWEN3_MOE = Family("qwen3_moe", ("qwen3_moe",), _qwen3_moe, _first_norm, _stream)
