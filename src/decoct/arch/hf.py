"""The only door to transformers' modules: a skeleton without weights, through which blocks run one at a time.

Parameters live on the meta device; every call gets its tensors by name (`torch.func.functional_call`), so the
mathematics of an architecture is transformers' own and a model of any size costs a few megabytes here.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from decoct.arch.attention import use_compiled_attention
from decoct.arch.schema import Config, Family, Slot

Tensors = Mapping[str, Tensor]

Product = Callable[[Tensor], Tensor]
"""What takes the place of x·Wᵀ in a linear layer, before the bias is added."""

Products = Mapping[str, Product]
"""By a linear layer's path in its block."""


_POSITIONS = 512  # whose rotary embeddings are computed at once


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to one block beside the hidden states: masks, position embeddings and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Attention:
    """What a key-value cache has to know about one block's attention.

    Attributes:
        sliding_window: tokens that it looks back, the current one included; None: all.
        frequencies: of the rotary position embedding, radians a token, one for each pair of channels that is turned
            (channels i and i + pairs); None: there is none.
    """

    sliding_window: int | None
    frequencies: Float[Tensor, " pairs"] | None


class CacheLike(Protocol):
    """What takes the place of transformers' cache while a block runs on whole sequences."""

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, given all of the sequences' own [batch, heads, tokens, channels]."""

    def mask(self, given: Tensor | None, num_tokens: int) -> Tensor | None:
        """The mask that goes with them, given the model's own [batch, 1, tokens, tokens]; None: plainly causal."""


@dataclass
class _Tape:
    """What the relays saw, and what the last of them should answer instead of its input."""

    calls: list[BlockCall] = field(default_factory=list)
    first_hidden: Tensor | None = None
    injected: Tensor | None = None


class _Relay(nn.Module):
    """Stands where a block stands: notes how it was called and passes the hidden states on."""

    def __init__(self, tape: _Tape, *, last: bool) -> None:
        super().__init__()
        self._tape, self._last = tape, last

    @override
    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        tape = self._tape
        if not tape.calls:
            tape.first_hidden = hidden
        tape.calls.append(BlockCall(args, kwargs))
        return tape.injected if self._last and tape.injected is not None else hidden


