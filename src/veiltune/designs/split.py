"""`split`: plain split learning. The owner keeps text, embeddings, first and last layers; the provider runs what is between.

*Reference.* Vepakomma et al. 2018 (arXiv 1812.00564), the U-shaped form without label sharing. The baseline of `online`.

*Reveals.* States and gradients at both cuts cross in full precision and in the clear: this protects neither well. What it
keeps from the provider are text, labels, bottom and top as trained; from the owner, the trunk.

*Bound.* It is the plain computation in the same order: equal to `local` with the same layers trained, up to rounding.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from veiltune.config import Section
from veiltune.designs.base import OWNER_SEES_GRADIENTS, PROVIDER_SEES_GRADIENTS, cut_design
from veiltune.parties.split import ServerOptions, SplitPlan


class SplitOptions(Section):
    """The table ``[split]``."""

    server: ServerOptions = ServerOptions()


def _plan(options: Any) -> SplitPlan:
    return SplitPlan(server=options.server)


def _exact(_: BaseModel) -> bool:
    return True


SPLIT = cut_design(
    name="split",
    summary="split learning: the owner keeps the first and last layers, full precision crosses both ways",
    options=SplitOptions,
    plan=_plan,
    owner_sees=OWNER_SEES_GRADIENTS,
    provider_sees=PROVIDER_SEES_GRADIENTS,
    exactness="equal to local with the same layers trained, up to rounding",
    is_exact=_exact,
)
