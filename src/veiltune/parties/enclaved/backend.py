"""LoRA factors as the enclave's training engine sees them: the trunk's on the host in a secret basis, others in the enclave."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.config import TrainConfig
from veiltune.engine import Backend, clip_and_step
from veiltune.models.trunk import make_optimizer
from veiltune.secrets import MasterSecret
from veiltune.transport.channel import Channel
from veiltune.transport.messages import (
    Acknowledged,
    FactorGradients,
    FactorGradientsRequest,
    Factors,
    FactorsRequest,
    LoadState,
    Message,
    OptimizerStep,
    SaveState,
    StepDone,
)

Parameters = Mapping[str, nn.Parameter]


class HostPort(Protocol):
    """The enclave's way to the host."""

    channel: Channel
    wait_seconds: float


class HostedBackend(Backend):
    """Factors of the trunk on the host; their optimiser there, in its basis, or here in the plain one.

    With the optimiser on the host, its gradients and the enclave's are clipped each by their own norm, the former in the
    host's basis.

    Args:
        port: the way to the host; counts the seconds spent waiting.
        secret: the master secret, which is all a sealed checkpoint must keep of the keys.
        store: sealed state.
        trunk: plain factors of the trunk if the optimiser is here, else empty.
        train: the optimiser's settings.
        own: plain factors of blocks that are in the enclave.
    """

    def __init__(
        self,
        port: HostPort,
        secret: MasterSecret,
        store: StateStore,
        trunk: Parameters,
        train: TrainConfig,
        own: Parameters | None = None,
    ) -> None:
        self.port = port
        self.secret = secret
        self.store = store
        self.own = dict(own or {})
        self.trunk = dict(trunk)
        self.parameters = {**self.own, **self.trunk}
        self.optimizer = make_optimizer(self.parameters, train) if self.parameters else None

    @abstractmethod
    def to_host(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Plain factors in the host's basis."""

    @abstractmethod
    def from_host(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The host's factors in the plain basis."""

    @abstractmethod
    def gradients_from_host(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of the host's factors as those of the plain ones."""

    def _ask(self, request: Message, answer: type[Any]) -> Any:
        start = time.perf_counter()
        self.port.channel.send(request)
        reply = self.port.channel.recv_as(answer)
        self.port.wait_seconds += time.perf_counter() - start
        return reply

    def push(self, factors: Mapping[str, Tensor]) -> None:
        """Send plain factors of the trunk to the host, in its basis."""
        self._ask(Factors(self.to_host(factors)), Acknowledged)

    def _push_own_copy(self) -> None:
        self.push({name: value.detach() for name, value in self.trunk.items()})

    def _fetch_gradients(self, *, clear: bool) -> dict[str, Tensor]:
        return self.gradients_from_host(self._ask(FactorGradientsRequest(clear), FactorGradients).tensors)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """See `Backend.step`."""
        if self.trunk:
            for name, gradient in self._fetch_gradients(clear=True).items():
                self.trunk[name].grad = gradient.to(self.trunk[name])
        norm = 0.0
        if self.optimizer is not None:
            norm = clip_and_step(self.optimizer, self.parameters, learning_rate, max_grad_norm)
        if self.trunk:
            self._push_own_copy()
            return norm
        return math.hypot(norm, self._ask(OptimizerStep(learning_rate, max_grad_norm), StepDone).grad_norm)

    def gradients(self) -> dict[str, Tensor]:
        """See `Backend.gradients`."""
        own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.own.items()}
        return own | self._fetch_gradients(clear=False)

    def factors(self) -> dict[str, Tensor]:
        """See `Backend.factors`."""
        here = {name: value.detach() for name, value in self.parameters.items()}
        if self.trunk:
            return here
        return here | self.from_host(self._ask(FactorsRequest(), Factors).tensors)

    def save(self, step: int) -> None:
        """Seal the master secret and whatever is trained here; the host writes its own share."""
        tensors = {"master": torch.frombuffer(bytearray(self.secret.reveal()), dtype=torch.uint8)}
        tensors["rng"] = torch.get_rng_state()
        if self.optimizer is not None:
            tensors |= optimizer_tensors(self.optimizer, self.parameters)
        self.store.save(step, tensors)
        self._ask(SaveState(step), Acknowledged)

    def load(self, step: int) -> None:
        """Undo `save`. The keys were derived from the sealed secret before the trunk was built."""
        tensors = self.store.load(step)
        torch.set_rng_state(tensors["rng"].to(torch.uint8))
        self._ask(LoadState(step), Acknowledged)
        if self.optimizer is not None:
            restore_optimizer(self.optimizer, self.parameters, tensors)
        if self.trunk:
            self._push_own_copy()
