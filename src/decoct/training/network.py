"""The student: a model's forward pass whose matrices are views; and the teacher, unpacked once and for all."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from decoct.arch.hf import CacheLike
from decoct.engine.runner import LaidOut, Runner, products_of
from decoct.losses import Batch, Head, Projected, Targets
from decoct.methods.policy import Policy
from decoct.model import Model
from decoct.runtime.cache import places
from decoct.training.inside import Insides, Noting, Place, Seen
from decoct.training.keep import StraightThrough
from decoct.training.objective import Objective
from decoct.training.views import AnyView, Rounding, Vector, View
from decoct.training.views.rounding import in_dtype


class Named(nn.Module):
    """Views or vectors by the checkpoint's names, which a module's children cannot have: they hold dots."""

    def __init__(self, members: Mapping[str, AnyView] | Mapping[str, Vector]) -> None:
        super().__init__()
        self.names = tuple(members)
        self.members = nn.ModuleList(members.values())

    @override
    def forward(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All of them, in `dtype`."""
        with torch.autocast("cpu", enabled=False):  # they are made of their parts as without training
            return {name: member(dtype) for name, member in zip(self.names, self.members, strict=True)}


class TrainedBlock(nn.Module):
    """One block: views of its matrices and vectors, and transformers' module to run them."""

    def __init__(
        self,
        runner: Runner,
        noting: Noting,
        block: int,
        views: Mapping[str, AnyView],
        vectors: Mapping[str, Vector],
        dtype: torch.dtype,
        cache: CacheLike | None,
    ) -> None:
        super().__init__()
        self._runner, self._noting, self._block, self._dtype = runner, noting, block, dtype
        self._cache = cache
        self.matrices = Named({name: view for name, view in views.items() if isinstance(view, View)})
        self._rounding = {name: view for name, view in views.items() if isinstance(view, Rounding)}
        self.rounding = nn.ModuleList(self._rounding.values())
        self.vectors = Named(vectors)
        model = runner.model
        self._fixed = {name: model.tensor(name).float() for name in model.others(block) if name not in vectors}

    @override
    def forward(self, hidden: Float[Tensor, "batch seq hidden"]) -> tuple[Tensor, ...]:
        """The block's output, and what is wanted of its inside."""
        given = {**self.matrices(self._dtype), **self.vectors(torch.float32), **self._fixed}
        with torch.autocast("cpu", enabled=False):
            products = {name: view.product(self._dtype) for name, view in self._rounding.items()}
        laid = self._runner.lay_out_given(self._block, given, products)
        return self._noting.run(self._block, laid, hidden, self._cache)


