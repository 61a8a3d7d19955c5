"""The owner's way to the provider's trunk: states and gradients encoded for the wire, and a lost link made good.

A link to a service can be made anew. The provider keeps nothing that matters but forwards whose backward is still to come;
the owner holds on to those messages, and sends them again on the new link, so that a step goes on as if nothing had been.
A KV cache cannot be made good: a generation that loses its link fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from veiltune.errors import PeerLostError, ProtocolError
from veiltune.models.trunk_stub import TrunkContext
from veiltune.privacy.error_feedback import ErrorFeedback
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.transport.channel import Channel
from veiltune.transport.messages import (
    Forget,
    Message,
    Refused,
    TrunkBackward,
    TrunkForward,
    TrunkGradient,
    TrunkOutput,
)

M = TypeVar("M", bound=Message)


class RefusedError(ProtocolError):
    """The provider refused, in its own words."""


def expect(message: Message, kind: type[M]) -> M:
    """The answer, if it is of this kind.

    Raises:
        RefusedError: the provider refused.
        ProtocolError: it answered something else.
    """
    if isinstance(message, Refused):
        raise RefusedError(f"the provider refuses: {message.message}", hint=message.hint)
    if not isinstance(message, kind):
        raise ProtocolError(f"expected {kind.__name__} from the provider, got {type(message).__name__}")
    return message


class WirePort:
    """Implements `models.trunk_stub.TrunkPort` over a channel.

    Args:
        link: to the provider, agreed on.
        wire: how to encode.
        reconnect: makes a new link and agrees again, or raises; ``None``: a lost link is the end.
    """

    def __init__(self, link: Channel, wire: WireOptions, reconnect: Callable[[], Channel] | None = None) -> None:
        self.link = link
        self.states = WireCodec.for_activations(wire)
        self.gradients = WireCodec.for_gradients(wire)
        self.feedback = ErrorFeedback(self.gradients) if wire.error_feedback else None
        self._reconnect = reconnect
        self._ticket = 0
        self._kept: dict[int, TrunkForward] = {}

    def begin_step(self, step: int) -> None:
        """Number what follows by the step it is of, not by what went before: dropout in the trunk draws by the ticket.

        So a run that is resumed draws what it would have drawn. Evaluations between two steps have 2²¹ numbers.
        """
        self._ticket = max(self._ticket, (2 * step + 1) << 20)

    def forward(self, hidden: Tensor, context: TrunkContext) -> tuple[int, Tensor]:
        """One forward crossing: (batch, seq, d) states in, the trunk's output out, and the ticket for its backward."""
        self._ticket += 1
        request = TrunkForward(
            self._ticket,
            context.cache_id,
            context.keep,
            context.training,
            context.attention_mask,
            context.position_ids,
            self.states.encode(hidden.detach(), starts=context.starts),
        )
        if context.keep:
            self._kept[request.ticket] = request
        answer = self._ask(request, TrunkOutput, is_lasting=context.cache_id != 0)
        return request.ticket, self._decoded(self.states, answer.hidden, hidden)

    def backward(self, ticket: int, gradient: Tensor) -> Tensor:
        """One backward crossing: the gradient of that forward's output in, that of its input out."""
        encoded = self.gradients.encode(gradient) if self.feedback is None else self.feedback.encode(gradient)
        answer = self._ask(TrunkBackward(ticket, encoded), TrunkGradient)
        self._kept.pop(ticket, None)
        return self._decoded(self.gradients, answer.gradient, gradient)

    def forget(self, cache_id: int) -> None:
        """Have the provider free a cache (> 0), or what is pending (0)."""
        if cache_id == 0:
            if not self._kept:
                return
            self._kept.clear()
        try:
            self.link.send(Forget(cache_id))
        except PeerLostError:  # and with it what was to be freed
            if self._reconnect is None:
                raise

    def _decoded(self, codec: WireCodec, payload: Tensor, like: Tensor) -> Tensor:
        value = codec.decode(payload, device=like.device)
        if value.shape != like.shape:
            raise ProtocolError(f"the provider answered {tuple(value.shape)} to {tuple(like.shape)}")
        return value.to(like.dtype)

    def _ask(self, request: TrunkForward | TrunkBackward, kind: type[M], *, is_lasting: bool = False) -> M:
        """Exchange one request, over a new link if the old one is lost."""
        while True:
            try:
                self.link.send(request)
                return self._answer(request.ticket, kind)
            except PeerLostError:
                if self._reconnect is None or is_lasting:
                    raise
                self._renew(self._reconnect, but=request.ticket if isinstance(request, TrunkForward) else None)

    def _answer(self, ticket: int, kind: type[M]) -> M:
        answer = expect(self.link.recv(), kind)
        if getattr(answer, "ticket", ticket) != ticket:
            raise ProtocolError(f"the provider answered {getattr(answer, 'ticket', None)} to {ticket}")
        return answer

    def _renew(self, reconnect: Callable[[], Channel], *, but: int | None) -> None:
        """A new link, with the pending forwards sent again, but for the one that is about to be."""
        self.link.close()
        self.link = reconnect()
        try:
            for ticket, request in sorted(self._kept.items()):
                if ticket != but:
                    self.link.send(request)
                    self._answer(ticket, TrunkOutput)
        except PeerLostError:
            self._renew(reconnect, but=but)
