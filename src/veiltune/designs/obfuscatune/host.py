"""The untrusted host of `obfuscatune`: segments of masked linears, on masked states."""

from __future__ import annotations

from veiltune.config import LoraConfig
from veiltune.models.skeleton import config_from_json, resolve_device
from veiltune.models.trunk import HostTrunk
from veiltune.parties.enclaved import HostSession
from veiltune.parties.enclaved.host import Passes
from veiltune.parties.party import Party
from veiltune.transport.messages import (
    PassContext,
    SegmentBackward,
    SegmentForward,
    SegmentGradient,
    SegmentOutput,
    TrunkPlan,
)


class Host(HostSession):
    """See `HostSession`."""

    def __init__(self, party: Party, plan: TrunkPlan) -> None:
        settings = plan.settings
        trunk = HostTrunk(
            config_from_json(plan.config),
            settings["placement"],
            LoraConfig.model_validate(settings["lora"]),
            resolve_device(party.config.device),
            rounded=settings["rounded"],
        )
        passes: Passes = {
            SegmentForward: lambda m: SegmentOutput(trunk.forward(m)),
            SegmentBackward: lambda m: SegmentGradient(trunk.backward(m)),
            PassContext: lambda m: trunk.set_context(m.context_id, m.attention_mask, m.cos, m.sin),
        }
        super().__init__(party, plan, trunk, passes)
