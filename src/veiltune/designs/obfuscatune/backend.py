"""The LoRA factors of `obfuscatune`: all of them on the host, masked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veiltune.checkpoints import StateStore
from veiltune.config import TrainConfig
from veiltune.designs.obfuscatune.checks import SpotChecks
from veiltune.designs.obfuscatune.reruns import SegmentReruns
from veiltune.models.adapters import Keys, mask_factors, unmask_factor_gradients, unmask_factors
from veiltune.models.family import Linear
from veiltune.models.remote import TrunkClient
from veiltune.parties.enclaved import HostedBackend
from veiltune.parties.enclaved.backend import Parameters
from veiltune.secrets import MasterSecret


class ObfuscatedBackend(HostedBackend):
    """See `HostedBackend`.

    Args:
        client: the enclave's end of the trunk.
        linears: the adapted linears.
        keys: every key of the trunk.
        secret: as for `HostedBackend`, like ``store``, ``trunk`` and ``train``.
        store: sealed state.
        trunk: plain factors if the optimiser is here, else empty.
        train: the optimiser's settings.
        checks: of what the host returns; ``None``: none.
    """

    def __init__(
        self,
        client: TrunkClient,
        linears: list[Linear],
        keys: Keys,
        secret: MasterSecret,
        store: StateStore,
        trunk: Parameters,
        train: TrainConfig,
        checks: SpotChecks | SegmentReruns | None = None,
    ) -> None:
        super().__init__(client, secret, store, trunk, train)
        self.client = client
        self.linears = linears
        self.keys = keys
        self.checks = checks

    def to_host(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `HostedBackend.to_host`."""
        masked = mask_factors(factors, self.linears, self.keys)
        if self.checks is not None:
            self.checks.pushed({name: value.detach().clone() for name, value in masked.items()})
        return masked

    def from_host(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `HostedBackend.from_host`."""
        return unmask_factors(factors, self.linears, self.keys)

    def gradients_from_host(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `HostedBackend.gradients_from_host`."""
        if self.checks is not None:
            self.checks.answered_factors(gradients)
        return unmask_factor_gradients(gradients, self.linears, self.keys)

    def end_of_pass(self) -> None:
        """The host may forget graphs and contexts."""
        self.client.forget()

    def end_of_generation(self) -> None:
        """The host may forget its caches."""
        self.client.forget_caches()
