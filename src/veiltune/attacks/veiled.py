"""What an ancestor of the weights gives the host of `veil`: the stream's key, the trunk, and the text.

With ``enclave_layers`` = 0 the states under the key are single tokens'. With more they are states at a cut, which vocabulary
matching reads through the bottom of whatever model the attacker has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.attacks.base import Auxiliary, EmbeddingTable
from veiltune.attacks.folded import BlockRows, Shape, fold_openly, shards
from veiltune.attacks.inside import undo_inside
from veiltune.attacks.matching import match_states
from veiltune.attacks.nearest import nearest_tokens
from veiltune.attacks.passes import FIRST_STATES, Agreement, joined, masked_first_states
from veiltune.attacks.stream import align_stream
from veiltune.attacks.view import View
from veiltune.models.bottom import Bottom
from veiltune.models.rotated.rotation import centred
from veiltune.privacy.quantisation import WireOptions

TRUNK = FIRST_STATES["veil"] | {"TrunkShard.tensors", "TrunkPlan.config", "TrunkPlan.settings"}
SHORTLIST = 64


@dataclass(frozen=True)
class Stolen:
    """The key of the stream and the trunk's weights as folded without secrets, by parameter name."""

    shape: Shape
    key: Float[Tensor, "d d"]
    weights: dict[str, Tensor]


def steal_trunk(view: View, ancestor: Mapping[str, Tensor]) -> Stolen:
    """Align the host's trunk with an ancestor's (`attacks.stream`), then undo what is inside blocks (`attacks.inside`)."""
    shape = Shape.of(view)
    tensors, public = shards(view), fold_openly(ancestor, shape.config, shape.cut)
    seen = {block: BlockRows.of(tensors, shape, block) for block in shape.cut.trunk}
    ours = {block: BlockRows.of(public, shape, block) for block in shape.cut.trunk}
    key = align_stream(ours, seen)
    weights: dict[str, Tensor] = {}
    for block, rows in seen.items():
        weights |= undo_inside(ours[block], rows.turned(key.T), shape.geometry(rows)).weights(shape, block)
    return Stolen(shape, key, weights)


@dataclass(frozen=True)
class _AsSeen(Agreement):
    """Nothing is rounded at `veil`'s border: what is made of a candidate's state is its centring, and a projection if any."""

    is_centred: bool = False
    projection: Tensor | None = None

    def rounded(self, states: Float[Tensor, "n seq d"], *, starts: bool) -> Float[Tensor, "n seq d"]:  # noqa: ARG002
        states = centred(states) if self.is_centred else states
        return states if self.projection is None else states @ self.projection


def read_cut_states(
    model: Any,
    layers: int,
    sequences: Sequence[Float[Tensor, "_ d"]],
    rng: torch.Generator,
    projection: Float[Tensor, "d d"] | None = None,
) -> list[list[int]]:
    """Tokens of plain states after ``layers`` blocks, by vocabulary matching through those of a model."""
    bottom = Bottom(model, layers)
    agreed = _AsSeen(layers, WireOptions(), is_centred=bottom.has_positions, projection=projection)
    return match_states(bottom, agreed, sequences, rng, shortlist=SHORTLIST)


@torch.no_grad()
def cut_states(model: Any, layers: int, tokens: Sequence[int]) -> Float[Tensor, "seq d"]:
    """States that enter the trunk after ``layers`` blocks, as `veil` rotates them."""
    bottom = Bottom(model, layers)
    states = bottom.states(torch.tensor([list(tokens)]))[0]
    return centred(states) if bottom.has_positions else states


def read_first_states(
    view: View, auxiliary: Auxiliary, stolen: Stolen, rng: torch.Generator
) -> tuple[list[list[int]], list[Tensor]]:
    """What follows from the key: the first states, and the tokens behind them."""
    sequences = [rows @ stolen.key.T for rows in joined(masked_first_states(view))]
    if not sequences:
        return [], []
    layers = stolen.shape.cut.bottom_layers
    if layers:
        return read_cut_states(auxiliary.take("ancestor_model"), layers, sequences, rng), sequences
    table: EmbeddingTable = auxiliary.take("embedding_table")
    lengths = [len(each) for each in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    tokens = nearest_tokens(torch.cat(sequences), positions, table, table.form("veil"))
    return [part.tolist() for part in tokens.split(lengths)], sequences
