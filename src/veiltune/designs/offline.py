"""`offline`: offsite tuning against a compressed emulator, decorrelated, with a quantised wire at inference.

*Reference.* GuardedTuning, Offline (arXiv 2501.04323). The emulator is smaller and coarser than `offsite`'s, so less of the
trunk is given away; the bottom is tuned under L = L_task + α·dCor(E, H), so that what it sends later, at inference, says less.
With ``last_positions`` (ours: see `models.sent_positions`) most of it is never sent; the same positions skip the emulator, so
that inference is what was tuned for.

*Reveals.* As `offsite`, less what compression and rounding take away. The record's emulator report says by how much.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from veiltune.config import Section
from veiltune.designs.base import OWNER_SEES_EMULATOR, PROVIDER_SEES_RESULT, cut_design
from veiltune.models.emulators.options import EmulatorOptions
from veiltune.parties.split import LastPositions, ServerOptions, SplitPlan
from veiltune.privacy.decorrelation import DecorrelationOptions
from veiltune.privacy.quantisation import WireOptions


class OfflineOptions(Section):
    """The table ``[offline]``."""

    emulator: EmulatorOptions = EmulatorOptions(compression="quantised")
    decorrelation: DecorrelationOptions = DecorrelationOptions(alpha=1.0)
    wire: WireOptions = WireOptions(activation_bits=8)
    plug_in: bool = Field(default=False, description="the owner returns what it trained; false: it keeps it")
    last_positions: LastPositions = 0
    server: ServerOptions = ServerOptions()


def _plan(options: Any) -> SplitPlan:
    return SplitPlan(
        wire=options.wire,
        decorrelation=options.decorrelation if options.decorrelation.alpha > 0 else None,
        emulator=options.emulator,
        plug_in=options.plug_in,
        last_positions=options.last_positions,
        server=options.server,
    )


def _exact(_: BaseModel) -> bool:
    return False


OFFLINE = cut_design(
    name="offline",
    summary="offsite tuning against a compressed emulator, decorrelated, with a quantised wire at inference",
    options=OfflineOptions,
    plan=_plan,
    owner_sees=OWNER_SEES_EMULATOR,
    provider_sees=PROVIDER_SEES_RESULT,
    exactness="approximate: tuned against a stand-in for the trunk, and inference rounds what crosses",
    is_exact=_exact,
)
