"""Which positions of a pass go to the trunk: all of them, or of each row its first and its last few.

A position that is left out takes no part in the trunk: its state goes from the bottom to the top as it is, and nothing in the
trunk attends to it. The choice needs the padding mask alone, so the owner makes it by itself: the row's last ``k`` tokens, and
its first, on which trained attention rests where it has nothing to look for (an attention sink). Tokens that a generation adds
are the last of their pass and always go; the trunk's half of a KV cache holds what was sent, at its true positions.

*Symbols.* k: ``last``.

*Reveals.* To the trunk's holder: at most k + 1 states of a row of n tokens, their true positions, and so n.

*Bound.* Of the other n - k - 1 tokens nothing crosses but what the bottom's attention put into the states that do (in a bottom
without blocks nothing, whatever the attacker knows), and the top's into their gradients, where gradients cross. Texts that begin
alike and end elsewhere send different positions, which add up. With k ≥ n - 1 every token is sent, and the pass is as without.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sent:
    """The positions of a pass that go to the trunk.

    Attributes:
        here: which of this pass, equally many in each row.
        held: which of those before it, in its KV cache, went; no columns without a cache.
    """

    here: Bool[Tensor, "batch seq"]
    held: Bool[Tensor, "batch past"]

    def take(self, values: Shaped[Tensor, "batch seq *rest"]) -> Shaped[Tensor, "batch sent *rest"]:
        """What stands at the positions that go; differentiable."""
        return values[self.here].view(len(values), -1, *values.shape[2:])

    def put(
        self, whole: Float[Tensor, "batch seq d"], part: Float[Tensor, "batch sent d"]
    ) -> Float[Tensor, "batch seq d"]:
        """``whole`` with ``part`` at the positions that went; differentiable in both."""
        return whole.masked_scatter(self.here[..., None], part)

    def present(self, mask: Shaped[Tensor, "batch total"] | None) -> Bool[Tensor, "batch trunk_total"]:
        """The padding mask over all that the trunk then has: what it holds, and what comes.

        Args:
            mask: over past and pass, as the owner's decoder was given it; ``None``: nothing is padded.
        """
        both = torch.cat([self.held, self.here], dim=1)
        return (
            torch.ones_like(both)[both].view(len(both), -1) if mask is None else mask.bool()[both].view(len(both), -1)
        )

    def positions(self, position_ids: Int[Tensor, "rows seq"] | None) -> Int[Tensor, "_ sent"]:
        """True positions of those that go, in one row if all rows have the same.

        Args:
            position_ids: of the pass; ``None``: they count on from the past.
        """
        batch, seq = self.here.shape
        past = self.held.shape[1]
        every = torch.arange(past, past + seq, device=self.here.device)[None] if position_ids is None else position_ids
        found = self.take(every.expand(batch, seq))
        return found[:1] if bool((found == found[:1]).all()) else found


def choose_positions(
    present: Bool[Tensor, "batch seq"], last: int, *, starts: bool
) -> Bool[Tensor, "batch seq"] | None:
    """The positions of a pass that are sent, equally many in each row; ``None``: no token would be left out.

    Rows with fewer tokens than others have to send are filled up with their padding, which the mask tells.

    Args:
        present: where tokens are, and no padding.
        last: how many of a row's last tokens go.
        starts: the pass begins its sequences, whose first tokens go as well.
    """
    number = present.cumsum(1)
    wanted = present & (number > number[:, -1:] - last)
    if starts:
        wanted |= present & (number == 1)
    if bool((wanted == present).all()):
        return None
    width = int(wanted.sum(1).max())
    rank = torch.where(wanted, 0, torch.where(present, 2, 1))
    chosen = rank.argsort(dim=1, stable=True)[:, :width]
    return torch.zeros_like(present).scatter(1, chosen, value=True)


class PositionChooser:
    """Chooses pass by pass, and remembers of each KV cache what the trunk's half of it holds.

    Args:
        last: k; 0: every position is sent.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self._held: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()

    def choose(self, hidden: Float[Tensor, "batch seq d"], mask: Tensor | None, cache: Any, past: int) -> Sent | None:
        """What is sent of a pass; ``None``: all of it, and so of every pass before in this cache.

        Args:
            hidden: states of the pass.
            mask: of padding, (batch, past + seq), or ``None``.
            cache: the owner's KV cache, or ``None``.
            past: positions in it.
        """
        if self.last == 0:
            return None
        batch, seq, _ = hidden.shape
        every = torch.ones((batch, seq), dtype=torch.bool, device=hidden.device)
        here = choose_positions(every if mask is None else mask[:, -seq:].bool(), self.last, starts=past == 0)
        held = self._held.get(cache) if cache is not None else None
        if here is None and held is None:
            return None
        return Sent(every if here is None else here, every.new_ones((batch, past)) if held is None else held)

    def keep(self, cache: Any, sent: Sent | None) -> None:
        """The pass crossed, and what was sent of it is in the trunk's half of this cache."""
        if cache is not None and sent is not None:
            self._held[cache] = torch.cat([sent.held, sent.here], dim=1)
