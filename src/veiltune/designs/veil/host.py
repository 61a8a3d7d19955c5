"""The untrusted host of `veil`: the whole trunk, in a rotated basis."""

from __future__ import annotations

from veiltune.config import LoraConfig
from veiltune.models.cut import Cut
from veiltune.models.rotated import RotatedTrunk
from veiltune.models.skeleton import config_from_json, resolve_device
from veiltune.parties.enclaved import HostSession
from veiltune.parties.enclaved.host import Passes
from veiltune.parties.party import Party
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

    def _backward(self, message: VeiledBackward) -> Message | None:
        gradient = self._rotated.backward(message)
        return None if gradient is None else VeiledGradient(message.ticket, gradient)

    def after_step(self) -> None:
        """See `HostSession.after_step`."""
        self._rotated.stay_centred()
