"""`split`: plain split learning. The owner keeps text, embeddings, first and last layers; the provider runs what is between.

*Reference.* Vepakomma et al. 2018 (arXiv 1812.00564), the U-shaped form without label sharing. The baseline of `online`.

*Reveals.* States and gradients at both cuts cross in full precision and in the clear: this protects neither well. What it
keeps from the provider are text, labels, bottom and top as trained; from the owner, the trunk.

*Bound.* It is the plain computation in the same order: equal to `local` with the same layers trained, up to rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import BaseModel

from veiltune.config import Section
from veiltune.designs.base import GRADIENT_REVEALS, SPLIT_OWNER_REVEALS, SPLIT_PROVIDER_REVEALS, Design
from veiltune.parties.owner import own
from veiltune.parties.split import ServerOptions, SplitPlan, join_with_layers, open_trunk, provide_trunk


class SplitOptions(Section):
    """The table ``[split]``."""

    server: ServerOptions = ServerOptions()


def _plan(options: Any) -> SplitPlan:
    return SplitPlan(server=options.server)


def _exact(_: BaseModel) -> bool:
    return True


_join = partial(join_with_layers, planner=_plan)

SPLIT = Design(
    name="split",
    summary="split learning: the owner keeps the first and last layers, full precision crosses both ways",
    options=SplitOptions,
    join=_join,
    roles={"owner": partial(own, join=_join), "provider": partial(provide_trunk, planner=_plan)},
    links=(("owner", "provider"),),
    data_plane=("owner", "provider"),
    trainer="owner",
    enclaves=frozenset(),
    reveals={
        "owner": {**SPLIT_OWNER_REVEALS, **GRADIENT_REVEALS["owner"]},
        "provider": {**SPLIT_PROVIDER_REVEALS, **GRADIENT_REVEALS["provider"]},
    },
    also_sees={"provider": ("the trunk, which is its own; bottom and top as they were before tuning",)},
    exactness="equal to local with the same layers trained, up to rounding",
    is_exact=_exact,
    baseline={"layers": "owner"},
    methods=frozenset({"lora", "full"}),
    services={"provider": partial(open_trunk, planner=_plan)},
)
