"""`gradfree`: only the top layers are tuned, so no gradient crosses, and each example crosses once.

*Reference.* GuardedTuning, Gradfree (arXiv 2501.04323). Bottom and trunk are frozen: an example's trunk output never changes,
and the owner keeps it for all epochs. Keeping it, warming up the bottom before the first crossing, and leaving positions out
(``last_positions``, see `models.sent_positions`) are ours.

*Reveals.* Of each distinct text one pass's states at the cut, rounded if the wire is; no gradient: the table of messages has
none. Inference crosses as in `split`.
"""

from __future__ import annotations

from typing import Any

from veiltune.config import Section
from veiltune.designs.base import cut_design
from veiltune.parties.split import (
    CacheOptions,
    LastPositions,
    ServerOptions,
    SplitPlan,
    WarmUpOptions,
)
from veiltune.privacy.quantisation import WireOptions


class GradfreeOptions(Section):
    """The table ``[gradfree]``."""

    wire: WireOptions = WireOptions(activation_bits=8)
    cache: CacheOptions = CacheOptions()
    warm_up: WarmUpOptions = WarmUpOptions()
    last_positions: LastPositions = 0
    server: ServerOptions = ServerOptions()


def _plan(options: Any) -> SplitPlan:
    warm_up = options.warm_up if options.warm_up.steps else None
    return SplitPlan(
        trains="top",
        wire=options.wire,
        cache=options.cache,
        warm_up=warm_up,
        last_positions=options.last_positions,
        server=options.server,
    )


def _exact(options: Any) -> bool:
    return options.wire.activation_bits == 32 and options.warm_up.steps == options.last_positions == 0


GRADFREE = cut_design(
    name="gradfree",
    summary="only the top layers are tuned: no gradient crosses, and each example crosses once",
    options=GradfreeOptions,
    plan=_plan,
    layers="top",
    exactness="approximate: states are rounded; with 32 bits, all positions and no warm-up equal to local tuning of the top",
    is_exact=_exact,
)
