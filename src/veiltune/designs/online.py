"""`online`: split learning with decorrelation and a quantised wire.

*Reference.* GuardedTuning, Online (arXiv 2501.04323). L = L_task + α·dCor(E, H), E the embeddings and H the states that are
sent; states and gradients are rounded to 8 or 4 bits in both directions.

*Reveals.* What `split` reveals, less what rounding and decorrelation take away; both are mitigations, measured in the
comparison, and neither is a bound. With ``last_positions`` the other tokens' states do not cross at all (ours: see
`models.sent_positions`). α = 0 with 32 bits and every position sent is `split`, bit for bit.
"""

from __future__ import annotations

from typing import Any

from veiltune.config import Section
from veiltune.designs.base import OWNER_SEES_GRADIENTS, PROVIDER_SEES_GRADIENTS, cut_design
from veiltune.parties.split import LastPositions, ServerOptions, SplitPlan
from veiltune.privacy.decorrelation import DecorrelationOptions
from veiltune.privacy.quantisation import WireOptions


class OnlineOptions(Section):
    """The table ``[online]``."""

    wire: WireOptions = WireOptions(activation_bits=8, gradient_bits=8)
    decorrelation: DecorrelationOptions = DecorrelationOptions(alpha=1.0)
    last_positions: LastPositions = 0
    server: ServerOptions = ServerOptions()


def _plan(options: Any) -> SplitPlan:
    decorrelation = options.decorrelation if options.decorrelation.alpha > 0 else None
    return SplitPlan(
        wire=options.wire,
        decorrelation=decorrelation,
        last_positions=options.last_positions,
        server=options.server,
    )


def _exact(options: Any) -> bool:
    wire, decorrelation = options.wire, options.decorrelation
    return wire.activation_bits == wire.gradient_bits == 32 and decorrelation.alpha == options.last_positions == 0


ONLINE = cut_design(
    name="online",
    summary="split learning with decorrelated states and a quantised wire, both ways",
    options=OnlineOptions,
    plan=_plan,
    owner_sees=OWNER_SEES_GRADIENTS,
    provider_sees=PROVIDER_SEES_GRADIENTS,
    exactness="approximate: rounded on the wire, with a second objective; with 32 bits, α = 0 and all positions it is split",
    is_exact=_exact,
)
