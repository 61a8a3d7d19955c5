"""The trunk of `veil` as who knows the method sees it: blocks as rows of the stream, and the fold without its secrets.

*Symbols.* Each linear of a block is a list of vectors of the residual stream, one a row: columns of what reads the stream, rows
of what writes to it. A the rows of the folded plain trunk (R = I, no inner maps), B those that the host holds: B = S·A·R, where
S mixes the rows of a head, or orders and scales the MLP's hidden units (`models.rotated.inner`), and R is the stream's key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.attacks.passes import masked_weights
from veiltune.attacks.view import View
from veiltune.errors import DataError
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.family import Family
from veiltune.models.rotated import Folding
from veiltune.models.rotated.inner import Geometry
from veiltune.models.skeleton import config_from_json
from veiltune.privacy.orthogonal import DenseKey
from veiltune.secrets import MasterSecret

Heads = Float[Tensor, "_ w d"]
Units = Float[Tensor, "units d"]


class _NoKey(DenseKey):
    """R = I."""

    kind = "none"

    def _draw(self) -> tuple[Tensor, ...]:
        return (torch.eye(self.dim, dtype=torch.float64),)


def fold_openly(tensors: Mapping[str, Tensor], config: Any, cut: Cut) -> dict[str, Tensor]:
    """Plain tensors of the trunk's blocks, by name, to what the host would hold if there were no secret: folded, not rotated."""
    no_secret = MasterSecret.for_tests(0)
    folding = Folding(config, cut, _NoKey(int(config.hidden_size), no_secret, "none"), no_secret, inner=False)
    trunk = {name: value for name, value in tensors.items() if cut.holds(folding.family, name) == "trunk"}
    return folding.fold(trunk)


@dataclass(frozen=True)
class Shape:
    """What the host knows of the trunk it runs."""

    config: Any
    family: Family
    cut: Cut

    @classmethod
    def of(cls, view: View) -> Shape:
        """From the plan it was sent."""
        (plan,) = view.messages("TrunkPlan")[:1]
        config = config_from_json(plan["config"])
        layers = (plan["settings"].get(name, 0) for name in ("bottom_layers", "top_layers"))
        return cls(config, find_family(config), Cut.of(config, *map(int, layers)))

    def geometry(self, block: BlockRows) -> Geometry:
        """Heads and units of a block."""
        return Geometry.of(self.config, self.family, units=len(block.up), has_qk_norm=block.has_qk_norm)


def shards(view: View) -> dict[str, Tensor]:
    """Every tensor of the trunk that the host was sent, by name.

    Raises:
        DataError: none was: it had them before.
    """
    found = masked_weights(view)
    if not found:
        raise DataError("the transcript holds no weights of the trunk", hint="record a run without veil.protected")
    return found


@dataclass
class BlockRows:
    """The linears of one block as rows of the stream; ``gate`` is absent where the MLP has none."""

    q: Heads
    k: Heads
    v: Heads
    o: Heads
    gate: Units | None
    up: Units
    down: Units
    has_qk_norm: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], shape: Shape, block: int) -> BlockRows:
        """Of one block of a trunk, in float32."""
        family, prefix = shape.family, f"{shape.family.blocks}.{block}"

        def rows(path: str, *, reads: bool) -> Tensor:
            weight = tensors[f"{prefix}.{path}.weight"].float()
            return weight.T if reads == family.weights_in_out else weight

        width = int(getattr(shape.config, "head_dim", None) or 0) or int(
            shape.config.hidden_size // shape.config.num_attention_heads
        )
        parts = [rows(path, reads=True) for path in family.attention.inputs]
        if len(parts) == 1:
            parts = list(parts[0].chunk(3))
        q, k, v = (part.reshape(-1, width, part.shape[1]) for part in parts)
        o = rows(family.attention.output, reads=False)
        o = o.reshape(-1, width, o.shape[1])
        mlp = [rows(path, reads=True) for path in family.mlp.inputs]
        gate = mlp[0] if len(mlp) == 2 else None
        has_norm = any(f"{prefix}.{path}.gain" in tensors for path in family.attention.exposed)
        return cls(q, k, v, o, gate, mlp[-1], rows(family.mlp.output, reads=False), has_norm)

    def turned(self, key: Float[Tensor, "d d"]) -> BlockRows:
        """Every row times a matrix."""
        gate = None if self.gate is None else self.gate @ key
        q, k, v, o = (each @ key for each in (self.q, self.k, self.v, self.o))
        return BlockRows(q, k, v, o, gate, self.up @ key, self.down @ key, self.has_qk_norm)

    def weights(self, shape: Shape, block: int) -> dict[str, Tensor]:
        """Back to tensors as they are stored, by name: the inverse of `of`."""
        family, prefix = shape.family, f"{shape.family.blocks}.{block}"

        def stored(rows: Tensor, *, reads: bool) -> Tensor:
            return (rows.T if reads == family.weights_in_out else rows).contiguous()

        heads = [each.flatten(0, 1) for each in (self.q, self.k, self.v)]
        if len(family.attention.inputs) == 1:
            heads = [torch.cat(heads)]
        mlp = [each for each in (self.gate, self.up) if each is not None]
        found = {
            path: stored(rows, reads=True)
            for path, rows in [
                *zip(family.attention.inputs, heads, strict=True),
                *zip(family.mlp.inputs, mlp, strict=True),
            ]
        }
        found[family.attention.output] = stored(self.o.flatten(0, 1), reads=False)
        found[family.mlp.output] = stored(self.down, reads=False)
        return {f"{prefix}.{path}.weight": value for path, value in found.items()}
