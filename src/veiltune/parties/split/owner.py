"""The owner's role where the model is cut: it holds text, bottom and top, and runs the training engine itself."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.checkpoints import StateStore
from veiltune.engine import Engine, ParameterBackend
from veiltune.errors import ConfigError, VeiltuneError
from veiltune.examples import TokenizedExample
from veiltune.models.cut import Cut, owner_model
from veiltune.models.cut_accounting import cut_shares
from veiltune.models.families import find_family
from veiltune.models.precision import round_between_operations
from veiltune.models.skeleton import compute_dtype, config_from_json, resolve_device
from veiltune.models.trainable import make_trainable
from veiltune.models.trunk import make_optimizer
from veiltune.models.trunk_stub import TrunkStub, install_trunk_stub
from veiltune.parties.owner import Owner, tokenizer_from
from veiltune.parties.party import Party
from veiltune.parties.split.plan import SplitPlan, terms_of
from veiltune.parties.split.port import RefusedError, WirePort, expect
from veiltune.parties.split.provider import Planner
from veiltune.parties.split.tuners import SplitTuner, tuner_kind
from veiltune.parties.split.warm_up import warm_up
from veiltune.parties.weights import receive_weights
from veiltune.privacy.decorrelation import Decorrelation
from veiltune.results import write_json
from veiltune.transport.channel import Channel
from veiltune.transport.messages import (
    Acknowledged,
    ModelCard,
    PlugIn,
    SplitAccepted,
    SplitRequest,
    TokenizerFiles,
)

RETRY_SECONDS = 0.2
PINS = "agreed.json"
"""What the owner remembers of the provider's model, in its own directory: on resuming, another one is refused."""


class SplitBackend(ParameterBackend):
    """The owner's parameters; what a pass leaves at the provider is freed with it."""

    def __init__(self, *args: Any, stub: TrunkStub, port: WirePort) -> None:
        super().__init__(*args)
        self._stub = stub
        self._port = port

    def end_of_pass(self) -> None:
        """See `Backend.end_of_pass`."""
        self._port.forget(0)

    def end_of_generation(self) -> None:
        """See `Backend.end_of_generation`."""
        for number in self._stub.caches.forget():
            self._port.forget(number)


