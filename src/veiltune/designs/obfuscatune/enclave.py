"""The enclave (simulated here): takes the model, keeps the residual stream's half, masks the rest, serves the owner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veiltune.checkpoints import StateStore
from veiltune.config import Config
from veiltune.designs.obfuscatune.backend import ObfuscatedBackend
from veiltune.designs.obfuscatune.options import ObfuscaTuneOptions
from veiltune.engine import Engine
from veiltune.models.adapters import Keys, adapted_linears, factor_dtype, initial_factors
from veiltune.models.families import find_family
from veiltune.models.family import Family, Linear
from veiltune.models.precision import round_between_operations
from veiltune.models.remote import TrunkClient, install_stubs
from veiltune.models.skeleton import (
    DTYPES,
    assign_parameter,
    compute_dtype,
    config_from_json,
    empty_model,
    require_complete,
    resolve_device,
)
from veiltune.parties.clock import BorderClock, serve_owner
from veiltune.parties.party import Party
from veiltune.privacy.orthogonal import Key, make_key
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
    """The enclave's session: keys, the residual stream's half of the model, the training engine."""

    def __init__(self, party: Party, card: ModelCard) -> None:
        self.party = party
        self.card = card
        self.config: Config = party.config
        if not isinstance(party.options, ObfuscaTuneOptions):
            raise TypeError(f"options of {party.config.design}, not of obfuscatune")
        self.options = party.options
        self.device = resolve_device(self.config.device)
        self.dtype, self.rounded = compute_dtype(self.config.dtype, self.device)
        if party.job.native:
            self.dtype, self.rounded = DTYPES[self.config.dtype], False
        self.model_config = config_from_json(card.config)
        self.family: Family = find_family(self.model_config)
        self.num_layers = int(self.model_config.num_hidden_layers)
        self.store = StateStore(party.directory, self.config.fingerprint(), SealingKey.load_or_create(party.directory))
        self.secret = self._master_secret()
        # Dropout's, from the secret: who could foretell its zeros would know entries of the states.
        torch.manual_seed(int.from_bytes(self.secret.subkey("dropout")[:8], "little") >> 1)
        self.linears = list(self.family.linears(self.num_layers))
        self.keys = self._make_keys()
        self._open_key: Key | None = None
        self.client = TrunkClient(party.links["host"])
        self.model: Any = empty_model(self.model_config)
        self.adapted = adapted_linears(self.family, self.num_layers, self.config.lora)
        self.shapes = {linear.path: self._fan(linear.path) for linear in self.adapted}
        self.outputs = install_stubs(
            self.model,
            self.family,
            self.num_layers,
            self.options.placement,
            self.client,
            self.keys,
            rounded=self.rounded,
        )

    def _master_secret(self) -> MasterSecret:
        if self.party.job.resume_step is not None:
            return MasterSecret(bytes(self.store.load(self.party.job.resume_step)["master"].tolist()))
        if self.options.key_seed is not None:
            return MasterSecret.for_tests(self.options.key_seed)
        return MasterSecret.generate()

    def _make_keys(self) -> Keys:
        labels = sorted({linear.key for linear in self.linears})
        dim = int(self.model_config.hidden_size)
        kind, condition = self.options.matrix, self.options.condition_number
        keys = {label: make_key(kind, dim, self.secret, label, condition) for label in labels}
        if self.rounded:
            for key in keys.values():
                key.use_bfloat16_grid()
        return keys

    def _fan(self, path: str) -> tuple[int, int]:
        rows, columns = self.model.get_submodule(path).weight.shape
        return (rows, columns) if self.family.weights_in_out else (columns, rows)

    def provision(self) -> None:
        """Take the provider's stream: keep what is ours, mask what is the host's and pass it on, shard by shard."""
        provider, host = self.party.links["provider"], self.party.links["host"]
        settings = {
            "placement": self.options.placement,
            "optimizer_at": self.options.optimizer_at,
            "lora": self.config.lora.model_dump(mode="json", exclude={"init_seed"}),
            "train": self.config.train.model_dump(mode="json"),
            "rounded": self.rounded,
            "fingerprint": self.config.fingerprint(),
        }
        host.send(TrunkPlan(self.card.config, settings))
        host.recv_as(Acknowledged)
        while True:
            shard = provider.recv_as(WeightShard)
            masked = self._divide(shard.tensors)
            if masked:
                host.send(TrunkShard(masked))
                host.recv_as(Acknowledged)
            provider.send(Acknowledged())
            if shard.last:
                break
            del shard, masked
        self._close_key()
        self.model.tie_weights()
        require_complete(self.model)
        self.model.requires_grad_(requires_grad=False)
        if self.rounded:
            round_between_operations(self.model)

    def _divide(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masked tensors for the host; the others are put in their place here."""
        linears = {linear.path: linear for linear in self.linears}
        compact = self.options.placement == "compact"
        exposed = {f"{path}.weight" for _, path in self.family.exposed(self.num_layers)} if compact else set()
        masked: dict[str, Tensor] = {}
        for name, stored in tensors.items():
            value = stored.to(self.dtype)
            path, _, leaf = name.rpartition(".")
            linear = linears.get(path)
            if linear is not None and leaf == "weight":
                masked[name] = self._mask_weight(linear, value)
            elif linear is not None and linear.side == "output":
                self.outputs[path].bias = nn.Parameter(value.to(self.device), requires_grad=False)
            elif linear is not None or name in exposed:
                masked[name] = value  # input-side biases act after the key cancels; QK-norm gains act on Q and K
            else:
                assign_parameter(self.model, name, value.to(self.device))
        return masked

    def _mask_weight(self, linear: Linear, weight: Tensor) -> Tensor:
        row = weight if self.family.weights_in_out else weight.T
        key = self.keys[linear.key]
        if key is not self._open_key:
            self._close_key()
            self._open_key = key
        masked = key.mask_input_weight(row) if linear.side == "input" else key.mask_output_weight(row)
        return (masked if self.family.weights_in_out else masked.T).contiguous()

    def _close_key(self) -> None:
        """One key at a time is held in float64: weights that share a key come one after another."""
        if self._open_key is not None and not self.party.job.native:
            for dtype in {self.dtype, factor_dtype(self.dtype)}:
                self._open_key.settle(dtype, self.device)
        elif self._open_key is not None:
            self._open_key.release()
        self._open_key = None

    def engine(self) -> Engine:
        """The training engine over this model, with first factors on the host."""
        factors = initial_factors(self.shapes, self.config.lora, factor_dtype(self.dtype))
        here = self.options.optimizer_at == "enclave"
        parameters = {name: nn.Parameter(value.to(self.device)) for name, value in factors.items()} if here else {}
        backend = ObfuscatedBackend(
            self.client, self.adapted, self.keys, self.secret, self.store, parameters, self.config.train
        )
        backend.push(factors)
        return Engine(self.model, backend, self.device, self.party.links["owner"].send)

    def serve(self) -> None:
        """Answer the owner until it is done, then let the host go."""
        held = sum(parameter.numel() for parameter in self.model.parameters())
        clock = BorderClock(self.party, "host", "enclave's border", lambda: self.client.wait_seconds)
        serve_owner(self.party, self.engine, clock, held_parameters=held)
        self.party.links["host"].send(Goodbye())


def run_enclave(party: Party) -> None:
    """The enclave (simulated here): prove, take the model, mask and place it, serve the owner."""
    party.prove_enclave(SimulatedEnclave(party.config.fingerprint()), ("provider", "owner"))
    enclave = Enclave(party, party.links["provider"].recv_as(ModelCard))
    enclave.provision()
    enclave.serve()
