"""Does a model descend from a public one? Key by key, as a host with masked weights would go about it.

A protected host gets R⁻¹·W or W·R. If it has weights near W, Procrustes gives it the key, then weights and text. So before
weights are sent their owner can hold them against the public models it knows of. Both models are read tensor by tensor: at any
time the linears of one key of each are in memory, and no more.

*What it cannot say.* Other ancestors than those it was given. Weights of another shape, another width or pruned, are *not
comparable*, which is not *safe*. And an ancestor whose heads or hidden units were put in another order is not found, though an
attacker who finds the order would use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.errors import ModelError
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.families import find_family
from veiltune.models.family import Family, Linear
from veiltune.privacy.alignment import Alignment, align

Verdict = Literal["aligned", "not aligned", "not comparable"]


def facing_key(weight: Tensor, linear: Linear, family: Family) -> Float[Tensor, "rows columns"]:
    """A weight with the side that meets its key as rows, and back."""
    in_out = family.weights_in_out
    return weight if in_out == (linear.side == "input") else weight.T


def side_by_side(tensors: Mapping[str, Tensor], linears: list[Linear], family: Family) -> Float[Tensor, "d columns"]:
    """What meets one key, in float64."""
    return torch.cat([facing_key(tensors[f"{each.path}.weight"], each, family) for each in linears], dim=1).double()


@dataclass(frozen=True)
class AncestorCheck:
    """One model held against one public model.

    Attributes:
        ancestor: the public one, as the user named it.
        keys: what each key's weights have to do with the ancestor's, by key, in the blocks that were examined.
        not_compared: keys of those blocks whose weights have no counterpart of the same shape, or from which nothing can be told.
    """

    ancestor: str
    keys: dict[str, Alignment] = field(default_factory=dict)
    not_compared: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """``aligned`` if any key is: from one key on, the rest is a matter of solving equations."""
        if not self.keys:
            return "not comparable"
        return "aligned" if self.aligned else "not aligned"

    @property
    def aligned(self) -> list[str]:
        """Keys that could be recovered."""
        return [key for key, found in self.keys.items() if found.is_aligned]

    @property
    def nearest(self) -> tuple[str, Alignment] | None:
        """The key with the largest excess."""
        return max(self.keys.items(), key=lambda item: item[1].excess, default=None)

    def __str__(self) -> str:
        if self.nearest is None:
            return f"not comparable with {self.ancestor}: no weights of the same shapes. That does not make it safe"
        key, found = self.nearest
        figures = f"{key}: residual {found.residual:.3f}, {found.excess:.2f} above chance"
        rest = f"; {len(self.not_compared)} keys could not be compared" if self.not_compared else ""
        if self.verdict == "not aligned":
            return (
                f"not aligned with {self.ancestor} ({len(self.keys)} keys, nearest {figures}{rest}); other ancestors are not "
                "ruled out"
            )
        return (
            f"ALIGNED with {self.ancestor}: {len(self.aligned)} of {len(self.keys)} keys; {figures}, weights recovered to "
            f"{100 * found.weight_error:.1f}%{rest}"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        keys = {
            key: {
                "similarity": found.similarity,
                "chance": found.chance,
                "excess": found.excess,
                "residual": found.residual,
                "weight_error": found.weight_error,
                "is_aligned": found.is_aligned,
            }
            for key, found in self.keys.items()
        }
        return {
            "ancestor": self.ancestor,
            "verdict": self.verdict,
            "keys": keys,
            "not_compared": list(self.not_compared),
        }


def check_ancestor(checkpoint: Checkpoint, ancestor: Checkpoint, *, blocks: int = 8, seed: int = 0) -> AncestorCheck:
    """Hold a model against a public one.

    Args:
        checkpoint: the model about to be provisioned.
        ancestor: the public one.
        blocks: how many blocks are examined, evenly spaced from the first to the last.
        seed: of the random signs that chance is measured with.
    """
    family = find_family(checkpoint.config)
    rng = torch.Generator().manual_seed(seed)
    keys: dict[str, Alignment] = {}
    missing: list[str] = []
    is_alike = _is_alike(ancestor, family)
    for key, linears in _examined(family, int(checkpoint.config.num_hidden_layers), blocks):
        names = [f"{linear.path}.weight" for linear in linears]
        found = None
        if is_alike and all(_comparable(checkpoint, ancestor, name) for name in names):
            ours, theirs = (side_by_side(_read(each, names), linears, family) for each in (checkpoint, ancestor))
            found = align(theirs, ours, rng)
        if found is None or not found.is_telling:
            missing.append(key)
        else:
            keys[key] = found
    return AncestorCheck(ancestor.source, keys, tuple(missing))


def _is_alike(ancestor: Checkpoint, family: Family) -> bool:
    """Whether the ancestor's weights lie as the family's do."""
    try:
        return find_family(ancestor.config).weights_in_out == family.weights_in_out
    except ModelError:
        return False


def _examined(family: Family, num_layers: int, blocks: int) -> Iterator[tuple[str, list[Linear]]]:
    """Keys of evenly spaced blocks with the linears they mask."""
    count = min(blocks, num_layers)
    chosen = {round(i * (num_layers - 1) / max(1, count - 1)) for i in range(count)}
    groups: dict[str, list[Linear]] = {}
    for linear in family.linears(num_layers):
        if linear.block in chosen:
            groups.setdefault(linear.key, []).append(linear)
    yield from groups.items()


def _stored(checkpoint: Checkpoint, name: str) -> str | None:
    """The name a tensor is stored by: hub checkpoints of some families leave out the base model's prefix."""
    return next((each for each in (name, name.partition(".")[2]) if each in checkpoint.index), None)


def _comparable(checkpoint: Checkpoint, ancestor: Checkpoint, name: str) -> bool:
    ours, theirs = _stored(checkpoint, name), _stored(ancestor, name)
    if ours is None or theirs is None:
        return False
    one, other = checkpoint.index[ours], ancestor.index[theirs]
    return one.shape == other.shape and all(each.dtype in {"F16", "BF16", "F32", "F64"} for each in (one, other))


def _read(checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    stored = {_stored(checkpoint, name) or name: name for name in names}
    return {stored[each]: value for each, value in checkpoint.tensors(stored)}
