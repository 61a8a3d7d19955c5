"""The owner's way to the trunk: a module in the first trunk slot that sends hidden states across and takes the output back.

The stub notes what the trunk needs beside hidden states, leaves out what the trunk can tell by itself, and is a node of the
owner's graph only if a gradient must cross: nothing crosses backward where nothing below the cut is trained.

*Reveals.* To the trunk's holder: hidden states at the bottom cut, their gradients' counterpart at the top cut if the bottom
is trained, padding, and positions that do not simply count; all that of the positions that are sent (`models.sent_positions`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veiltune.errors import ProtocolError, UserError
from veiltune.models.cut import Cut, PassThrough, cache_argument, count_positions
from veiltune.models.family import Family
from veiltune.models.sent_positions import PositionChooser, Sent
from veiltune.models.skeleton import blocks_of

Observed = tuple[Tensor, Tensor, Tensor | None]
"""Embeddings, states at the cut (both batch, seq, d) and where tokens are that were sent; ``None``: everywhere."""


@dataclass(frozen=True, slots=True)
class TrunkContext:
    """What the trunk needs beside hidden states.

    Attributes:
        attention_mask: (batch, past + seq), bool, of padding; ``None`` if it is all ones.
        position_ids: (1 or batch, seq); ``None`` where they count on from the past, or the trunk's blocks need none.
        cache_id: the owner's number of a KV cache; 0 for none.
        keep: a backward crossing of this pass will follow.
        input_gradient: the gradient of the hidden states is wanted.
        training: dropout acts.
        starts: the first position of these states is that of its sequences.
    """

    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache_id: int
    keep: bool
    input_gradient: bool
    training: bool
    starts: bool = True


class TrunkPort(Protocol):
    """How hidden states get to the trunk and back."""

    def forward(self, hidden: Float[Tensor, "batch seq d"], context: TrunkContext) -> tuple[int, Tensor]:
        """One crossing of detached states: a ticket for the backward, and the trunk's output (batch, seq, d)."""
        ...

    def backward(self, ticket: int, gradient: Tensor) -> Tensor | None:
        """The gradient of a kept forward's input, from that of its output."""
        ...


class _Crossing(torch.autograd.Function):
    """The trunk as one node of the owner's graph."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, hidden: Tensor, port: TrunkPort, context: TrunkContext
    ) -> Tensor:
        ctx.port, ctx.reference = port, hidden.new_empty(0)
        ctx.ticket, output = port.forward(hidden.detach(), context)
        return _fitting(output, hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        entry = ctx.port.backward(ctx.ticket, gradients[0])
        return (None if entry is None else entry.to(ctx.reference), None, None)


def _fitting(output: Tensor, hidden: Tensor) -> Tensor:
    if output.shape != hidden.shape:
        raise ProtocolError(f"the trunk answered {tuple(hidden.shape)} with {tuple(output.shape)}")
    return output.detach().to(hidden)


class CacheNumbers:
    """Numbers the KV caches that passes are made with, so that the trunk's holder keeps its half of each under that number.

    A cache's half elsewhere cannot follow what is done to the half here between passes (beam search reorders rows, assisted
    decoding takes positions back), so `enter` notices and refuses.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._known: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._open: dict[int, weakref.ref[Any]] = {}
        self._last = 0

    def enter(self, cache: Any, batch: int) -> tuple[int, int]:
        """The number of a cache and the positions in it; (0, 0) for none.

        Raises:
            UserError: the cache was changed since its last pass, or the trunk never had or no longer has its half.
        """
        if cache is None:
            return 0, 0
        past = int(cache.get_seq_length(self._index))
        number, length = self._known.get(cache, (0, 0))
        if past != length or (past and not self._in_order(cache, batch)):
            raise UserError(
                f"a KV cache of {past} positions does not match the trunk's half, which has {length} in the order they came",
                hint="generate by greedy search or sampling, without beams or an assistant, in a cache of this run",
            )
        if not number:
            self._last = number = self._last + 1
            self._open[number] = weakref.ref(cache)
        return number, past

    def _in_order(self, cache: Any, batch: int) -> bool:
        rows = cache.layers[self._index].keys[:, 0, -1, 0]
        return rows.tolist() == list(range(batch))

    def leave(self, cache: Any, number: int, length: int) -> None:
        """A pass with this cache crossed; it has ``length`` positions now."""
        self._known[cache] = (number, length)

    def finished(self) -> list[int]:
        """Numbers of caches that no longer exist here, each told once: their other halves can be freed."""
        gone = [number for number, cache in self._open.items() if cache() is None]
        for number in gone:
            del self._open[number]
        return gone

    def forget(self) -> list[int]:
        """Numbers of all caches not told by `finished` yet; none of them can be used for a pass again."""
        every = list(self._open)
        self._open.clear()
        self._known.clear()
        return every


