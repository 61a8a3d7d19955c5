"""The enclave (simulated here): takes the model, keeps its ends, folds and rotates the trunk, serves the owner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veiltune.checkpoints import StateStore
from veiltune.config import Config
from veiltune.designs.veil.backend import VeiledBackend
from veiltune.designs.veil.options import VeilOptions
from veiltune.engine import Engine
from veiltune.errors import ConfigError
from veiltune.models.adapters import adapted_linears, factor_dtype, initial_factors
from veiltune.models.cut import Cut, owner_model
from veiltune.models.families import find_family
from veiltune.models.precision import round_between_operations
from veiltune.models.rotated import Folding, VeilPort, VeilStub, compute_norms_in_float64, install_veil_stub
from veiltune.models.skeleton import (
    DTYPES,
    assign_parameter,
    compute_dtype,
    config_from_json,
    require_complete,
    resolve_device,
)
from veiltune.models.trainable import make_trainable
from veiltune.parties.clock import BorderClock, serve_owner
from veiltune.parties.party import Party
from veiltune.privacy.orthogonal import make_key
from veiltune.secrets import MasterSecret
from veiltune.tee.enclave import SimulatedEnclave
from veiltune.tee.sealing import SealingKey
from veiltune.transport.messages import (
    Acknowledged,
    Goodbye,
    ModelCard,
    TrunkPlan,
    TrunkShard,
    WeightShard,
)


class Enclave:
    """The enclave's session: the key, both ends of the model, the training engine."""

    def __init__(self, party: Party, card: ModelCard) -> None:
        self.party = party
        self.card = card
        self.config: Config = party.config
        if not isinstance(party.options, VeilOptions):
            raise TypeError(f"options of {party.config.design}, not of veil")
        self.options = party.options
        self.device = resolve_device(self.config.device)
        self.dtype, self.rounded = compute_dtype(self.config.dtype, self.device)
        if party.job.native:
            self.dtype, self.rounded = DTYPES[self.config.dtype], False
        self.model_config = config_from_json(card.config)
        self.family = find_family(self.model_config)
        self.cut = Cut.of(self.model_config, self.options.enclave_layers, self.options.enclave_top_layers)
        self._refuse_sandwich_norms()
        self._refuse_dropout()
        self.store = StateStore(party.directory, self.config.fingerprint(), SealingKey.load_or_create(party.directory))
        self.secret = self._master_secret()
        # Dropout's, from the secret: who could foretell its zeros would know entries of the states.
        torch.manual_seed(int.from_bytes(self.secret.subkey("dropout")[:8], "little") >> 1)
        key = make_key("orthogonal", int(self.model_config.hidden_size), self.secret, "stream")
        if self.rounded:
            key.use_bfloat16_grid()
        self.folding = Folding(
            self.model_config,
            self.cut,
            key,
            self.secret,
            inner=self.options.inner,
            must_invert=self.options.optimizer_at == "host",
        )
        self.port = VeilPort(party.links["host"])
        self.model: Any = owner_model(self.model_config, self.cut)
        self.stub: VeilStub = install_veil_stub(
            self.model, self.family, self.cut, self.port, self.folding.stream, rounded=self.rounded
        )
        self._shapes: dict[str, tuple[int, int]] = {}

    def _refuse_sandwich_norms(self) -> None:
        """R⁻¹·diag(g)·R, which stands for a norm on what a branch adds, has the rows of R for eigenvectors."""
        if self.options.sandwich_norms == "refuse" and any(segment.post_norm for segment in self.family.segments):
            raise ConfigError(
                f"{self.family.name} norms what its branches add, and what stands for such a norm gives the rotation away",
                hint="use obfuscatune, or set veil.sandwich_norms = 'open' to study it without that protection",
            )

    def _refuse_dropout(self) -> None:
        """A dropout of single channels does not commute with a rotation; one of all or none of them does."""
        name = self.family.residual_dropout
        found = {"lora.dropout": self.config.lora.dropout}
        if name is not None:
            found[f"{name} of the model"] = float(getattr(self.model_config, name))
        for what, probability in found.items():
            if self.party.job.verb == "tune" and self.options.dropout == "refuse" and 0 < probability < 1:
                raise ConfigError(
                    f"{what} = {probability} drops single channels of the trunk's states, which does not commute with a rotation",
                    hint="set veil.dropout = 'rotated' to drop rotated channels instead: as strong, but not the same training",
                )

    def _master_secret(self) -> MasterSecret:
        if self.party.job.resume_step is not None:
            return MasterSecret(bytes(self.store.load(self.party.job.resume_step)["master"].tolist()))
        if self.options.key_seed is not None:
            return MasterSecret.for_tests(self.options.key_seed)
        return MasterSecret.generate()

    def provision(self) -> None:
        """Take the provider's stream: keep what is ours, fold what is the host's and pass it on, shard by shard."""
        provider, host = self.party.links["provider"], self.party.links["host"]
        host.send(TrunkPlan(self.card.config, self._plan()))
        host.recv_as(Acknowledged)
        while True:
            shard = provider.recv_as(WeightShard)
            folded = self._divide(shard.tensors)
            if folded:
                host.send(TrunkShard(folded))
                host.recv_as(Acknowledged)
            provider.send(Acknowledged())
            if shard.last:
                break
            del shard, folded
        self.folding.settle({self.dtype, factor_dtype(self.dtype)}, self.device)
        self.model.tie_weights()
        require_complete(self.model)
        self.model.requires_grad_(requires_grad=False)
        if self.dtype == torch.float64:
            compute_norms_in_float64(self.model, self.family)

    def _plan(self) -> dict[str, Any]:
        return {
            "bottom_layers": self.cut.bottom_layers,
            "top_layers": self.cut.top_layers,
            "optimizer_at": self.options.optimizer_at,
            "lora": self.config.lora.model_dump(mode="json", exclude={"init_seed"}),
            "train": self.config.train.model_dump(mode="json"),
            "rounded": self.rounded,
            "fingerprint": self.config.fingerprint(),
        }

    def _divide(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Folded tensors for the host; the others are put in their place here."""
        trunk: dict[str, Tensor] = {}
        for name, stored in tensors.items():
            value = stored.to(self.dtype)
            if self.cut.holds(self.family, name) == "trunk":
                trunk[name] = value
                self._note_shape(name, value)
            else:
                assign_parameter(self.model, name, value.to(self.device))
        return self.folding.fold(trunk)

    def _note_shape(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        if path in self.folding.linears and leaf == "weight":
            rows, columns = value.shape
            self._shapes[path] = (rows, columns) if self.family.weights_in_out else (columns, rows)

    def engine(self) -> Engine:
        """The training engine over this model, with first factors here and on the host."""
        lora, dtype = self.config.lora, factor_dtype(self.dtype)
        own = make_trainable(
            self.model, self.family, self.cut.owner_layers, lora, "lora", dtype=self.dtype, device=self.device
        )
        if self.rounded:
            round_between_operations(self.model)
        linears = adapted_linears(self.family, self.cut.num_layers, lora, self.cut.trunk)
        factors = initial_factors({linear.path: self._shapes[linear.path] for linear in linears}, lora, dtype)
        factors = {name: value.to(self.device) for name, value in factors.items()}
        here = self.options.optimizer_at == "enclave"
        trunk = {name: nn.Parameter(value) for name, value in factors.items()} if here else {}
        backend = VeiledBackend(
            self.stub, self.port, self.folding, self.secret, self.store, own, trunk, self.config.train
        )
        backend.push(factors)
        return Engine(self.model, backend, self.device, self.party.links["owner"].send)

    def serve(self) -> None:
        """Answer the owner until it is done, then let the host go."""
        held = sum(parameter.numel() for parameter in self.model.parameters())
        clock = BorderClock(self.party, "host", "enclave's border", lambda: self.port.wait_seconds)
        serve_owner(self.party, self.engine, clock, held_parameters=held)
        self.party.links["host"].send(Goodbye())


def run_enclave(party: Party) -> None:
    """The enclave (simulated here): prove, take the model, fold and place it, serve the owner."""
    party.prove_enclave(SimulatedEnclave(party.config.fingerprint()), ("provider", "owner"))
    enclave = Enclave(party, party.links["provider"].recv_as(ModelCard))
    enclave.provision()
    enclave.serve()
