"""The LoRA factors of `obfuscatune`, as the enclave's training engine sees them: held by the host, masked."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.config import TrainConfig
from veiltune.engine import Backend, clip_and_step
from veiltune.models.adapters import Keys, mask_factors, unmask_factor_gradients, unmask_factors
from veiltune.models.family import Linear
from veiltune.models.remote import TrunkClient
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


class ObfuscatedBackend(Backend):
    """Factors on the host in the obfuscated basis; the optimiser there, or here in the plain basis.

    Args:
        client: the enclave's end of the trunk.
        linears: the adapted linears.
        keys: every key of the trunk.
        secret: the master secret, which is all a sealed checkpoint must keep of the keys.
        store: sealed state.
        parameters: plain-basis factors if the optimiser is here, else empty.
        train: the optimiser's settings.
    """

    def __init__(
        self,
        client: TrunkClient,
        linears: list[Linear],
        keys: Keys,
        secret: MasterSecret,
        store: StateStore,
        parameters: dict[str, nn.Parameter],
        train: TrainConfig,
    ) -> None:
        self.client = client
        self.linears = linears
        self.keys = keys
        self.secret = secret
        self.store = store
        self.parameters = parameters
        self.optimizer = make_optimizer(parameters, train) if parameters else None

    def _ask(self, request: Message, answer: type[Any]) -> Any:
        start = time.perf_counter()
        self.client.channel.send(request)
        reply = self.client.channel.recv_as(answer)
        self.client.wait_seconds += time.perf_counter() - start
        return reply

    def push(self, factors: dict[str, Tensor]) -> None:
        """Send plain factors to the host, masked."""
        self._ask(Factors(mask_factors(factors, self.linears, self.keys)), Acknowledged)

    def _fetch_gradients(self, *, clear: bool) -> dict[str, Tensor]:
        masked = self._ask(FactorGradientsRequest(clear), FactorGradients).tensors
        return unmask_factor_gradients(masked, self.linears, self.keys)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """See `Backend.step`. With the optimiser on the host, the norm is that of the obfuscated gradients."""
        if self.optimizer is None:
            return self._ask(OptimizerStep(learning_rate, max_grad_norm), StepDone).grad_norm
        for name, gradient in self._fetch_gradients(clear=True).items():
            self.parameters[name].grad = gradient.to(self.parameters[name])
        norm = clip_and_step(self.optimizer, self.parameters, learning_rate, max_grad_norm)
        self.push({name: value.detach() for name, value in self.parameters.items()})
        return norm

    def gradients(self) -> dict[str, Tensor]:
        """See `Backend.gradients`."""
        return self._fetch_gradients(clear=False)

    def factors(self) -> dict[str, Tensor]:
        """See `Backend.factors`."""
        if self.optimizer is not None:
            return {name: value.detach() for name, value in self.parameters.items()}
        return unmask_factors(self._ask(FactorsRequest(), Factors).tensors, self.linears, self.keys)

    def save(self, step: int) -> None:
        """Seal the master secret and whatever is trained here; the host writes its masked share."""
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
            self.push({name: value.detach() for name, value in self.parameters.items()})

    def end_of_pass(self) -> None:
        """The host may forget graphs and contexts."""
        self.client.forget()

    def end_of_generation(self) -> None:
        """The host may forget its caches."""
        self.client.forget_caches()
