"""The tokens whose own first states are nearest to given ones."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.base import EmbeddingTable, FirstState


def vocabulary_states(table: EmbeddingTable, position: int, form: FirstState) -> Float[Tensor, "v d"]:
    """The first state of every token at a position."""
    every = torch.arange(table.vocab_size)
    return table.states(every, torch.full_like(every, position), form)


def by_position(positions: Int[Tensor, " n"], *, same: bool) -> list[tuple[int, Tensor]]:
    """Rows that can be compared with one table: all at once, or those of each position."""
    if same:
        return [(0, torch.arange(len(positions)))]
    return [(int(p), torch.nonzero(positions == p).flatten()) for p in positions.unique()]


def nearest_tokens(
    states: Float[Tensor, "n d"],
    positions: Int[Tensor, " n"],
    table: EmbeddingTable,
    form: FirstState,
    projection: Float[Tensor, "d d"] | None = None,
) -> Int[Tensor, " n"]:
    """The token whose own first state, projected if asked, is nearest to each state."""
    found = torch.zeros(len(states), dtype=torch.int64)
    for position, rows in by_position(positions, same=not table.has_positions):
        wanted = vocabulary_states(table, position, form)
        wanted = wanted if projection is None else wanted @ projection
        for part in rows.split(256):
            found[part] = torch.cdist(states[part], wanted).argmin(1)
    return found