class TrunkStub(PassThrough):
    """Stands in the first trunk slot of an `owner_model`, in the place of the whole trunk.

    Args:
        cut: where the model is cut.
        rotary: the trunk's blocks need position ids.
        port: the way to the trunk; may be replaced between passes.
        last_positions: how many of a row's last tokens are sent, with its first; 0: all are.

    Attributes:
        caches: numbers of the KV caches in use.
        replay: if set, a pass skips the bottom's blocks and takes this (batch, seq, d) for the trunk's output.
        observe: whether a pass leaves its ``embeddings`` (the first block's input) and ``smashed`` activations (the stub's
            input), both with their graphs, for `take_observed`.
        crosses_backward: whether the last pass will be followed by a backward crossing.
    """

    def __init__(self, cut: Cut, *, rotary: bool, port: TrunkPort, last_positions: int = 0) -> None:
        super().__init__(cut.trunk.start)
        self.port = port
        self._chooser = PositionChooser(last_positions)
        self.caches = CacheNumbers(self.index)
        self.replay: Tensor | None = None
        self.observe = False
        self.embeddings: Tensor | None = None
        self.smashed: Tensor | None = None
        self.crosses_backward = False
        self._rotary = rotary
        self._mask: Tensor | None = None
        self._observed_mask: Tensor | None = None

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq d"],
        *args: Any,
        past_key_values: Any = None,
        position_ids: Int[Tensor, "rows seq"] | None = None,
        **_: Any,
    ) -> Float[Tensor, "batch seq d"]:
        """As a block of `transformers`: states at the bottom cut to states at the top cut.

        Raises:
            UserError: see `CacheNumbers.enter`; or a replay with a cache or of another shape; or packed sequences of which
                positions would be left out.
            ProtocolError: the trunk's output has another shape.
        """
        cache = cache_argument(args, past_key_values)
        if self.replay is not None:
            return self._replayed(self.replay, hidden_states, cache)
        cache_id, past = self.caches.enter(cache, hidden_states.shape[0])
        sent = self._chooser.choose(hidden_states, self._mask, cache, past)
        self._note_smashed(hidden_states, sent)
        crossing = hidden_states if sent is None else sent.take(hidden_states)
        self.crosses_backward = torch.is_grad_enabled() and crossing.requires_grad
        context = self._context(position_ids, cache_id, past)
        if sent is not None:
            context = self._context_of_some(sent, position_ids, context)
        if self.crosses_backward:
            output: Tensor = _Crossing.apply(crossing, self.port, context)
        else:
            output = _fitting(self.port.forward(crossing.detach(), context)[1], crossing)
        if cache is not None:
            count_positions(cache, self.index, hidden_states)
            self.caches.leave(cache, cache_id, past + hidden_states.shape[1])
            self._chooser.keep(cache, sent)
        return output if sent is None else sent.put(hidden_states, output)

    def take_observed(self) -> Observed | None:
        """What the last pass left under ``observe``, once: embeddings E, smashed activations H, and where both count."""
        embeddings, smashed, mask = self.embeddings, self.smashed, self._observed_mask
        self.embeddings = self.smashed = self._observed_mask = None
        return None if embeddings is None or smashed is None else (embeddings, smashed, mask)

    def _note_smashed(self, hidden: Tensor, sent: Sent | None) -> None:
        if self.observe:
            self.smashed, self._observed_mask = hidden, _unless_all_ones(self._mask)
            if sent is not None:
                self._observed_mask = sent.here if self._mask is None else sent.here & self._mask.bool()
            if self.index == 0:
                self.embeddings = hidden

    def _replayed(self, replay: Tensor, hidden: Tensor, cache: Any) -> Tensor:
        if cache is not None:
            raise UserError("cached trunk outputs cannot be replayed into a KV cache", hint="pass use_cache=False")
        if replay.shape != hidden.shape:
            raise UserError(
                f"the replayed trunk output is {tuple(replay.shape)}, the batch wants {tuple(hidden.shape)}",
                hint="replay the outputs of these very examples, padded alike",
            )
        self.crosses_backward = False
        return replay.detach().to(hidden)

    def _context(self, position_ids: Tensor | None, cache_id: int, past: int) -> TrunkContext:
        """Leave out what is trivial, without changing what `transformers` makes of the rest.

        Without mask and cache it takes jumps in the positions for the borders of packed sequences. So an all-ones mask stays
        where positions do not simply count, and without a mask even blocks with learned positions get them.
        """
        positions = None if _counts_on(position_ids, past) else position_ids
        packed = self._mask is None and not cache_id
        if not self._rotary and not packed:
            positions = None
        mask = _unless_all_ones(self._mask)
        if mask is None and self._mask is not None and positions is not None and not cache_id:
            mask = self._mask.bool()
        keep = self.crosses_backward
        return TrunkContext(mask, positions, cache_id, keep, keep, self.training, starts=past == 0)

    def _context_of_some(self, sent: Sent, position_ids: Tensor | None, every: TrunkContext) -> TrunkContext:
        """The same of the positions that are sent. Their gaps must not look like borders of packed sequences: see `_context`."""
        if self._mask is None and not every.cache_id and every.position_ids is not None:
            raise UserError(
                "positions of packed sequences cannot be left out",
                hint="give an attention mask, or send every position",
            )
        mask = sent.present(self._mask)
        mask = _unless_all_ones(mask) if every.cache_id else mask
        return replace(every, attention_mask=mask, position_ids=sent.positions(position_ids))

    def note_mask(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder: blocks are given a mask already made 4-D, which is not sent."""
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UserError(
                "a model that is cut takes padding masks of shape (batch, past + seq) only",
                hint="leave prepared 4-D masks and static caches out",
            )
        self._mask = mask

    def note_embeddings(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the first block."""
        if self.observe and self.replay is None:
            self.embeddings = args[0]


def _counts_on(position_ids: Tensor | None, past: int) -> bool:
    if position_ids is None:
        return True
    counting = torch.arange(past, past + position_ids.shape[1], device=position_ids.device)
    return bool((position_ids == counting).all())


def _unless_all_ones(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask.bool()


def _skipped_in_replay(stub: TrunkStub, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run_or_skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(hidden_states, *args, **kwargs) if stub.replay is None else hidden_states

    return run_or_skip


def install_trunk_stub(
    model: nn.Module, family: Family, cut: Cut, port: TrunkPort, *, last_positions: int = 0
) -> TrunkStub:
    """Connect an `owner_model` to the trunk behind ``port``. No path of a module or parameter changes."""
    stub = TrunkStub(cut, rotary=family.positions is None, port=port, last_positions=last_positions)
    stub.train(model.training)
    setattr(model.get_submodule(family.blocks), str(stub.index), stub)
    model.get_submodule(family.decoder).register_forward_pre_hook(stub.note_mask, with_kwargs=True)
    bottom = blocks_of(model, family)[: stub.index]
    for block in bottom:
        block.forward = _skipped_in_replay(stub, block.forward)
    if bottom:
        bottom[0].register_forward_pre_hook(stub.note_embeddings)
    return stub
