"""`offline`: offsite tuning against a compressed emulator, decorrelated, with a quantised wire at inference.

*Reference.* GuardedTuning, Offline (arXiv 2501.04323). The emulator is smaller and coarser than `offsite`'s, so less of the
trunk is given away; the bottom is tuned under L = L_task + α·dCor(E, H), so that what it sends later, at inference, says less.

*Reveals.* As `offsite`, less what compression and rounding take away. The record's emulator report says by how much.
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
from veiltune.privacy.decorrelation import DecorrelationOptions
from veiltune.privacy.quantisation import WireOptions


class OfflineOptions(Section):
    """The table ``[offline]``."""

    emulator: EmulatorOptions = EmulatorOptions(compression="quantised")
    decorrelation: DecorrelationOptions = DecorrelationOptions(alpha=1.0)
    wire: WireOptions = WireOptions(activation_bits=8)
    plug_in: bool = Field(default=False, description="the owner returns what it trained; false: it keeps it")
    server: ServerOptions = ServerOptions()


def _plan(options: Any) -> SplitPlan:
    return SplitPlan(
        wire=options.wire,
        decorrelation=options.decorrelation if options.decorrelation.alpha > 0 else None,
        emulator=options.emulator,
        plug_in=options.plug_in,
        server=options.server,
    )


def _exact(_: BaseModel) -> bool:
    return False


_join = partial(join_with_layers, planner=_plan)

OFFLINE = Design(
    name="offline",
    summary="offsite tuning against a compressed emulator, decorrelated, with a quantised wire at inference",
    options=OfflineOptions,
    join=_join,
    roles={"owner": partial(own, join=_join), "provider": partial(provide_trunk, planner=_plan)},
    links=(("owner", "provider"),),
    data_plane=("owner", "provider"),
    trainer="owner",
    enclaves=frozenset(),
    reveals={
        "owner": {
            **SPLIT_OWNER_REVEALS,
            "EmulatorShard": Reveal("a compressed emulator of the trunk, the owner's to keep", "clear"),
        },
        "provider": {
            **SPLIT_PROVIDER_REVEALS,
            "EmulatorRequest": Reveal("that the emulator is asked for", "control"),
            "PlugIn": Reveal("what the owner trained, if plug_in was agreed on", "clear"),
        },
    },
    also_sees={"provider": ("the trunk, which is its own; bottom and top as they were before tuning",)},
    exactness="approximate: tuned against a stand-in for the trunk, and inference rounds what crosses",
    is_exact=_exact,
    baseline={"layers": "owner"},
    methods=frozenset({"lora", "full"}),
    services={"provider": partial(open_trunk, planner=_plan)},
)
