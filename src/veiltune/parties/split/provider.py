"""The provider's role where the model is cut: agree with an owner, hand it its layers, and run the trunk for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

from veiltune.errors import ModelError, PeerLostError, ProtocolError, VeiltuneError
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.cut import Cut, Trunk, trunk_model
from veiltune.models.families import find_family
from veiltune.models.precision import round_between_operations
from veiltune.models.skeleton import assign_parameter, compute_dtype, config_from_json, require_complete, resolve_device
from veiltune.parties.party import Party
from veiltune.parties.provider import model_card, open_checkpoint, tokenizer_files
from veiltune.parties.split.emulation import Emulation
from veiltune.parties.split.plan import SplitPlan, require_agreement, terms_of
from veiltune.parties.split.plugin import plug_in
from veiltune.parties.split.server import TrunkServer, TrunkSession
from veiltune.parties.weights import read_group, shards, stream_weights
from veiltune.transport.channel import Channel
from veiltune.transport.messages import (
    Acknowledged,
    EmulatorRequest,
    Goodbye,
    Message,
    PlugIn,
    Refused,
    SplitAccepted,
    SplitRequest,
    TokenizerFiles,
)

log = logging.getLogger(__name__)


class Planner(Protocol):
    """Makes a design's plan from its options."""

    def __call__(self, options: Any) -> SplitPlan:
        """The plan."""
        ...


class Provider:
    """The provider's model, cut, and what it serves to any number of owners."""

    def __init__(self, party: Party, plan: SplitPlan) -> None:
        self.party = party
        self.plan = plan
        self.config = party.config
        self.checkpoint: Checkpoint = open_checkpoint(party)
        self.card = model_card(self.checkpoint, probe=party.job.verb == "probe")
        self.model_config = config_from_json(self.card.config)
        self.family = find_family(self.model_config)
        self.cut = Cut.of(self.model_config, self.config.cut.bottom_layers, self.config.cut.top_layers)
        self.device = resolve_device(self.config.device)
        self.dtype, self.rounded = compute_dtype(self.config.dtype, self.device)
        self._loading = threading.Lock()

    @cached_property
    def server(self) -> TrunkServer:
        """The trunk, loaded when it is first needed."""
        model = trunk_model(self.model_config, self.cut)
        blocks = len(self.cut.trunk)
        for block, group in shards(self.checkpoint, self.family):
            chosen = {n: stored for n, stored in group.items() if self.cut.holds(self.family, n) == "trunk"}
            if chosen:
                for name, value in read_group(self.checkpoint, chosen).items():
                    assign_parameter(model, name, value.to(self.device, self.dtype))
                self.party.report("provisioned", {"block": block - self.cut.bottom_layers, "num_blocks": blocks})
        require_complete(model)
        model.to(self.device).requires_grad_(requires_grad=False)
        if self.rounded:
            round_between_operations(model)
        trunk = Trunk(model, self.model_config, self.cut)
        return TrunkServer(trunk, self.plan, self.cut, width=int(self.model_config.hidden_size), device=self.device)

    @cached_property
    def emulation(self) -> Emulation:
        """The builder of the emulator."""
        if self.plan.emulator is None:
            raise ProtocolError(f"{self.config.design} has no emulator")
        return Emulation(self.party, self.checkpoint, self.cut, self.plan.emulator, lambda: self.server)

    def terms(self) -> dict[str, Any]:
        """What this provider serves."""
        pins = {"weights": self.card.fingerprint, "vocabulary": int(self.model_config.vocab_size)}
        return terms_of(self.config, self.plan, pins=pins)

    def serve(self, link: Channel) -> None:
        """One owner's session, from its request to its farewell. Whatever is wrong ends this session alone.

        Raises:
            PeerLostError: the owner went away.
            VeiltuneError: what the owner was refused for, after it was told.
        """
        session: TrunkSession | None = None
        try:
            request = link.recv_as(SplitRequest)
            require_agreement(request.terms, self.terms())
            with self._loading:
                server = self.server
            session = server.open_session()
            link.send(SplitAccepted(session.name))
            log.info("session %s: opened", session.name)
            if request.with_layers:
                self._hand_over(link)
            while not isinstance(message := link.recv(), Goodbye):
                answer = self._answer(session, link, message)
                if answer is not None:
                    link.send(answer)
            log.info("session %s: closed", session.name)
        except PeerLostError:
            raise
        except VeiltuneError as error:
            self._refuse(link, error)
            raise
        finally:
            if session is not None:
                self.server.close_session(session)

    def _answer(self, session: TrunkSession, link: Channel, message: Message) -> Message | None:
        if isinstance(message, EmulatorRequest):
            with self._loading:
                emulation = self.emulation
            emulation.send(link)
            return None
        if isinstance(message, PlugIn):
            if not self.plan.plug_in:
                raise ProtocolError("it was agreed that the owner keeps what it trained")
            with self._loading:  # one whole model in memory at a time
                plug_in(self.party.directory / self._plug_in_name(session), self.checkpoint, self.config, message)
            return Acknowledged()
        return session.handle(message)

    def _plug_in_name(self, session: TrunkSession) -> str:
        """One place where there is one owner; among many, one each."""
        return "plug-in" if self.party.links else f"plug-in-{time.strftime('%Y%m%d-%H%M%S')}-{session.name}"

    def _hand_over(self, link: Channel) -> None:
        """Card, tokenizer, and the owner's share of the weights."""
        link.send(self.card)
        link.send(TokenizerFiles(tokenizer_files(self.checkpoint)))
        wanted = stream_weights(
            link, self.checkpoint, self.family, wanted=lambda name: self.cut.holds(self.family, name) == "owner"
        )
        for _ in wanted:
            pass

    def _refuse(self, link: Channel, error: VeiltuneError) -> None:
        log.info("refused: %s", error.message)
        try:
            link.send(Refused(type(error).__name__, error.message, error.hint))
        except VeiltuneError:
            log.info("the owner is gone")


def provide_trunk(party: Party, planner: Planner) -> None:
    """Run the provider of a design that cuts the model, for the one owner of this session.

    Raises:
        ModelError: the source cannot be used, or does not fit this machine's memory.
        ConfigError: the cut does not fit the model.
    """
    Provider(party, planner(party.options)).serve(party.links["owner"])


def open_trunk(party: Party, planner: Planner) -> Callable[[Channel], None]:
    """The provider as a service: the trunk is loaded, and what is returned serves one owner's link, many at a time.

    Raises:
        ModelError: the source cannot be used, or does not fit this machine's memory.
        ConfigError: the cut does not fit the model.
    """
    provider = Provider(party, planner(party.options))
    _require_stateless(provider.model_config, party.config.model)
    party.report("ready", {"trunk_layers": len(provider.server.cut.trunk)})
    return provider.serve


def _require_stateless(model_config: Any, source: str) -> None:
    """Refuse models whose rotary tables grow with the longest text seen: one owner's text would change another's results."""
    rotary = getattr(model_config, "rope_parameters", None) or getattr(model_config, "rope_scaling", None) or {}
    kind = rotary.get("rope_type", rotary.get("type"))
    if kind in {"dynamic", "longrope"}:
        raise ModelError(
            f"{source!r} has rotary embeddings of type {kind!r}, which remember the longest text of any owner",
            hint="serve it to one owner at a time: leave session.connect out",
        )
