"""The LoRA factors of `veil`: the trunk's on the host, rotated; those of the enclave's own blocks here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veiltune.checkpoints import StateStore
from veiltune.config import TrainConfig
from veiltune.designs.veil.checks import Canaries
from veiltune.models.rotated import Folding, VeilStub, rotate_factors, unrotate_factors, unrotate_gradients
from veiltune.models.rotated.stub import VeilPort
from veiltune.parties.enclaved import HostedBackend
from veiltune.parties.enclaved.backend import Parameters
from veiltune.secrets import MasterSecret


class VeiledBackend(HostedBackend):
    """See `HostedBackend`.

    Args:
        stub: the enclave's end of the trunk.
        port: its way to the host.
        folding: the change of basis.
        secret: as for `HostedBackend`, like the rest.
        store: sealed state.
        own: factors of the enclave's own blocks.
        trunk: plain factors of the trunk if the optimiser is here, else empty.
        train: the optimiser's settings.

    Attributes:
        canaries: passes that are computed again; ``None``: none.
    """

    canaries: Canaries | None = None

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
        super().__init__(port, secret, store, trunk, train, own)
        self.stub = stub
        self.veil_port = port
        self.folding = folding

    def to_host(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `HostedBackend.to_host`."""
        rotated = rotate_factors(factors, self.folding)
        if self.canaries is not None:
            self.canaries.pushed({name: value.detach().clone() for name, value in rotated.items()})
        return rotated

    def from_host(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `HostedBackend.from_host`."""
        return unrotate_factors(factors, self.folding)

    def gradients_from_host(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `HostedBackend.gradients_from_host`."""
        if self.canaries is not None:
            self.canaries.answered_factors(gradients)
        return unrotate_gradients(gradients, self.folding)

    def end_of_pass(self) -> None:
        """What had no backward can go; and so can halves of caches that are gone here."""
        self._forget(self.stub.caches.finished())

    def end_of_generation(self) -> None:
        """The host may forget its caches."""
        self._forget(self.stub.caches.forget())

    def _forget(self, caches: list[int]) -> None:
        self.veil_port.forget()
        for cache_id in caches:
            self.veil_port.forget_cache(cache_id)
