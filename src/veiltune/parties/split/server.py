"""The provider's trunk server: one frozen trunk, any number of owners, each in a session of its own.

What an owner left pending is bounded in number and age, its caches in number, and all of it goes when the owner does. The
trunk has no state of its own but its weights, so nothing of one session can reach another; computing takes turns.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veiltune.errors import ProtocolError
from veiltune.models.cut import Cut, Trunk
from veiltune.parties.split.plan import ServerOptions, SplitPlan
from veiltune.privacy.error_feedback import ErrorFeedback
from veiltune.privacy.quantisation import WireCodec
from veiltune.transport.messages import Forget, Message, TrunkBackward, TrunkForward, TrunkGradient, TrunkOutput


@dataclass
class _Pending:
    """A forward whose backward is still to come: its graph, or what is needed to make it again."""

    born: float
    request: TrunkForward
    entry: Tensor
    output: Tensor | None


class TrunkServer:
    """A trunk and the lock under which owners take turns on it.

    Args:
        trunk: filled and frozen.
        plan: the design's; how the wire is encoded, and the bounds.
        cut: where the model is cut.
        width: of the hidden states.
        device: where the trunk is.
    """

    def __init__(self, trunk: Trunk, plan: SplitPlan, cut: Cut, *, width: int, device: torch.device) -> None:
        self.trunk = trunk
        self.plan = plan
        self.cut = cut
        self.width = width
        self.device = device
        self.lock = threading.Lock()
        self.sessions: dict[str, TrunkSession] = {}
        self._count = 0
        self._guard = threading.Lock()

    def open_session(self) -> TrunkSession:
        """A session for one more owner.

        Raises:
            ProtocolError: there are as many as there may be.
        """
        with self._guard:
            if len(self.sessions) >= self.plan.server.max_sessions:
                raise ProtocolError(f"this provider serves {len(self.sessions)} owners already", hint="try again later")
            self._count += 1
            session = TrunkSession(self, f"s{self._count}")
            self.sessions[session.name] = session
            return session

    def close_session(self, session: TrunkSession) -> None:
        """Free all that an owner left."""
        with self._guard:
            self.sessions.pop(session.name, None)
        session.clear()


class TrunkSession:
    """One owner's forwards, backwards and caches."""

    def __init__(self, server: TrunkServer, name: str) -> None:
        self.server = server
        self.name = name
        self.options: ServerOptions = server.plan.server
        self.states = WireCodec.for_activations(server.plan.wire)
        self.gradients = WireCodec.for_gradients(server.plan.wire)
        self.feedback = ErrorFeedback(self.gradients) if server.plan.wire.error_feedback else None
        self.pending: OrderedDict[int, _Pending] = OrderedDict()
        self.caches: OrderedDict[int, Any] = OrderedDict()
        self._last_ticket = 0

    def clear(self) -> None:
        """Free graphs and caches."""
        self.pending.clear()
        self.caches.clear()

    def handle(self, message: Message) -> Message | None:
        """Answer one request; ``None`` where it wants no answer.

        Raises:
            ProtocolError: a message out of order, of a wrong shape, with values that are not finite, or that no longer
                has what it refers to.
        """
        if isinstance(message, TrunkForward):
            return self._forward(message)
        if isinstance(message, TrunkBackward):
            return self._backward(message)
        if isinstance(message, Forget):
            if message.cache_id:
                self.caches.pop(message.cache_id, None)
            else:
                self.pending.clear()
            return None
        raise ProtocolError(f"the trunk server does not answer {type(message).__name__}")

    def _forward(self, request: TrunkForward) -> TrunkOutput:
        if request.ticket <= self._last_ticket:
            raise ProtocolError(
                f"forward {request.ticket} came after {self._last_ticket}: messages were reordered or sent twice"
            )
        self._last_ticket = request.ticket
        entry = self._decoded(self.states, request.hidden, f"the states of forward {request.ticket}")
        keep_graph = request.keep and self.options.activations == "keep"
        cache = self._cache(request.cache_id)
        past = 0 if cache is None else int(cache.get_seq_length())
        self._require_few(entry.shape[0], past + entry.shape[1], f"forward {request.ticket} with what its cache holds")
        with self.server.lock:
            entry.requires_grad_(keep_graph)
            with torch.set_grad_enabled(keep_graph):
                output = self._run(request, entry)
        if request.keep:
            kept = output if keep_graph else None
            self._drop_old(room=1)
            self.pending[request.ticket] = _Pending(time.monotonic(), request, entry, kept)
        return TrunkOutput(request.ticket, self.states.encode(output.detach(), starts=past == 0))

    def _run(self, request: TrunkForward, entry: Tensor) -> Tensor:
        mask, positions = request.attention_mask, request.position_ids
        with self._drawing(request.ticket) if request.training else nullcontext():
            return self.server.trunk.forward(
                entry,
                None if mask is None else mask.to(entry.device),
                None if positions is None else positions.to(entry.device),
                self._cache(request.cache_id),
                training=request.training,
            )

    @contextmanager
    def _drawing(self, ticket: int) -> Generator[None]:
        """Dropout draws by the ticket alone: the same when a forward is run or sent again, whoever else is served meanwhile."""
        device = self.server.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(ticket)
            yield

    def _cache(self, cache_id: int) -> Any:
        if cache_id == 0:
            return None
        if cache_id < 0:
            raise ProtocolError(f"cache {cache_id} is no cache")
        if cache_id not in self.caches:
            while len(self.caches) >= self.options.max_caches:
                self.caches.popitem(last=False)
            self.caches[cache_id] = self.server.trunk.new_cache()
        self.caches.move_to_end(cache_id)
        return self.caches[cache_id]

    def _backward(self, request: TrunkBackward) -> TrunkGradient:
        self._drop_old(room=0)
        found = self.pending.pop(request.ticket, None)
        if found is None:
            raise ProtocolError(
                f"no forward {request.ticket} is pending: it was never kept, was answered, or is older than "
                f"{self.options.pending_seconds:g} s or {self.options.max_pending} others",
                hint="send the forward again",
            )
        gradient = self._decoded(self.gradients, request.gradient, f"the gradient of forward {request.ticket}")
        if gradient.shape != found.entry.shape:
            raise ProtocolError(
                f"the gradient of forward {request.ticket} is {tuple(gradient.shape)}, its states were {tuple(found.entry.shape)}"
            )
        with self.server.lock:
            output = found.output if found.output is not None else self._again(found)
            torch.autograd.backward([output], [gradient])
        assert found.entry.grad is not None  # noqa: S101 - the entry was made to want one
        encoder = self.gradients if self.feedback is None else self.feedback
        return TrunkGradient(request.ticket, encoder.encode(found.entry.grad))

    def _again(self, pending: _Pending) -> Tensor:
        """The forward once more, with its graph; dropout draws what it drew before."""
        pending.entry.requires_grad = True
        with torch.enable_grad():
            return self._run(pending.request, pending.entry)

    def _drop_old(self, *, room: int) -> None:
        """Keep pending forwards within their bounds, with room for so many more."""
        oldest = time.monotonic() - self.options.pending_seconds
        while self.pending:
            ticket, first = next(iter(self.pending.items()))
            if first.born >= oldest and len(self.pending) + room <= self.options.max_pending:
                return
            del self.pending[ticket]

    def _decoded(self, codec: WireCodec, payload: Tensor, what: str) -> Tensor:
        hidden = codec.decode(payload, device=self.server.device)
        if hidden.dim() != 3 or hidden.shape[2] != self.server.width or 0 in hidden.shape:
            raise ProtocolError(f"{what} have shape {tuple(hidden.shape)}, not (batch, seq, {self.server.width})")
        self._require_few(hidden.shape[0], hidden.shape[1], what)
        return hidden

    def _require_few(self, batch: int, length: int, what: str) -> None:
        if batch * length > self.options.max_tokens:
            raise ProtocolError(
                f"{what}: {batch} x {length} tokens exceed {self.options.max_tokens}", hint="send smaller batches"
            )
