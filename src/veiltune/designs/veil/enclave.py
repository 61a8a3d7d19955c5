"""The enclave (simulated here): takes the model, keeps its ends, folds and rotates the trunk, serves the owner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veiltune.designs.veil.backend import VeiledBackend
from veiltune.designs.veil.checks import Canaries, refuse_canaries
from veiltune.designs.veil.options import VeilOptions, refuse_sandwich_norms
from veiltune.designs.veil.protection import load_key, stream_key
from veiltune.engine import Engine
from veiltune.errors import CheckpointError, ConfigError
from veiltune.models.adapters import adapted_linears, factor_dtype, initial_factors
from veiltune.models.cut import Cut, owner_model
from veiltune.models.precision import round_between_operations
from veiltune.models.rotated import Folding, VeilPort, VeilStub, compute_norms_in_float64, install_veil_stub
from veiltune.models.skeleton import assign_parameter
from veiltune.models.trainable import make_trainable
from veiltune.parties.enclaved import EnclaveSession
from veiltune.parties.enclaved.checks import Sampler
from veiltune.parties.party import Party
from veiltune.parties.protected import ProtectionKey
from veiltune.secrets import MasterSecret
from veiltune.transport.messages import ModelCard


class Enclave(EnclaveSession):
    """See `EnclaveSession`: the rotation, and both ends of the model."""

    def __init__(self, party: Party, card: ModelCard) -> None:
        if not isinstance(party.options, VeilOptions):
            raise TypeError(f"options of {party.config.design}, not of veil")
        self.options = party.options
        self._protection: ProtectionKey | None = None
        super().__init__(party, card)
        key = stream_key(self.model_config, self.secret)
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
        self.port = self.veil_port = VeilPort(party.links["host"])
        self.sampler = Sampler.of(self.options.canaries, self.options.key_seed)
        self.veil_port.witness = self.canaries = self._make_canaries()
        self.model = owner_model(self.model_config, self.cut)
        self.stub: VeilStub = install_veil_stub(
            self.model, self.family, self.cut, self.veil_port, self.folding.stream, rounded=self.rounded
        )
        self._shapes: dict[str, tuple[int, int]] = {}

    def refuse(self) -> None:
        """See `EnclaveSession.refuse`."""
        self.cut = Cut.of(self.model_config, self.options.enclave_layers, self.options.enclave_top_layers)
        refuse_sandwich_norms(self.options, self.family)
        self._refuse_dropout()
        refuse_canaries(self.options, self.config, self.model_config, trains=self.party.job.verb in {"tune", "probe"})
        if self.options.protected is not None and self.rounded:
            raise ConfigError(
                "a protected checkpoint cannot be used where bfloat16 is imitated, as on this device",
                hint="set dtype = 'float32', and protect the model with --dtype float32",
            )

    def _make_canaries(self) -> Canaries | None:
        if self.sampler is None:
            return None
        directory = self.party.directory / "canaries"
        made = Canaries(self.model_config, self.cut, self.config, self.device, directory, self.sampler)
        self.at_end.callback(made.close)
        return made

    def _master_secret(self) -> MasterSecret:
        """See `EnclaveSession._master_secret`; a key from a file is bound to the provider's weights as well.

        Raises:
            CheckpointError: the key or the run to resume is of other weights.
        """
        if self.options.protected is not None:
            self._protection = load_key(self.options, self.card.fingerprint)
        if self.party.job.resume_step is None and self._protection is not None:
            return self._protection.master
        secret = super()._master_secret()
        if self._protection is not None and secret.reveal() != self._protection.master.reveal():
            raise CheckpointError(
                f"{self.options.protected!r} was protected again since this run began",
                hint="start anew with --overwrite",
            )
        return secret

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

    def divided(self) -> None:
        """See `EnclaveSession.divided`."""
        self.folding.settle({self.dtype, factor_dtype(self.dtype)}, self.device)

    def completed(self) -> None:
        """See `EnclaveSession.completed`."""
        if self.dtype == torch.float64:
            compute_norms_in_float64(self.model, self.family)

    def plan(self) -> dict[str, Any]:
        """See `EnclaveSession.plan`."""
        return {
            "bottom_layers": self.cut.bottom_layers,
            "top_layers": self.cut.top_layers,
            "optimizer_at": self.options.optimizer_at,
            "protected": None if self._protection is None else self._protection.manifest,
        }

    def divide(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `EnclaveSession.divide`: the host gets its tensors folded and rotated, unless it has them from its disk.

        Then the trunk's norms alone are wanted here: the maps of LoRA factors have their gains in them.
        """
        trunk: dict[str, Tensor] = {}
        for name, stored in tensors.items():
            value = stored.to(self.dtype)
            if self.cut.holds(self.family, name) == "trunk":
                trunk[name] = value
                path, _, leaf = name.rpartition(".")
                if path in self.folding.linears and leaf == "weight":
                    self._shapes[path] = self.family.fan(value)
            else:
                assign_parameter(self.model, name, value.to(self.device))
        if self._protection is None or self.canaries is not None:
            folded = self.folding.fold(trunk)
            if self.canaries is not None:
                self.canaries.learn(folded)
            return folded if self._protection is None else {}
        self.folding.fold({n: v for n, v in trunk.items() if n.rpartition(".")[0] not in self.folding.linears})
        return {}

    def engine(self) -> Engine:
        """See `EnclaveSession.engine`: factors are here and on the host."""
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
            self.stub, self.veil_port, self.folding, self.secret, self.store, own, trunk, self.config.train
        )
        backend.canaries = self.canaries
        backend.push(factors)
        return Engine(self.model, backend, self.device, self.party.links["owner"].send)
