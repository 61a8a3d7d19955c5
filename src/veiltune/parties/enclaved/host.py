"""The untrusted host: one trunk in a secret basis, its factors, and possibly their optimiser; it does what the enclave asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.config import TrainConfig
from veiltune.engine import clip_and_step
from veiltune.errors import ProtocolError
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
)


class HostedTrunk(Protocol):
    """A trunk that the host computes on."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA factors, by flat name."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters of the trunk."""
        ...

    def load_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Take LoRA factors."""
        ...

    def ready(self) -> None:
        """Every parameter and factor has come."""
        ...

    def forget(self, cache_id: int) -> None:
        """Free a cache (> 0), or what passes have left (0)."""
        ...


Passes = Mapping[type[Message], Callable[[Any], Message | None]]
"""What answers a message of a pass; ``None`` where it wants no answer."""


class HostSession:
    """The host's session. A design's subclass builds the trunk, and adds what it answers in a pass.

    Args:
        party: the host.
        plan: what the enclave says of the trunk.
        trunk: empty yet.
        passes: by message, what answers it beside what is answered here.
    """

    trunk: HostedTrunk

    def __init__(self, party: Party, plan: TrunkPlan, trunk: HostedTrunk, passes: Passes) -> None:
        settings = plan.settings
        torch.manual_seed(party.config.seed)  # dropout's; a new process's generator starts anywhere
        self.trunk = trunk
        self.train = TrainConfig.model_validate(settings["train"]) if settings["optimizer_at"] == "host" else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.store = StateStore(party.directory, settings["fingerprint"])
        self._handlers: dict[type[Message], Callable[[Any], Message | None]] = {
            **passes,
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
        """Answer one message of the enclave; ``None`` where it wants no answer.

        Raises:
            ProtocolError: it is none that a host answers, or out of place.
        """
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"the host does not answer {type(message).__name__}")
        return handler(message)

    def after_step(self) -> None:
        """What a design does to the factors once a step was taken here; nothing by default."""

    def close(self) -> None:
        """The session is over, well or not; nothing by default."""

    def _shard(self, message: TrunkShard) -> Message:
        self.trunk.load(message.tensors)
        return Acknowledged()

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
        self.after_step()
        return StepDone(norm)

    def _state(self) -> torch.optim.Optimizer:
        """The optimiser, or one without state that stands for the parameters alone."""
        return self.optimizer or torch.optim.SGD(list(self.parameters.values()))

    def _save(self, message: SaveState) -> Message:
        self.store.save(message.step, optimizer_tensors(self._state(), self.parameters))
        return Acknowledged()

    def _load(self, message: LoadState) -> Message:
        restore_optimizer(self._state(), self.parameters, self.store.load(message.step))
        return Acknowledged()


def run_host(party: Party, session: Callable[[Party, TrunkPlan], HostSession]) -> None:
    """The host: whatever the enclave asks, on numbers it cannot read, until it says goodbye."""
    enclave = party.links["enclave"]
    host = session(party, enclave.recv_as(TrunkPlan))
    try:
        enclave.send(Acknowledged())
        while not isinstance(message := enclave.recv(), Goodbye):
            answer = host.handle(message)
            if answer is not None:
                enclave.send(answer)
    finally:
        host.close()