class Skeleton:
    """A causal language model of transformers, without weights.

    Attributes:
        blocks: the real blocks, on the meta device.
    """

    def __init__(self, config: Config, family: Family) -> None:
        """Build from a config.json.

        Raises:
            ValueError: transformers does not accept the config.
        """
        self.family = family
        self._model = _empty_model(config)
        use_compiled_attention(self._model)
        layers = self._model.get_submodule(family.blocks)
        assert isinstance(layers, nn.ModuleList)
        self.blocks: list[nn.Module] = list(layers)
        self._tape = _Tape()
        for i in range(len(layers)):
            layers[i] = _Relay(self._tape, last=i == len(layers) - 1)
        self._base_prefix = f"{self._model.base_model_prefix}."
        self._hidden_size = int(self._model.get_input_embeddings().weight.shape[1])

    def embed(self, tokens: Int[Tensor, "batch seq"], rest: Tensors) -> Float[Tensor, "batch seq hidden"]:
        """Hidden states that enter the first block. `rest`: the tensors outside the blocks, by module name."""
        self._run_base(rest, {"input_ids": tokens})
        hidden = self._tape.first_hidden
        assert hidden is not None
        return hidden

    def block_calls(self, shape: tuple[int, int], dtype: torch.dtype, rest: Tensors) -> list[BlockCall]:
        """How the model calls each of its blocks on a batch of `shape` (sequences, tokens) without padding."""
        embeds = torch.zeros(*shape, self._hidden_size, dtype=dtype)
        self._run_base(rest, {"inputs_embeds": embeds})
        return self._tape.calls

    def rotations(self, length: int, dtype: torch.dtype, rest: Tensors) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines [length, channels] of each block's rotary embedding, from position 0 on.

        Blocks of one kind share their tensors. Not for models whose angles depend on how long a text is.
        """
        pieces: list[list[tuple[Tensor, Tensor]]] = []
        for start in range(0, length, _POSITIONS):
            positions = torch.arange(start, min(start + _POSITIONS, length)).unsqueeze(0)
            embeds = torch.zeros(1, positions.shape[1], self._hidden_size, dtype=dtype)
            self._run_base(rest, {"inputs_embeds": embeds, "position_ids": positions})
            pieces.append([call.kwargs["position_embeddings"] for call in self._tape.calls])
        joined: dict[int, tuple[Tensor, Tensor]] = {}
        found = []
        for block, (first, _) in enumerate(pieces[0]):
            if id(first) not in joined:
                cosines, sines = zip(*(piece[block] for piece in pieces), strict=True)
                joined[id(first)] = (torch.cat(cosines, 1)[0], torch.cat(sines, 1)[0])
            found.append(joined[id(first)])
        return found

    def attentions(self, rest: Tensors) -> list[Attention]:
        """What each block's attention looks at. `rest`: the tensors outside the blocks, by module name."""
        from transformers import DynamicCache

        layers = DynamicCache(config=self._model.config).layers
        found = []
        exact = {name: tensor.float() for name, tensor in rest.items()}
        for layer, call in zip(layers, self.block_calls((1, 2), torch.float32, exact), strict=True):
            turned = call.kwargs.get("position_embeddings")
            pairs = None if turned is None else turned[0].shape[-1] // 2
            frequencies = None if turned is None else torch.atan2(turned[1], turned[0])[0, 1, :pairs]
            found.append(Attention(layer.sliding_window if layer.is_sliding else None, frequencies))
        return found

    def run_block(
        self,
        index: int,
        tensors: Tensors,
        hidden: Float[Tensor, "batch seq hidden"],
        call: BlockCall,
        cache: CacheLike | None = None,
        products: Products | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """One block's output.

        Args:
            index: the block's number.
            tensors: its parameters, by name within the block; not the matrices of layers that have a product.
            hidden: what enters it.
            call: how the model calls it.
            cache: what keys and values go through; None: attention uses them as they are.
            products: of layers that do more than multiply their input with a matrix.
        """
        block = self.blocks[index]
        args, kwargs = (hidden, *call.args), call.kwargs
        if cache is not None:
            bound = inspect.signature(block.forward).bind(*args, **kwargs)
            name = "layer_past" if "layer_past" in bound.signature.parameters else "past_key_values"
            bound.arguments[name] = cache
            mask = bound.arguments.get("attention_mask")
            bound.arguments["attention_mask"] = cache.mask(mask, hidden.shape[1])
            args, kwargs = bound.args, bound.kwargs
        with _other_products(block, products or {}):
            out = functional_call(block, dict(tensors), args, kwargs)
        return cast("Tensor", out[0] if isinstance(out, tuple) else out)

    def head(self, hidden: Float[Tensor, "batch seq hidden"], rest: Tensors) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the last block's output: final norm, projection, soft caps as the model has them."""
        self._tape.calls = []  # a new list: the last one may be in a caller's hands
        self._tape.injected = hidden
        try:
            inputs = {"inputs_embeds": hidden, "use_cache": False}
            out = functional_call(self._model, dict(rest), (), inputs)
        finally:
            self._tape.injected = None
        return cast("Tensor", out.logits)

    def final(self, hidden: Float[Tensor, "batch seq hidden"], rest: Tensors) -> Float[Tensor, "batch seq final"]:
        """What the output projection reads: the last block's output after the final norm."""
        self._tape.injected = hidden
        try:
            out = self._run_base(rest, {"inputs_embeds": hidden})
        finally:
            self._tape.injected = None
        return cast("Tensor", out[0])

    def head_module(self) -> nn.Module:
        """The output projection, whose input is the edge "final"."""
        path = self.family.module_name(self.family.head).removesuffix(".weight")
        return cast("nn.Module", self._model.get_submodule(path))

    def keep_attention(self) -> None:
        """Have attention computed so that its probabilities are there: an attention module's second output."""
        self._model.set_attn_implementation("eager")

    def block_parameters(self, index: int) -> set[str]:
        """Names of the parameters that `run_block` needs."""
        return {name for name, _ in self.blocks[index].named_parameters()}

    def _run_base(self, rest: Tensors, inputs: dict[str, Tensor]) -> Any:
        self._tape.calls = []
        base = {name.removeprefix(self._base_prefix): t for name, t in rest.items()}
        return functional_call(self._model.base_model, base, (), {**inputs, "use_cache": False})


@contextmanager
def _other_products(block: nn.Module, products: Products) -> Iterator[None]:
    """While the body runs, these linear layers compute another product, and add their bias to it.

    A layer's own `forward` is covered by one on the instance, so hooks on the layer go on seeing its input as it came.
    """
    layers = [(block.get_submodule(path), product) for path, product in products.items()]
    try:
        for layer, product in layers:
            layer.forward = partial(_with_bias, layer, product)
        yield
    finally:
        for layer, _ in layers:
            layer.__dict__.pop("forward", None)


def _with_bias(layer: nn.Module, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    bias = cast("Tensor | None", layer.bias)  # looked up now: functional_call has put the real one in its place
    return product(x) if bias is None else product(x) + bias


def layer_settings(config: Config, num_blocks: int) -> dict[str, list[Any]]:
    """Settings that a model has for each of its blocks (which of them look back how far, say), one entry a block.

    Transformers derives some of them from a block's number where the config does not list them.
    """
    return {
        key: value
        for key, value in all_settings(config).items()
        if "layer" in key and isinstance(value, list) and len(value) == num_blocks
    }


def all_settings(config: Config) -> dict[str, Any]:
    """Every setting that transformers knows for a config, those included that the config leaves out."""
    return dict(_hf_config(config).to_dict())


def _hf_config(config: Config) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    settings = {k: v for k, v in config.items() if k not in {"quantization_config", "model_type"}}
    try:
        return AutoConfig.for_model(config["model_type"], **settings)
    except StrictDataclassError as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ").rstrip(".")
        raise ValueError(f"transformers refuses the config: {reason}") from None


def _empty_model(config: Config) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about generation settings; nothing is generated from a skeleton
        hf_config = _hf_config(config)
        hf_config._experts_implementation = "eager"  # noqa: SLF001 - one expert after another, on any device
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(hf_config)
    return model.eval()


def module_tensors(family: Family, prefix: str, slots: tuple[Slot, ...], tensors: Tensors) -> dict[str, Tensor]:
    """Lay a block's tensors out as transformers' module has them: renamed, transposed, experts fused.

    Args:
        family: the table.
        prefix: the block's path with a trailing dot; stripped from the result.
        slots: the block's slots.
        tensors: by checkpoint name relative to the block; slots as [out, in].
    """
    by_name = {slot.name: slot for slot in slots}
    fused: dict[str, dict[int, dict[int, Tensor]]] = {}
    laid: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        slot = by_name.get(name)
        if slot is not None and slot.param is not None and slot.expert is not None:
            fused.setdefault(slot.param, {}).setdefault(slot.expert, {})[slot.half or 0] = tensor
            continue
        target = family.module_name(prefix + name).removeprefix(prefix)
        laid[target] = tensor.T if slot is not None and slot.transposed else tensor
    for param, experts in fused.items():
        rows = [torch.cat([halves[h] for h in sorted(halves)]) for _, halves in sorted(experts.items())]
        laid[param] = torch.stack(rows)
    return laid


def expert_inputs(
    experts: nn.Module, arguments: tuple[Tensor, ...], expert: int
) -> tuple[Float[Tensor, "tokens in"], Float[Tensor, "tokens mid"]]:
    """What one expert's gate/up and down projections read, recomputed from a call of the fused experts module.

    Args:
        experts: the module, with its real tensors in place.
        arguments: its call's (hidden states, chosen experts, their weights).
        expert: which one.
    """
    hidden, chosen = arguments[0], arguments[1]
    x = hidden[(chosen == expert).any(-1)]
    return x, _middle(experts, x, expert)


def expert_answers(experts: nn.Module, hidden: Float[Tensor, "tokens in"], expert: int) -> Float[Tensor, "tokens in"]:
    """What one expert of the fused experts module, its real tensors in place, answers to these tokens, ungated."""
    down = cast("Tensor", experts.down_proj)[expert]
    return nn.functional.linear(_middle(experts, hidden, expert), down)


def _middle(experts: nn.Module, x: Float[Tensor, "tokens in"], expert: int) -> Float[Tensor, "tokens mid"]:
    gate_up = cast("Tensor", experts.gate_up_proj)[expert]
    gate, up = nn.functional.linear(x, gate_up).chunk(2, dim=-1)
    activation = cast("nn.Module", experts.act_fn)
    return cast("Tensor", activation(gate) * up)


def dense_model(config: Config, family: Family, tensors: Tensors) -> Any:
    """Transformers' own model holding these tensors (checkpoint names), whole and in memory: to generate text with."""
    from transformers import GenerationConfig

    model = _empty_model(config)
    laid: dict[str, Tensor] = {}
    for block in range(family.num_blocks(config)):
        prefix = f"{family.blocks}.{block}."
        mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        untransposed = tuple(replace(slot, transposed=False) for slot in family.slots(config))
        found = module_tensors(family, prefix, untransposed, mine)
        laid.update({prefix + name: tensor for name, tensor in found.items()})
    outside = {name: t for name, t in tensors.items() if not name.startswith(f"{family.blocks}.")}
    laid.update({family.module_name(name): tensor for name, tensor in outside.items()})
    model.load_state_dict(laid, strict=False, assign=True)
    model.tie_weights()
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise ValueError(f"the checkpoint lacks the tensor {lacking[0]}")
    model.generation_config = GenerationConfig()
    return model
