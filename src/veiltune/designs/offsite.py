"""`offsite`: plain offsite tuning. The owner tunes its layers against an emulator of the trunk; nothing crosses per step.

*Reference.* Xiao, Lin and Han 2023 (arXiv 2302.04870). The baseline of `offline`.

*Reveals.* The emulator, which is part of the trunk or an approximation of it, is the owner's to keep. Tuning reveals nothing
of the text; what was tuned goes back to the provider if ``plug_in``, and inference crosses as in `split`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from veiltune.config import Section
from veiltune.designs.base import OWNER_SEES_EMULATOR, PROVIDER_SEES_RESULT, cut_design
from veiltune.models.emulators.options import EmulatorOptions
from veiltune.parties.split import ServerOptions, SplitPlan


class OffsiteOptions(Section):
    """The table ``[offsite]``."""

    emulator: EmulatorOptions = EmulatorOptions()
    plug_in: bool = Field(default=True, description="the owner returns what it trained; false: it keeps it")
    server: ServerOptions = ServerOptions()


def _plan(options: Any) -> SplitPlan:
    return SplitPlan(emulator=options.emulator, plug_in=options.plug_in, server=options.server)


def _exact(_: BaseModel) -> bool:
    return False


OFFSITE = cut_design(
    name="offsite",
    summary="offsite tuning: the owner tunes against an emulator of the trunk, and plugs the result into the whole model",
    options=OffsiteOptions,
    plan=_plan,
    owner_sees=OWNER_SEES_EMULATOR,
    provider_sees=PROVIDER_SEES_RESULT,
    exactness="approximate: tuned against a stand-in for the trunk; inference through the trunk is exact",
    is_exact=_exact,
)
