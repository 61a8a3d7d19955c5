"""The untrusted host of `veil`: the whole trunk, in a rotated basis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veiltune.config import LoraConfig
from veiltune.designs.veil.options import VeilOptions
from veiltune.errors import CheckpointError, ProtocolError
from veiltune.models.cut import Cut
from veiltune.models.rotated import RotatedTrunk
from veiltune.models.skeleton import DTYPES, compute_dtype, config_from_json, resolve_device
from veiltune.parties.enclaved import HostSession
from veiltune.parties.enclaved.host import Passes
from veiltune.parties.party import Party
from veiltune.parties.protected import map_tensors, read_manifest
from veiltune.transport.messages import (
    Message,
    TrunkPlan,
    VeiledBackward,
    VeiledForward,
    VeiledGradient,
    VeiledOutput,
)


class Host(HostSession):
    """See `HostSession`."""

    def __init__(self, party: Party, plan: TrunkPlan) -> None:
        settings = plan.settings
        config = config_from_json(plan.config)
        self._rotated = RotatedTrunk(
            config,
            Cut.of(config, settings["bottom_layers"], settings["top_layers"]),
            LoraConfig.model_validate(settings["lora"]),
            resolve_device(party.config.device),
            rounded=settings["rounded"],
        )
        passes: Passes = {
            VeiledForward: lambda m: VeiledOutput(m.ticket, self._rotated.forward(m)),
            VeiledBackward: self._backward,
        }
        super().__init__(party, plan, self._rotated, passes)
        if settings.get("protected") is not None:
            self._load_protected(party, settings)

    def _load_protected(self, party: Party, settings: Mapping[str, Any]) -> None:
        """Take the trunk from this machine's disk, mapped; the enclave has said which manifest it is to have.

        Raises:
            CheckpointError: it is not that protected checkpoint, not whole, or in another dtype than the session's.
        """
        if not isinstance(party.options, VeilOptions) or party.options.protected is None:
            raise ProtocolError("the enclave names a protected checkpoint, the host's options do not")
        directory = Path(party.options.protected)
        manifest = read_manifest(directory)
        if manifest.digest() != settings["protected"]:
            raise CheckpointError(
                f"{str(directory)!r} is not the protected checkpoint that the enclave has the key of",
                hint="put an intact copy there",
            )
        tensors = map_tensors(directory, manifest)
        wanted, _ = compute_dtype(party.config.dtype, self._rotated.device)
        if party.job.native:
            wanted = DTYPES[party.config.dtype]
        for name, value in tensors.items():
            if value.dtype != wanted:
                raise CheckpointError(
                    f"{name!r} of {str(directory)!r} is {value.dtype}, the session computes in {wanted}",
                    hint=f"protect the model with --dtype {str(wanted).removeprefix('torch.')}",
                )
        self.trunk.load(tensors)

    def _backward(self, message: VeiledBackward) -> Message | None:
        gradient = self._rotated.backward(message)
        return None if gradient is None else VeiledGradient(message.ticket, gradient)

    def after_step(self) -> None:
        """See `HostSession.after_step`."""
        self._rotated.stay_centred()
