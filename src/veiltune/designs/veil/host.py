"""The untrusted host: one trunk in a rotated basis, its factors, and possibly their optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.config import LoraConfig, TrainConfig
from veiltune.engine import clip_and_step
from veiltune.errors import ProtocolError
from veiltune.models.cut import Cut
from veiltune.models.rotated import RotatedTrunk
from veiltune.models.skeleton import config_from_json, resolve_device
from veiltune.models.trunk import make_optimizer
from veiltune.parties.party import Party
from veiltune.transport.messages import (
    Acknowledged,
    FactorGradients,
    FactorGradientsRequest,
    Factors,
    FactorsRequest,
    Forget,
    Goodbye,
    LoadState,
    Message,
    OptimizerStep,
    SaveState,
    StepDone,
    TrunkPlan,
    TrunkShard,
    VeiledBackward,
    VeiledForward,
    VeiledGradient,
    VeiledOutput,
)


class Host:
    """The host's session: one trunk, its factors, and possibly their optimiser."""

    def __init__(self, party: Party, plan: TrunkPlan) -> None:
        settings: Mapping[str, Any] = plan.settings
        torch.manual_seed(party.config.seed)  # dropout's; a new process's generator starts anywhere
        model_config = config_from_json(plan.config)
        cut = Cut.of(model_config, settings["bottom_layers"], settings["top_layers"])
        lora = LoraConfig.model_validate(settings["lora"])
        device = resolve_device(party.config.device)
        self.trunk = RotatedTrunk(model_config, cut, lora, device, rounded=settings["rounded"])
        self.train = TrainConfig.model_validate(settings["train"]) if settings["optimizer_at"] == "host" else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.store = StateStore(party.directory, settings["fingerprint"])
        self._handlers: dict[type[Message], Any] = {
            VeiledForward: lambda m: VeiledOutput(m.ticket, self.trunk.forward(m)),
            VeiledBackward: self._backward,
            Forget: lambda m: self.trunk.forget(m.cache_id),
            FactorGradientsRequest: self._gradients,
            Factors: self._take_factors,
            FactorsRequest: lambda _: Factors({name: value.detach() for name, value in self.parameters.items()}),
            OptimizerStep: self._step,
            SaveState: self._save,
            LoadState: self._load,
            TrunkShard: self._shard,
        }

    def handle(self, message: Message) -> Message | None:
        """Answer one message of the enclave; ``None`` where it wants no answer."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"the host does not answer {type(message).__name__}")
        return handler(message)

    def _shard(self, message: TrunkShard) -> Message:
        self.trunk.load(message.tensors)
        return Acknowledged()

    def _backward(self, message: VeiledBackward) -> Message | None:
        gradient = self.trunk.backward(message)
        return None if gradient is None else VeiledGradient(message.ticket, gradient)

    def _take_factors(self, message: Factors) -> Message:
        first = not self.parameters
        self.trunk.load_factors(message.tensors)
        if first:
            self.trunk.ready()
            self.parameters = self.trunk.parameters
            self.optimizer = None if self.train is None else make_optimizer(self.parameters, self.train)
        return Acknowledged()

    def _gradients(self, message: FactorGradientsRequest) -> Message:
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.parameters.items()}
        if message.clear:
            for parameter in self.parameters.values():
                parameter.grad = None
        return FactorGradients(found)

    def _step(self, message: OptimizerStep) -> Message:
        if self.optimizer is None:
            raise ProtocolError("this host has no optimiser: the agreed place for it is the enclave")
        norm = clip_and_step(self.optimizer, self.parameters, message.learning_rate, message.max_grad_norm)
        self.trunk.stay_centred()
        return StepDone(norm)

    def _save(self, message: SaveState) -> Message:
        optimizer = self.optimizer or torch.optim.SGD(list(self.parameters.values()))
        self.store.save(message.step, optimizer_tensors(optimizer, self.parameters))
        return Acknowledged()

    def _load(self, message: LoadState) -> Message:
        optimizer = self.optimizer or torch.optim.SGD(list(self.parameters.values()))
        restore_optimizer(optimizer, self.parameters, self.store.load(message.step))
        return Acknowledged()


def run_host(party: Party) -> None:
    """The host: whatever the enclave asks, on rotated numbers, until it says goodbye."""
    enclave = party.links["enclave"]
    host = Host(party, enclave.recv_as(TrunkPlan))
    enclave.send(Acknowledged())
    while not isinstance(message := enclave.recv(), Goodbye):
        answer = host.handle(message)
        if answer is not None:
            enclave.send(answer)
