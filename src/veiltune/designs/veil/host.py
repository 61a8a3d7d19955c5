"""The untrusted host of `veil`: the whole trunk, in a rotated basis, on one rank or shared by several."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.config import LoraConfig
from veiltune.designs.veil.group import RankGroup
from veiltune.designs.veil.options import VeilOptions
from veiltune.designs.veil.ranks import LeadingTrunk, RankProcesses, device_of_rank, lead
from veiltune.errors import CheckpointError, ConfigError, ProtocolError
from veiltune.models.cut import Cut
from veiltune.models.rotated import RotatedTrunk
from veiltune.models.rotated.native import Native, require_compiler
from veiltune.models.rotated.parallel import ParallelTrunk
from veiltune.models.skeleton import DTYPES, compute_dtype, config_from_json
from veiltune.parties.enclaved import HostSession
from veiltune.parties.enclaved.host import Passes
from veiltune.parties.party import Party
from veiltune.parties.protected import map_tensors, read_manifest
from veiltune.transport.messages import (
    FactorGradientsRequest,
    LoadState,
    Message,
    OptimizerStep,
    TrunkPlan,
    VeiledBackward,
    VeiledForward,
    VeiledGradient,
    VeiledOutput,
)

_HERE = "here"
"""In a plan's settings: what this host decides by itself, added by rank 0 for the others."""


class Host(HostSession):
    """See `HostSession`."""

    def __init__(self, party: Party, plan: TrunkPlan) -> None:
        options = party.options
        if not isinstance(options, VeilOptions):
            raise TypeError(f"options of {party.config.design}, not of veil")
        plan = _with_own_settings(party, options, plan)
        self._rotated: RotatedTrunk | LeadingTrunk
        if options.ranks == 1:
            self._rotated = build_trunk(plan, device_of_rank(party.config.device, 0))
        else:
            self._rotated = lead(plan, RankProcesses(options.ranks, options.rendezvous), build_share)
        trunk = self._rotated
        passes: Passes = {
            VeiledForward: lambda m: VeiledOutput(m.ticket, trunk.forward(m)),
            VeiledBackward: self._backward,
        }
        super().__init__(party, plan, trunk, passes)

    def _backward(self, message: VeiledBackward) -> Message | None:
        gradient = self._rotated.backward(message)
        return None if gradient is None else VeiledGradient(message.ticket, gradient)

    def handle(self, message: Message) -> Message | None:
        """See `HostSession.handle`; with several ranks, rank 0's whole factors and every rank's parts are kept in step."""
        trunk = self._rotated
        if isinstance(trunk, LeadingTrunk) and isinstance(message, (FactorGradientsRequest, OptimizerStep)):
            trunk.collect_gradients()
        answer = super().handle(message)
        if isinstance(trunk, LeadingTrunk) and isinstance(message, (LoadState, OptimizerStep)):
            trunk.spread()
        return answer

    def after_step(self) -> None:
        """See `HostSession.after_step`."""
        self._rotated.stay_centred()

    def close(self) -> None:
        """See `HostSession.close`."""
        if isinstance(self._rotated, LeadingTrunk):
            self._rotated.close()


def _with_own_settings(party: Party, options: VeilOptions, plan: TrunkPlan) -> TrunkPlan:
    """The plan with what every rank must know beside it.

    Raises:
        ConfigError: the trunk cannot be run as asked for on this machine.
    """
    device = device_of_rank(party.config.device, 0)
    wanted, rounded = compute_dtype(party.config.dtype, device)
    if plan.settings["rounded"] and rounded:
        for name, is_set in (("ranks", options.ranks > 1), ("compile", options.compile)):
            if is_set:
                raise ConfigError(
                    f"veil.{name} does not go with a CPU's imitation of bfloat16, which rounds after every module of one rank",
                    hint="set dtype = 'float32', or compute on a GPU",
                )
    if options.rendezvous is not None and options.ranks == 1:
        raise ConfigError(
            f"veil.rendezvous = {options.rendezvous!r}, and veil.ranks = 1: nobody is to come",
            hint="set veil.ranks to the number of all ranks, this host's first one included",
        )
    compiler = options.compile_backend if options.compile else None
    if compiler is not None:
        require_compiler(compiler, device)
    own = {
        "device": party.config.device,
        "dtype": str(DTYPES[party.config.dtype] if party.job.native else wanted).removeprefix("torch."),
        "protected": options.protected,
        "native": dataclasses.asdict(Native(options.checkpointing, compiler)),
    }
    return TrunkPlan(plan.config, {**plan.settings, _HERE: own})


def build_share(plan: TrunkPlan, group: RankGroup) -> ParallelTrunk:
    """One rank's share of the trunk, on its own device."""
    device = device_of_rank(plan.settings[_HERE]["device"], 0 if group.rank == 0 else int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trunk = build_trunk(plan, device, group)
    assert isinstance(trunk, ParallelTrunk)  # noqa: S101
    return trunk


def build_trunk(plan: TrunkPlan, device: torch.device, group: RankGroup | None = None) -> RotatedTrunk:
    """The trunk that a plan describes, or a rank's share of it; empty, unless it is on this machine's disk."""
    settings, config = plan.settings, config_from_json(plan.config)
    cut = Cut.of(config, settings["bottom_layers"], settings["top_layers"])
    lora, native = LoraConfig.model_validate(settings["lora"]), Native(**settings[_HERE]["native"])
    if group is None:
        trunk = RotatedTrunk(config, cut, lora, device, rounded=settings["rounded"], native=native)
    else:
        trunk = ParallelTrunk(config, cut, lora, device, group, native)
    if settings.get("protected") is not None:
        trunk.load(_protected_tensors(settings))
    return trunk


def _protected_tensors(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trunk from this machine's disk, mapped; the enclave has said which manifest it is to have.

    Raises:
        CheckpointError: it is not that protected checkpoint, not whole, or in another dtype than the session's.
    """
    own = settings[_HERE]
    if own["protected"] is None:
        raise ProtocolError("the enclave names a protected checkpoint, the host's options do not")
    directory = Path(own["protected"])
    manifest = read_manifest(directory)
    if manifest.digest() != settings["protected"]:
        raise CheckpointError(
            f"{str(directory)!r} is not the protected checkpoint that the enclave has the key of",
            hint="put an intact copy there",
        )
    tensors = map_tensors(directory, manifest)
    wanted = getattr(torch, own["dtype"])
    for name, value in tensors.items():
        if value.dtype != wanted:
            raise CheckpointError(
                f"{name!r} of {str(directory)!r} is {value.dtype}, the session computes in {wanted}",
                hint=f"protect the model with --dtype {own['dtype']}",
            )
    return tensors
