"""The enclave's half: a `transformers` model whose linears, or whole segments, run elsewhere on masked states.

The enclave keeps the model `transformers` built, with embeddings, norms, residual additions and head in place, and puts a stub
where the host computes. A stub masks its input, crosses, unmasks what returns and adds the output side's bias, inside
autograd; so training, generation and caching are `transformers`' own.

*Reference.* ObfuscaTune (arXiv 2407.02960), compact placement ours.

*Symbols.* X* = X·R, O = O*·R⁻¹ + b; dO* = dO·R⁻ᵀ and dX = dX*·Rᵀ are autograd's own transposes of the two maskings.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veiltune.models.family import Family, Operation, Placement
from veiltune.models.precision import round_tensor
from veiltune.models.skeleton import blocks_of
from veiltune.privacy.orthogonal import Key
from veiltune.transport.channel import Channel
from veiltune.transport.messages import (
    Forget,
    PassContext,
    SegmentBackward,
    SegmentForward,
    SegmentGradient,
    SegmentOutput,
)

Context = tuple[Tensor | None, Tensor | None, Tensor | None]
"""What attentions of a pass need beside hidden states: mask, and the two rotary tables."""


class Witness(Protocol):
    """Sees what the host answers before it is used, and raises IntegrityError where it is found to be wrong."""

    def announced(self, context_id: int, context: Context) -> None:
        """What attentions of later passes refer to by this number."""
        ...

    def answered(self, asked: SegmentForward, outputs: tuple[Tensor, ...]) -> None:
        """A forward crossing."""
        ...

    def answered_backward(self, ticket: int, gradients: tuple[Tensor | None, ...], gradient: Tensor | None) -> None:
        """The backward crossing of a kept forward: the outputs' gradients, and the input's that came back."""
        ...

    def forget(self) -> None:
        """No backward of the passes so far will come."""
        ...

    def finished(self, cache_id: int) -> None:
        """No more passes with this KV cache will come."""
        ...


class TrunkClient:
    """The enclave's conversation with the host about one trunk.

    Attributes:
        wait_seconds: spent waiting for answers.
        witness: is shown every answer; ``None``: the host is believed.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.witness: Witness | None = None
        self.wait_seconds = 0.0
        self._tickets = 0
        self._contexts = 0
        self._last_context: tuple[Context, int] | None = None
        self._caches: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._num_caches = 0
        self._oldest_cache = 1

    def forward(self, call: RemoteCall, hidden: Tensor, *, input_gradient: bool) -> tuple[int, tuple[Tensor, ...]]:
        """One forward crossing; returns the ticket its backward needs, and the outputs."""
        self._tickets += 1
        start = time.perf_counter()
        request = SegmentForward(
            call.operation.index,
            self._tickets,
            call.context_id,
            call.cache_id,
            call.keep,
            input_gradient,
            call.training,
            hidden.detach(),
        )
        self.channel.send(request)
        answer = self.channel.recv_as(SegmentOutput)
        self.wait_seconds += time.perf_counter() - start
        if self.witness is not None:
            self.witness.answered(request, answer.outputs)
        return self._tickets, answer.outputs

    def backward(self, ticket: int, gradients: tuple[Tensor | None, ...]) -> Tensor | None:
        """One backward crossing."""
        start = time.perf_counter()
        self.channel.send(SegmentBackward(ticket, gradients))
        answer = self.channel.recv_as(SegmentGradient)
        self.wait_seconds += time.perf_counter() - start
        if self.witness is not None:
            self.witness.answered_backward(ticket, gradients, answer.gradient)
        return answer.gradient

    def context(self, mask: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> int:
        """Announce a pass's mask and rotary tables, once for all layers that share them."""
        values: Context = (mask, cos, sin)
        if self._last_context is not None and all(a is b for a, b in zip(self._last_context[0], values, strict=True)):
            return self._last_context[1]
        self._contexts += 1
        self.channel.send(PassContext(self._contexts, *values))
        if self.witness is not None:
            self.witness.announced(self._contexts, values)
        self._last_context = (values, self._contexts)
        return self._contexts

    def cache(self, cache: Any) -> int:
        """The host's number for a cache of `transformers`; 0 for none."""
        if cache is None:
            return 0
        if cache not in self._caches:
            self._num_caches += 1
            self._caches[cache] = self._num_caches
        return self._caches[cache]

    def forget(self) -> None:
        """Have the host free every graph and context of the passes so far."""
        self._last_context = None
        if self.witness is not None:
            self.witness.forget()
        self.channel.send(Forget(0))

    def forget_caches(self) -> None:
        """Have the host free every cache, and the passes with them."""
        for cache_id in range(self._oldest_cache, self._num_caches + 1):
            self.channel.send(Forget(cache_id))
            if self.witness is not None:
                self.witness.finished(cache_id)
        self._oldest_cache = self._num_caches + 1
        self._caches.clear()
        self.forget()


@dataclass(frozen=True, slots=True)
class RemoteCall:
    """What one crossing needs beside the hidden states."""

    client: TrunkClient
    operation: Operation
    context_id: int
    cache_id: int
    keep: bool
    training: bool


class _RemoteOperation(torch.autograd.Function):
    """One operation of the host as a node of the enclave's graph. ``anchor`` makes the node differentiable."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, hidden: Tensor, anchor: Tensor, call: RemoteCall
    ) -> tuple[Tensor, ...]:
        ctx.client, ctx.device = call.client, hidden.device
        ctx.ticket, outputs = call.client.forward(call, hidden, input_gradient=ctx.needs_input_grad[0])
        return tuple(output.to(hidden.device) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        gradient = ctx.client.backward(ctx.ticket, gradients)
        return (None if gradient is None else gradient.to(ctx.device), None, None)


class RemoteOperation(nn.Module):
    """Base of the stubs: mask, cross, unmask, add the bias, apply the dropout of the output."""

    def __init__(
        self,
        client: TrunkClient,
        operation: Operation,
        keys: Mapping[str, Key],
        *,
        rounded: bool,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.client = client
        self.dropout = dropout
        self._round = round_tensor if rounded else _as_is
        self.operation = operation
        self.key_in = None if operation.key_in is None else keys[operation.key_in]
        self.key_out = None if operation.key_out is None else keys[operation.key_out]
        self.bias: nn.Parameter | None = None
        self._anchor = torch.zeros((), requires_grad=True)

    def cross(self, hidden: Tensor, *, context_id: int = 0, cache_id: int = 0) -> tuple[Tensor, ...]:
        """Plain states (…, d) in, plain outputs out."""
        masked = hidden if self.key_in is None else self._round(self.key_in.mask(hidden))
        call = RemoteCall(
            self.client, self.operation, context_id, cache_id, keep=torch.is_grad_enabled(), training=self.training
        )
        outputs: tuple[Tensor, ...] = _RemoteOperation.apply(masked, self._anchor, call)
        if self.key_out is None:
            return outputs
        plain = self.key_out.unmask(outputs[0])
        plain = self._round(plain if self.bias is None else plain + self.bias)
        return (plain if self.dropout is None else self.dropout(plain),)


class RemoteAttention(RemoteOperation):
    """Stands in for a whole attention module."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As `transformers`' attentions: returns (output, no weights)."""
        cos, sin = position_embeddings or (None, None)
        context_id = self.client.context(attention_mask, cos, sin)
        cache_id = self.client.cache(past_key_values)
        if past_key_values is not None:  # our cache holds no keys; it only counts positions
            counter = hidden_states.new_zeros((hidden_states.shape[0], 1, hidden_states.shape[1], 1))
            past_key_values.update(counter, counter, self.operation.block)
        (output,) = self.cross(hidden_states, context_id=context_id, cache_id=cache_id)
        return output, None


class RemoteMlp(RemoteOperation):
    """Stands in for a whole MLP."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """States (…, d) to states (…, d)."""
        return self.cross(hidden_states)[0]


class RemoteOutput(RemoteOperation):
    """Stands in for one output-side linear."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Activations (…, in) to states (…, d)."""
        return self.cross(hidden_states)[0]


class RemoteInputs(RemoteOperation):
    """Crosses once for all input-side linears of a segment; the first asks, the others take what came with it."""

    def __init__(self, client: TrunkClient, operation: Operation, keys: Mapping[str, Key], *, rounded: bool) -> None:
        super().__init__(client, operation, keys, rounded=rounded)
        self._source: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def member(self, position: int, hidden: Tensor) -> Tensor:
        """Output of the linear at ``position``."""
        if self._source is not hidden or position not in self._waiting:
            self._source, self._waiting = hidden, dict(enumerate(self.cross(hidden)))
        output = self._waiting.pop(position)
        if not self._waiting:
            self._source = None
        return output


class RemoteInput(nn.Module):
    """Stands in for one input-side linear of a group."""

    def __init__(self, group: RemoteInputs, position: int) -> None:
        super().__init__()
        self.group = group
        self.position = position

    def forward(self, hidden_states: Tensor) -> Tensor:
        """States (…, d) to this linear's output (…, out)."""
        return self.group.member(self.position, hidden_states)


def _as_is(x: Tensor) -> Tensor:
    return x


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)


