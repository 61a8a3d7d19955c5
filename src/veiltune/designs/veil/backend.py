"""The LoRA factors of `veil`, as the enclave's training engine sees them: the trunk's on the host; its own here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.config import TrainConfig
from veiltune.engine import Backend, clip_and_step
from veiltune.models.rotated import Folding, VeilStub, rotate_factors, unrotate_factors, unrotate_gradients
from veiltune.models.rotated.stub import VeilPort
from veiltune.models.trunk import make_optimizer
from veiltune.secrets import MasterSecret
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


class VeiledBackend(Backend):
    """Factors in two places, one adapter.

    With the optimiser on the host, the trunk's gradients and the enclave's are clipped each by their own norm, the former in the
    rotated basis.

    Args:
        stub: the enclave's end of the trunk.
        port: its way to the host.
        folding: the change of basis.
        secret: the master secret, which is all a sealed checkpoint must keep of the keys.
        store: sealed state.
        own: factors of the enclave's own blocks.
        trunk: plain factors of the trunk if the optimiser is here, else empty.
        train: the optimiser's settings.
    """

    def __init__(
        self,
        stub: VeilStub,
        port: VeilPort,
        folding: Folding,
        secret: MasterSecret,
        store: StateStore,
        own: Parameters,
        trunk: Parameters,
        train: TrainConfig,
    ) -> None:
        self.stub = stub
        self.port = port
        self.folding = folding
        self.secret = secret
        self.store = store
        self.own = dict(own)
        self.trunk = dict(trunk)
        self.parameters = {**self.own, **self.trunk}
        self.optimizer = make_optimizer(self.parameters, train) if self.parameters else None

    def _ask(self, request: Message, answer: type[Any]) -> Any:
        start = time.perf_counter()
        self.port.channel.send(request)
        reply = self.port.channel.recv_as(answer)
        self.port.wait_seconds += time.perf_counter() - start
        return reply

    def push(self, factors: Mapping[str, Tensor]) -> None:
        """Send plain factors of the trunk to the host, rotated."""
        self._ask(Factors(rotate_factors(factors, self.folding)), Acknowledged)

    def _push_own_copy(self) -> None:
        self.push({name: value.detach() for name, value in self.trunk.items()})

    def _fetch_gradients(self, *, clear: bool) -> dict[str, Tensor]:
        return unrotate_gradients(self._ask(FactorGradientsRequest(clear), FactorGradients).tensors, self.folding)

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
        return here | unrotate_factors(self._ask(FactorsRequest(), Factors).tensors, self.folding)

    def save(self, step: int) -> None:
        """Seal the master secret and whatever is trained here; the host writes its rotated share."""
        tensors = {"master": torch.frombuffer(bytearray(self.secret.reveal()), dtype=torch.uint8)}
        tensors["rng"] = torch.get_rng_state()
        if self.optimizer is not None:
            tensors |= optimizer_tensors(self.optimizer, self.parameters)
        self.store.save(step, tensors)
        self._ask(SaveState(step), Acknowledged)

    def load(self, step: int) -> None:
        """Undo `save`. The keys were derived from the sealed secret before the trunk was folded."""
        tensors = self.store.load(step)
        torch.set_rng_state(tensors["rng"].to(torch.uint8))
        self._ask(LoadState(step), Acknowledged)
        if self.optimizer is not None:
            restore_optimizer(self.optimizer, self.parameters, tensors)
        if self.trunk:
            self._push_own_copy()

    def end_of_pass(self) -> None:
        """What had no backward can go; and so can halves of caches that are gone here."""
        self.port.forget()
        for cache_id in self.stub.caches.finished():
            self.port.forget_cache(cache_id)

    def end_of_generation(self) -> None:
        """The host may forget its caches."""
        self.port.forget()
        for cache_id in self.stub.caches.forget():
            self.port.forget_cache(cache_id)