class Student(nn.Module):
    """A model that is trained.

    Matrices are unpacked in the compute dtype, hidden states and norms stay in float32, and products run in the compute
    dtype (autocast). Where blocks are recomputed, only what enters each is kept for the gradient.

    Attributes:
        views: of every matrix, by full name.
        vectors: other tensors that are trained, by full name.
    """

    def __init__(
        self,
        model: Model,
        views: Mapping[str, AnyView],
        vectors: Mapping[str, Vector],
        dtype: torch.dtype,
        *,
        recompute: bool,
        insides: Insides | None = None,
        policy: Policy | None = None,
    ) -> None:
        """Lay out a model.

        Args:
            model: as it is stored.
            views: of every matrix, by full name.
            vectors: those other tensors that are trained, by full name.
            dtype: what products are computed in.
            recompute: run each block again for its gradient instead of keeping what it computed.
            insides: losses on inner states.
            policy: how keys and values are rounded.
        """
        super().__init__()
        self.model, self.views, self.vectors = model, dict(views), dict(vectors)
        self._dtype, self._recompute = dtype, recompute
        self._runner = Runner(model, torch.float32)
        self.insides = insides
        noting = Noting(self._runner, () if insides is None else insides.student_wants)
        self._noting = noting
        kept = [] if policy is None else places(policy, self._runner.attentions())
        self.blocks = nn.ModuleList()
        for block in range(model.num_blocks):
            names = [model.prefix(block) + slot.name for slot in model.block_slots]
            inside = {name: vectors[name] for name in model.others(block) if name in vectors}
            cache = StraightThrough(policy.method, kept[block]) if policy is not None else None
            matrices = {name: views[name] for name in names}
            self.blocks.append(TrainedBlock(self._runner, noting, block, matrices, inside, dtype, cache))
        self.ends = Named({slot.name: views[slot.name] for slot in model.end_slots})
        self.outside = Named({name: vectors[name] for name in model.others(None) if name in vectors})

    @override
    def forward(
        self, tokens: Int[Tensor, "batch seq"], objective: Objective, taught: Seen | None, batch: Batch
    ) -> Float[Tensor, ""]:
        """The loss of a batch, given what a teacher made of it."""
        seen = self.seen(tokens, objective.exit_blocks(self.model.num_blocks))
        own, wanted = seen.predictions, None if taught is None else taught.predictions
        assert isinstance(own, Projected)
        loss = objective(own, wanted, batch, seen.exits)
        if self.insides is None or taught is None:
            return loss
        inner: Tensor = self.insides(seen.inside, taught.inside, batch.weights.reshape(tokens.shape))
        return loss + inner

    def seen(self, tokens: Int[Tensor, "batch seq"], exits: Sequence[int] = ()) -> Seen:
        """What it makes of a batch; predictions also behind the blocks whose numbers are given."""
        inside: dict[Place, Tensor] = {}
        finals: dict[int, Tensor] = {}
        with autocast(self._dtype):
            ends, others = self.ends(self._dtype), self.outside(torch.float32)
            hidden = self._runner.embed(tokens, ends[self.model.family.embed], others).float()
            for number, block in enumerate(self.blocks):
                if self._recompute and torch.is_grad_enabled():
                    hidden, *noted = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)
                else:
                    hidden, *noted = block(hidden)
                inside |= {(number, what): each for what, each in zip(self._noting.wants(number), noted, strict=True)}
                if number in exits or number == len(self.blocks) - 1:
                    finals[number] = self._runner.final(hidden, others)
        head = head_of(self.model, ends[self.model.end_slots[-1].name])
        behind = {number: Projected(final.flatten(0, 1), head) for number, final in finals.items()}
        return Seen(behind[len(self.blocks) - 1], inside, behind)


class Teacher:
    """A model whose predictions are wanted; its matrices are unpacked once, in the compute dtype."""

    def __init__(self, model: Model, dtype: torch.dtype, wants: Iterable[Place] = ()) -> None:
        """Unpack a model.

        Args:
            model: as it is stored.
            dtype: what products are computed in.
            wants: what is wanted of its inside.
        """
        self._model, self._dtype = model, dtype
        self._runner = Runner(model, torch.float32)
        self._noting = Noting(self._runner, wants)
        self._ends = {slot.name: model.weight(slot.name).unpack(dtype) for slot in model.end_slots}
        self._blocks = [self._laid_out(block) for block in range(model.num_blocks)]

    def targets(self, tokens: Int[Tensor, "batch seq"]) -> Targets:
        """What it predicts for each token."""
        return self.seen(tokens).predictions

    @torch.no_grad()
    def seen(self, tokens: Int[Tensor, "batch seq"]) -> Seen:
        """What it predicts, and what is wanted of its inside."""
        inside: dict[Place, Tensor] = {}
        with autocast(self._dtype):
            hidden = self._runner.embed(tokens, self._ends[self._model.family.embed]).float()
            for block, laid in enumerate(self._blocks):
                hidden, *noted = self._noting.run(block, laid, hidden)
                inside |= {(block, what): each for what, each in zip(self._noting.wants(block), noted, strict=True)}
            final = self._runner.final(hidden)
        head = head_of(self._model, self._ends[self._model.end_slots[-1].name])
        return Seen(Projected(final.flatten(0, 1), head), inside)

    def _laid_out(self, block: int) -> LaidOut:
        model = self._model
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        weights = {name: model.weight(name) for name in names}
        products = {name: in_dtype(each, self._dtype) for name, each in products_of(weights, self._dtype).items()}
        given = {name: weight.unpack(self._dtype) for name, weight in weights.items() if name not in products}
        given |= {name: model.tensor(name).float() for name in model.others(block)}
        return self._runner.lay_out_given(block, given, products)


def head_of(model: Model, matrix: Float[Tensor, "vocab hidden"]) -> Head:
    """What makes logits of final hidden states."""
    cap = model.config.get("final_logit_softcapping")
    return Head(matrix, softcap=None if cap is None else float(cap))


def autocast(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Products in this dtype; nothing to do for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
