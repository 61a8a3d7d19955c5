"""The enclave's way to the rotated trunk: one module in the first trunk slot that masks, crosses and unmasks.

The cut, masks, positions and cache numbers are those of `models.trunk_stub`. What is added is the change of basis, and that a
backward crossing follows even where nothing below the cut is trained, since the trunk's adapters are.

*Reveals.* To the host: rotated states and gradients, padding, and positions that do not simply count.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.errors import ProtocolError
from veiltune.models.cut import Cut
from veiltune.models.family import Family
from veiltune.models.precision import round_tensor
from veiltune.models.rotated.rotation import Stream
from veiltune.models.trunk_stub import TrunkContext, TrunkStub
from veiltune.transport.channel import Channel
from veiltune.transport.messages import Forget, VeiledBackward, VeiledForward, VeiledGradient, VeiledOutput


class PassWitness(Protocol):
    """Sees what the host answers, and raises IntegrityError where it is found to be wrong."""

    def answered(self, asked: VeiledForward, output: Tensor) -> None:
        """A forward crossing."""
        ...

    def answered_backward(self, ticket: int, gradient: Tensor, entry: Tensor | None) -> None:
        """A backward crossing: the output's gradient, and the input's where it was wanted."""
        ...

    def finished(self, cache_id: int) -> None:
        """No more passes with this KV cache will come."""
        ...


@final
class VeilPort:
    """Implements `models.trunk_stub.TrunkPort` over the channel to the host.

    Attributes:
        wait_seconds: spent waiting for answers.
        witness: is shown every answer; ``None``: the host is believed.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.witness: PassWitness | None = None
        self.wait_seconds = 0.0
        self._ticket = 0
        self._kept: dict[int, bool] = {}

    def forward(self, hidden: Float[Tensor, "batch seq d"], context: TrunkContext) -> tuple[int, Tensor]:
        """One forward crossing of rotated states."""
        self._ticket += 1
        start = time.perf_counter()
        request = VeiledForward(
            self._ticket,
            context.cache_id,
            context.keep,
            context.input_gradient,
            context.training,
            context.attention_mask,
            context.position_ids,
            hidden,
        )
        self.channel.send(request)
        answer = self.channel.recv_as(VeiledOutput)
        self.wait_seconds += time.perf_counter() - start
        if answer.ticket != self._ticket:
            raise ProtocolError(f"the host answered {answer.ticket} to {self._ticket}")
        if self.witness is not None:
            self.witness.answered(request, answer.hidden)
        if context.keep:
            self._kept[self._ticket] = context.input_gradient
        return self._ticket, answer.hidden

    def backward(self, ticket: int, gradient: Tensor) -> Tensor | None:
        """One backward crossing, answered only if the input's gradient is wanted; else the host works on while we do."""
        wanted = self._kept.pop(ticket)
        start = time.perf_counter()
        self.channel.send(VeiledBackward(ticket, gradient))
        if not wanted:
            if self.witness is not None:
                self.witness.answered_backward(ticket, gradient, None)
            return None
        answer = self.channel.recv_as(VeiledGradient)
        self.wait_seconds += time.perf_counter() - start
        if answer.ticket != ticket or answer.gradient.shape != gradient.shape:
            raise ProtocolError(
                f"the host answered {answer.ticket}, {tuple(answer.gradient.shape)} to backward {ticket}"
            )
        if self.witness is not None:
            self.witness.answered_backward(ticket, gradient, answer.gradient)
        return answer.gradient

    def forget(self) -> None:
        """Have the host free forwards that were kept and had no backward (a loss that was not finite)."""
        if self._kept:
            self._kept.clear()
            self.channel.send(Forget(0))

    def forget_cache(self, cache_id: int) -> None:
        """Have the host free a cache."""
        self.channel.send(Forget(cache_id))
        if self.witness is not None:
            self.witness.finished(cache_id)


@final
class VeilStub(TrunkStub):
    """Stands in the first trunk slot of an `owner_model`: plain states in, plain states out (without their mean, see `Stream`).

    Args:
        cut: where the model is cut.
        rotary: the trunk's blocks need position ids.
        port: the way to the host.
        stream: the change of basis.
        rounded: imitate bfloat16 (see `models.precision`).
    """

    def __init__(self, cut: Cut, *, rotary: bool, port: VeilPort, stream: Stream, rounded: bool) -> None:
        super().__init__(cut, rotary=rotary, port=port)
        self._stream = stream
        self._round: Callable[[Tensor], Tensor] = round_tensor if rounded else _as_is
        self._wants_input = False

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq d"],
        *args: Any,
        past_key_values: Any = None,
        position_ids: Int[Tensor, "rows seq"] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch seq d"]:
        """As a block of `transformers`."""
        masked = self._round(self._stream.enter(hidden_states))
        self._wants_input = torch.is_grad_enabled() and masked.requires_grad
        if torch.is_grad_enabled() and not masked.requires_grad:
            masked = (
                masked.detach().requires_grad_()
            )  # the crossing is a node of the graph for the trunk's adapters' sake
        output = super().forward(masked, *args, past_key_values=past_key_values, position_ids=position_ids, **kwargs)
        return self._round(self._stream.leave(output))

    def _context(self, position_ids: Tensor | None, cache_id: int, past: int) -> TrunkContext:
        context = super()._context(position_ids, cache_id, past)
        return dataclasses.replace(context, input_gradient=self._wants_input)


def _as_is(x: Tensor) -> Tensor:
    return x


def install_veil_stub(
    model: torch.nn.Module, family: Family, cut: Cut, port: VeilPort, stream: Stream, *, rounded: bool = False
) -> VeilStub:
    """Connect an `owner_model` to the rotated trunk behind ``port``. No path of a module or parameter changes."""
    stub = VeilStub(cut, rotary=family.positions is None, port=port, stream=stream, rounded=rounded)
    stub.train(model.training)
    setattr(model.get_submodule(family.blocks), str(stub.index), stub)
    model.get_submodule(family.decoder).register_forward_pre_hook(stub.note_mask, with_kwargs=True)
    return stub