def install_stubs(
    model: nn.Module,
    family: Family,
    num_layers: int,
    placement: Placement,
    client: TrunkClient,
    keys: Mapping[str, Key],
    *,
    rounded: bool,
) -> dict[str, RemoteOperation]:
    """Replace what the host computes; returns the stub that stands for each output-side linear, by the linear's path."""
    outputs: dict[str, RemoteOperation] = {}
    blocks = blocks_of(model, family)
    for operation in family.operations(num_layers, placement):
        block, segment = blocks[operation.block], operation.segment
        path = f"{family.blocks}.{operation.block}.{segment.output}"
        if operation.part == "inputs":
            group = RemoteInputs(client, operation, keys, rounded=rounded)
            for position, name in enumerate(segment.inputs):
                _put(block, name, RemoteInput(group, position))
        elif operation.part == "output":
            outputs[path] = RemoteOutput(client, operation, keys, rounded=rounded)
            _put(block, segment.output, outputs[path])
        else:
            dropout = None if segment.dropout is None else block.get_submodule(segment.dropout)
            kind = RemoteMlp if segment.name == "mlp" else RemoteAttention
            outputs[path] = kind(client, operation, keys, rounded=rounded, dropout=dropout)
            if segment.name == "mlp":
                family.replace_mlp(block, outputs[path])
            else:
                _put(block, str(segment.module), outputs[path])
    return outputs
