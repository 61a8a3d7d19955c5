"""The enclave's session (simulated here): prove, divide the model as it streams in, train for the owner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from veiltune.config import Config
from veiltune.engine import Engine
from veiltune.models.families import find_family
from veiltune.models.family import Family
from veiltune.models.skeleton import DTYPES, compute_dtype, config_from_json, require_complete, resolve_device
from veiltune.parties.clock import BorderClock, serve_owner
from veiltune.parties.enclaved.backend import HostPort
from veiltune.parties.enclaved.checks import Sampler
from veiltune.parties.enclaved.release import keep_to_policy, let_provider_go
from veiltune.parties.enclaved.sealed_copy import weights
from veiltune.parties.enclaved.state import WeightsStore
from veiltune.parties.party import Party
from veiltune.secrets import MasterSecret
from veiltune.tee.container.keys import RecipientKey
from veiltune.tee.enclave import Enclave
from veiltune.tee.sealing import SealingKey
from veiltune.transport.messages import Acknowledged, Goodbye, ModelCard, TrunkPlan, TrunkShard


class EnclaveSession(ABC):
    """What every enclave does. A design's subclass says how tensors are divided, and makes the engine.

    Args:
        party: the enclave.
        card: the provider's.

    Attributes:
        secret: all keys are derived from it; a resumed session has the sealed one.
        port: the way to the host.
        model: the enclave's half, empty until `provision`.
        sampler: of what the host returns, what is checked; ``None``: the host is believed.
        at_end: what goes with the session, however it ends.
    """

    port: HostPort
    model: Any
    sampler: Sampler | None = None

    def __init__(self, party: Party, card: ModelCard) -> None:
        self.party = party
        self.card = card
        self.at_end = ExitStack()
        self.config: Config = party.config
        self.device = resolve_device(self.config.device)
        self.dtype, self.rounded = compute_dtype(self.config.dtype, self.device)
        if party.job.native:
            self.dtype, self.rounded = DTYPES[self.config.dtype], False
        self.model_config = config_from_json(card.config)
        self.family: Family = find_family(self.model_config)
        self.refuse()
        sealing = SealingKey.load_or_create(party.directory)
        self.store = WeightsStore(party.directory, self.config.fingerprint(), sealing, card.fingerprint)
        self.secret = self._master_secret()
        # Dropout's, from the secret: who could foretell its zeros would know entries of the states.
        torch.manual_seed(int.from_bytes(self.secret.subkey("dropout")[:8], "little") >> 1)

    def _master_secret(self) -> MasterSecret:
        if self.party.job.resume_step is not None:
            return MasterSecret(bytes(self.store.load(self.party.job.resume_step)["master"].tolist()))
        seed: int | None = getattr(self.party.options, "key_seed", None)
        return MasterSecret.generate() if seed is None else MasterSecret.for_tests(seed)

    def refuse(self) -> None:  # noqa: B027 - most refuse nothing
        """Raise ConfigError for what the design cannot do with this model; nothing by default."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What the host is told of the trunk, beside adapter, training, precision and fingerprint."""

    @abstractmethod
    def divide(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put what is the enclave's in its place, and return the rest as the host may have it."""

    @abstractmethod
    def divided(self) -> None:
        """The last tensor was divided."""

    def completed(self) -> None:  # noqa: B027
        """The enclave's half is whole and frozen; nothing by default."""

    @abstractmethod
    def engine(self) -> Engine:
        """The training engine, with first factors in their places."""

    def provision(self, key: RecipientKey) -> None:
        """Take the weights as they come: keep what is ours, and pass the host what is its, shard by shard.

        Args:
            key: what the provider wraps for this session opens with it.
        """
        host = self.party.links["host"]
        common = {
            "lora": self.config.lora.model_dump(mode="json", exclude={"init_seed"}),
            "train": self.config.train.model_dump(mode="json"),
            "rounded": self.rounded,
            "fingerprint": self.config.fingerprint(),
        }
        host.send(TrunkPlan(self.card.config, self.plan() | common))
        host.recv_as(Acknowledged)
        for tensors in weights(self.party, key, self.dtype if self.party.job.native else None):
            passed_on = self.divide(tensors)
            if passed_on:
                host.send(TrunkShard(passed_on))
                host.recv_as(Acknowledged)
            del tensors, passed_on
        self.divided()
        self.model.tie_weights()
        require_complete(self.model)
        self.model.requires_grad_(requires_grad=False)
        self.completed()

    def serve(self) -> None:
        """Answer the owner until it is done, then let the host go."""
        held = sum(parameter.numel() for parameter in self.model.parameters())
        clock = BorderClock(self.party, "host", "enclave's border", lambda: self.port.wait_seconds)
        if self.sampler is not None:
            clock.more = self.sampler.figures
        serve_owner(self.party, lambda: keep_to_policy(self.engine(), self.party), clock, held_parameters=held)
        let_provider_go(self.party)
        self.party.links["host"].send(Goodbye())


def run_enclave(party: Party, session: Callable[[Party, ModelCard], EnclaveSession]) -> None:
    """The enclave: prove, take the model, divide it, serve the owner."""
    hardware = Enclave(certificates=party.config.enclave.certificates)
    proofs = party.prove_enclave(hardware, ("provider", "owner"))
    enclave = session(party, party.links["provider"].recv_as(ModelCard))
    with enclave.at_end:
        enclave.provision(hardware.key_for(proofs["provider"]))
        enclave.serve()
