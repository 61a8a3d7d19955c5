"""`offsite`: plain offsite tuning. The owner tunes its layers against an emulator of the trunk; nothing crosses per step.

*Reference.* Xiao, Lin and Han 2023 (arXiv 2302.04870). The baseline of `offline`.

*Reveals.* The emulator, which is part of the trunk or an approximation of it, is the owner's to keep. Tuning reveals nothing
of the text; what was tuned goes back to the provider if ``plug_in``, and inference crosses as in `split`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import BaseModel, Field

from veiltune.config import Section
from veiltune.designs.base import SPLIT_OWNER_REVEALS, SPLIT_PROVIDER_REVEALS, Design, Reveal
from veiltune.models.emulators.options import EmulatorOptions
from veiltune.parties.owner import own
from veiltune.parties.split import ServerOptions, SplitPlan, join_with_layers, open_trunk, provide_trunk


class OffsiteOptions(Section):
    """The table ``[offsite]``."""

    emulator: EmulatorOptions = EmulatorOptions()
    plug_in: bool = Field(default=True, description="the owner returns what it trained; false: it keeps it")
    server: ServerOptions = ServerOptions()


def _plan(options: Any) -> SplitPlan:
    return SplitPlan(emulator=options.emulator, plug_in=options.plug_in, server=options.server)


def _exact(_: BaseModel) -> bool:
    return False


_join = partial(join_with_layers, planner=_plan)

OFFSITE = Design(
    name="offsite",
    summary="offsite tuning: the owner tunes against an emulator of the trunk, and plugs the result into the whole model",
    options=OffsiteOptions,
    join=_join,
    roles={"owner": partial(own, join=_join), "provider": partial(provide_trunk, planner=_plan)},
    links=(("owner", "provider"),),
    data_plane=("owner", "provider"),
    trainer="owner",
    enclaves=frozenset(),
    reveals={
        "owner": {
            **SPLIT_OWNER_REVEALS,
            "EmulatorShard": Reveal("an emulator of the trunk, the owner's to keep", "clear"),
        },
        "provider": {
            **SPLIT_PROVIDER_REVEALS,
            "EmulatorRequest": Reveal("that the emulator is asked for", "control"),
            "PlugIn": Reveal("what the owner trained, if plug_in was agreed on", "clear"),
        },
    },
    also_sees={"provider": ("the trunk, which is its own; bottom and top as they were before tuning",)},
    exactness="approximate: tuned against a stand-in for the trunk; inference through the trunk is exact",
    is_exact=_exact,
    baseline={"layers": "owner"},
    methods=frozenset({"lora", "full"}),
    services={"provider": partial(open_trunk, planner=_plan)},
)