class SplitOwner(Owner):
    """An owner with layers of its own."""

    def __init__(self, party: Party, plan: SplitPlan) -> None:
        self.plan = plan
        self._pins = _read_pins(party)
        link = party.links["provider"]
        self._agree(party, link, with_layers=True)
        card = link.recv_as(ModelCard)
        tokenizer = tokenizer_from(link.recv_as(TokenizerFiles).files, party.config.model)
        model_config = config_from_json(card.config)
        self._remember(party, card, model_config)
        torch.manual_seed(party.config.seed)  # dropout's; a new process's generator starts anywhere
        device = resolve_device(party.config.device)
        dtype, rounded = compute_dtype(party.config.dtype, device)
        self.cut = Cut.of(model_config, party.config.cut.bottom_layers, party.config.cut.top_layers)
        self.model: Any = owner_model(model_config, self.cut)
        receive_weights(link, self.model, dtype, device)
        party.figures["model"] = asdict(card)
        party.figures["owner_share"] = cut_shares(model_config, self.cut, 1, 1).owner_share
        self.port = WirePort(link, plan.wire, self._reconnecting(party))
        self.stub = install_trunk_stub(
            self.model, find_family(model_config), self.cut, self.port, last_positions=plan.last_positions
        )
        tuner = self._tuner(party, find_family(model_config), dtype, device)
        if rounded:
            round_between_operations(self.model)
        super().__init__(party, tuner, tokenizer, model_config)
        self.split_tuner = tuner

    def _agree(self, party: Party, link: Channel, *, with_layers: bool) -> None:
        link.send(SplitRequest(terms_of(party.config, self.plan, pins=self._pins), with_layers))
        accepted = expect(link.recv(), SplitAccepted)
        party.report("agreed", {"session": accepted.session})

    def _remember(self, party: Party, card: ModelCard, model_config: Any) -> None:
        self._pins = {"weights": card.fingerprint, "vocabulary": int(model_config.vocab_size)}
        write_json(party.directory / PINS, self._pins)

    def _reconnecting(self, party: Party) -> Callable[[], Channel] | None:
        if party.reconnect is None:
            return None
        renew = party.reconnect

        def reconnect() -> Channel:
            deadline = time.monotonic() + party.config.session.retry_seconds
            while True:
                link: Channel | None = None
                try:
                    link = renew("provider")
                    self._agree(party, link, with_layers=False)
                except VeiltuneError as error:
                    if link is not None:
                        link.close()
                    if isinstance(error, RefusedError) or time.monotonic() > deadline:
                        raise  # else it went away again before it agreed, or in the middle of proving itself
                    time.sleep(RETRY_SECONDS)
                else:
                    return link

        return reconnect

    def _tuner(self, party: Party, family: Any, dtype: torch.dtype, device: torch.device) -> SplitTuner:
        config, plan = party.config, self.plan
        layers = self.cut.top if plan.trains == "top" else self.cut.owner_layers
        warmed = plan.warm_up is not None and plan.warm_up.steps > 0
        self._require_layers(layers, warmed=warmed)
        self._trained = make_trainable(
            self.model,
            family,
            self.cut.owner_layers if warmed else layers,
            config.lora,
            config.train.method,
            dtype=dtype,
            device=device,
        )
        store = StateStore(party.directory, config.fingerprint())
        optimizer = make_optimizer(self._trained, config.train)
        backend = SplitBackend(self._trained, optimizer, store, stub=self.stub, port=self.port)
        decorrelation = None if plan.decorrelation is None else Decorrelation(plan.decorrelation, seed=config.seed)
        engine = Engine(self.model, backend, device, lambda _: None)
        return tuner_kind(plan)(party, plan, self.cut, engine, self.stub, self.port, decorrelation)

    def _require_layers(self, layers: Sequence[int], *, warmed: bool) -> None:
        """Refuse a cut that leaves the owner nothing to train, or to warm up."""
        bottom, top = self.cut.bottom_layers, self.cut.top_layers
        if not layers:
            held = f"cut.bottom_layers = {bottom} and cut.top_layers = {top}"
            which = "cut.top_layers" if self.plan.trains == "top" else "one of them"
            raise ConfigError(f"{held} leave the owner no layer to train", hint=f"set {which} to at least 1")
        if warmed and not bottom:
            raise ConfigError(
                "there is no bottom layer to warm up: cut.bottom_layers = 0",
                hint="set cut.bottom_layers to at least 1, or warm_up.steps to 0",
            )

    def before_training(self, examples: Sequence[TokenizedExample], held_out: Sequence[TokenizedExample]) -> None:
        """Warm up the bottom, where that was asked for, and see that what will be kept has room."""
        plan, resumed = self.plan, self.party.job.resume_step is not None
        if plan.warm_up is not None and plan.warm_up.steps > 0:
            if not resumed:
                bottom = list(self._of_bottom(self._trained).values())
                self.party.figures["warm_up"] = warm_up(
                    self.party, self.model, self.cut, bottom, plan.warm_up, examples, pad_id=self.pad_id
                )
            for parameter in self._of_bottom(self._trained).values():
                parameter.requires_grad = False  # no longer trained, yet part of the result
        self.split_tuner.prepare(examples, held_out, bottom=self._bottom_fingerprint())

    def _bottom_fingerprint(self) -> str:
        """Of what a trunk output depends on: the agreed terms, which positions go, and the bottom as it is now."""
        terms = terms_of(self.party.config, self.plan, pins=self._pins)
        terms["last_positions"] = self.plan.last_positions
        digest = hashlib.sha256(json.dumps(terms, sort_keys=True).encode())
        for name, value in self._of_bottom(dict(self.model.named_parameters())).items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _of_bottom(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        prefixes = tuple(f"{self.family.blocks}.{layer}." for layer in self.cut.bottom)
        return {name: value for name, value in parameters.items() if name.startswith(prefixes)}

    def after_training(self) -> None:
        """Measure on the emulator, where there is one, and return the result, where that was agreed on."""
        if self.plan.emulator is not None:
            with self.split_tuner.on_emulator():
                self.measure("emulator")
        if self.plan.plug_in:
            link = self.port.link
            link.send(PlugIn(self.party.config.train.method, self._result()))
            expect(link.recv(), Acknowledged)
            self.party.report("plugged_in", {})

    def _result(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in self.tuner.adapter().items()}

    def leave(self) -> None:
        """See `Owner.leave`; the link may be another than at the start."""
        self.party.figures["decorrelation"] = self.split_tuner.correlations
        self.party.links = {**self.party.links, "provider": self.port.link}
        super().leave()


def _read_pins(party: Party) -> dict[str, Any]:
    if party.job.resume_step is None:
        return {}
    try:
        return json.loads((party.directory / PINS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def join_with_layers(party: Party, planner: Planner) -> SplitOwner:
    """The owner of a design that cuts the model, with its layers in place.

    Raises:
        ConfigError: the cut does not fit the model.
        PeerLostError: the provider went away.
        ProtocolError: the provider refuses, or sends what is not its part.
    """
    return SplitOwner(party, planner(party.options))
