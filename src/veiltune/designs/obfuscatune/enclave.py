"""The enclave (simulated here): takes the model, keeps the residual stream's half, masks the rest, serves the owner."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veiltune.designs.obfuscatune.backend import ObfuscatedBackend
from veiltune.designs.obfuscatune.checks import SpotChecks, refuse_spot_checks
from veiltune.designs.obfuscatune.options import ObfuscaTuneOptions
from veiltune.designs.obfuscatune.reruns import SegmentReruns
from veiltune.engine import Engine
from veiltune.models.adapters import Keys, adapted_linears, factor_dtype, initial_factors
from veiltune.models.family import Linear
from veiltune.models.precision import round_between_operations
from veiltune.models.remote import TrunkClient, install_stubs
from veiltune.models.skeleton import (
    assign_parameter,
    empty_model,
)
from veiltune.parties.enclaved import EnclaveSession
from veiltune.parties.enclaved.checks import Sampler
from veiltune.parties.party import Party
from veiltune.privacy.orthogonal import Key, make_key
from veiltune.transport.messages import (
    ModelCard,
)


class Enclave(EnclaveSession):
    """See `EnclaveSession`: keys, and the residual stream's half of the model."""

    def __init__(self, party: Party, card: ModelCard) -> None:
        if not isinstance(party.options, ObfuscaTuneOptions):
            raise TypeError(f"options of {party.config.design}, not of obfuscatune")
        self.options = party.options
        super().__init__(party, card)
        self.num_layers = int(self.model_config.num_hidden_layers)
        self.linears = list(self.family.linears(self.num_layers))
        self.keys = self._make_keys()
        self._open_key: Key | None = None
        self.port = self.client = TrunkClient(party.links["host"])
        self.sampler = Sampler.of(self.options.spot_checks, self.options.key_seed)
        self.client.witness = self.checks = self._make_checks()
        self.model = empty_model(self.model_config)
        self.adapted = adapted_linears(self.family, self.num_layers, self.config.lora)
        self.shapes = {
            linear.path: self.family.fan(self.model.get_parameter(f"{linear.path}.weight")) for linear in self.adapted
        }
        self.outputs = install_stubs(
            self.model,
            self.family,
            self.num_layers,
            self.options.placement,
            self.client,
            self.keys,
            rounded=self.rounded,
        )

    def refuse(self) -> None:
        """See `EnclaveSession.refuse`."""
        trains = self.party.job.verb in {"tune", "probe"}
        refuse_spot_checks(self.options, self.config, self.model_config, trains=trains)

    def _make_checks(self) -> SpotChecks | SegmentReruns | None:
        if self.sampler is None:
            return None
        lora = self.config.lora
        if self.options.placement == "paper":
            return SpotChecks(self.family, self.num_layers, lora.alpha / lora.rank, self.sampler)
        directory = self.party.directory / "checks"
        made = SegmentReruns(self.model_config, lora, self.device, directory, self.keys, self.sampler)
        self.at_end.callback(made.close)
        return made

    def _make_keys(self) -> Keys:
        labels = sorted({linear.key for linear in self.linears})
        dim = int(self.model_config.hidden_size)
        kind, condition = self.options.matrix, self.options.condition_number
        keys = {label: make_key(kind, dim, self.secret, label, condition) for label in labels}
        if self.rounded:
            for key in keys.values():
                key.use_bfloat16_grid()
        return keys

    def plan(self) -> dict[str, Any]:
        """See `EnclaveSession.plan`."""
        return {"placement": self.options.placement, "optimizer_at": self.options.optimizer_at}

    def completed(self) -> None:
        """See `EnclaveSession.completed`."""
        if self.rounded:
            round_between_operations(self.model)

    def divide(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `EnclaveSession.divide`: the host gets its tensors masked."""
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
        if self.checks is not None and masked:
            self.checks.learn(masked)
        return masked

    def _mask_weight(self, linear: Linear, weight: Tensor) -> Tensor:
        row = weight if self.family.weights_in_out else weight.T
        key = self.keys[linear.key]
        if key is not self._open_key:
            self._close_key()
            self._open_key = key
        masked = key.mask_input_weight(row) if linear.side == "input" else key.mask_output_weight(row)
        return (masked if self.family.weights_in_out else masked.T).contiguous()

    def divided(self) -> None:
        """See `EnclaveSession.divided`."""
        self._close_key()

    def _close_key(self) -> None:
        """One key at a time is held in float64: weights that share a key come one after another."""
        if self._open_key is not None and not self.party.job.native:
            for dtype in {self.dtype, factor_dtype(self.dtype)}:
                self._open_key.settle(dtype, self.device)
        elif self._open_key is not None:
            self._open_key.release()
        self._open_key = None

    def engine(self) -> Engine:
        """See `EnclaveSession.engine`: all factors are on the host."""
        factors = initial_factors(self.shapes, self.config.lora, factor_dtype(self.dtype))
        here = self.options.optimizer_at == "enclave"
        parameters = {name: nn.Parameter(value.to(self.device)) for name, value in factors.items()} if here else {}
        backend = ObfuscatedBackend(
            self.client, self.adapted, self.keys, self.secret, self.store, parameters, self.config.train, self.checks
        )
        backend.push(factors)
        return Engine(self.model, backend, self.device, self.party.links["owner"].send)
