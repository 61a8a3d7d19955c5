"""The untrusted host: one trunk of masked weights, its factors, and possibly their optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.config import LoraConfig, TrainConfig
from veiltune.engine import clip_and_step
from veiltune.errors import ProtocolError
from veiltune.models.skeleton import config_from_json, resolve_device
from veiltune.models.trunk import HostTrunk, make_optimizer
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
    PassContext,
    SaveState,
    SegmentBackward,
    SegmentForward,
    SegmentGradient,
    SegmentOutput,
    StepDone,
    TrunkPlan,
    TrunkShard,
)


class Host:
    """The host's session: one trunk, its factors, and possibly their optimiser."""

    def __init__(self, party: Party, plan: TrunkPlan) -> None:
        settings = plan.settings
        torch.manual_seed(party.config.seed)  # dropout's; a new process's generator starts anywhere
        self.device = resolve_device(party.config.device)
        self.trunk = HostTrunk(
            config_from_json(plan.config),
            settings["placement"],
            LoraConfig.model_validate(settings["lora"]),
            self.device,
            rounded=settings["rounded"],
        )
        self.train = TrainConfig.model_validate(settings["train"]) if settings["optimizer_at"] == "host" else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.store = StateStore(party.directory, settings["fingerprint"])
        self._handlers: dict[type[Message], Any] = {
            SegmentForward: lambda m: SegmentOutput(self.trunk.forward(m)),
            SegmentBackward: lambda m: SegmentGradient(self.trunk.backward(m)),
            PassContext: self._context,
            Forget: self._forget,
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

    def _context(self, message: PassContext) -> None:
        self.trunk.set_context(message.context_id, message.attention_mask, message.cos, message.sin)

    def _forget(self, message: Forget) -> None:
        self.trunk.forget(message.cache_id)

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
        return StepDone(clip_and_step(self.optimizer, self.parameters, message.learning_rate, message.max_grad_norm))

    def _save(self, message: SaveState) -> Message:
        optimizer = self.optimizer or torch.optim.SGD(list(self.parameters.values()))
        self.store.save(message.step, optimizer_tensors(optimizer, self.parameters))
        return Acknowledged()

    def _load(self, message: LoadState) -> Message:
        optimizer = self.optimizer or torch.optim.SGD(list(self.parameters.values()))
        restore_optimizer(optimizer, self.parameters, self.store.load(message.step))
        return Acknowledged()


def run_host(party: Party) -> None:
    """The host: whatever the enclave asks, on masked numbers, until it says goodbye."""
    enclave = party.links["enclave"]
    host = Host(party, enclave.recv_as(TrunkPlan))
    enclave.send(Acknowledged())
    while True:
        message = enclave.recv()
        if isinstance(message, Goodbye):
            return
        answer = host.handle(message)
        if answer is not None:
            enclave.send(answer)
