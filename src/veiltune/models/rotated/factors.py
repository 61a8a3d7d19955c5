"""LoRA factors between the plain basis and the rotated trunk's.

*Symbols.* ΔW = A·B in rows; A* = L·A and B* = B·P with the linear's own maps: for readers L = R⁻¹·T and P of the block's inside,
for writers L = P⁻¹ and P = M·R. Gradients come back by the transposes: dA = Lᵀ·dA*, dB = dB*·Pᵀ.

*Exactness.* Plain to rotated and gradients: always. Rotated to plain: where T can be undone (`Folding` refuses the rest); what B
has along 1 is lost with M, and has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from veiltune.models.rotated.folding import Folding
from veiltune.models.rotated.maps import LinearMap
from veiltune.models.rotated.rotation import BorderMap

Direction = Literal["apply", "undo", "pull_back"]


def rotate_factors(factors: Mapping[str, Tensor], folding: Folding) -> dict[str, Tensor]:
    """Plain factors of the trunk to the host's."""
    return _mapped(factors, folding, "apply")


def unrotate_factors(factors: Mapping[str, Tensor], folding: Folding) -> dict[str, Tensor]:
    """The host's factors to plain ones with the same effect, in float64 on the way."""
    exact = {name: value.to("cpu", torch.float64) for name, value in factors.items()}
    return {name: value.to(factors[name]) for name, value in _mapped(exact, folding, "undo").items()}


def unrotate_gradients(gradients: Mapping[str, Tensor], folding: Folding) -> dict[str, Tensor]:
    """Gradients of the host's factors to those of the plain ones."""
    return _mapped(gradients, folding, "pull_back")


def _mapped(tensors: Mapping[str, Tensor], folding: Folding, direction: Direction) -> dict[str, Tensor]:
    """Every factor through its map; those at the border share one product with the key for each side."""
    out: dict[str, Tensor] = {}
    border: dict[str, list[tuple[str, BorderMap]]] = {}
    for name, value in tensors.items():
        linear_map = _map_of(name, folding)
        if isinstance(linear_map, BorderMap):
            border.setdefault(type(linear_map).__name__, []).append((name, linear_map))
        else:
            out[name] = _oriented(name, _one(linear_map, direction, _oriented(name, value)))
    for members in border.values():
        rows = [_oriented(name, tensors[name]) for name, _ in members]
        mapped = _through(rows, [each for _, each in members], direction)
        out |= {name: _oriented(name, value) for (name, _), value in zip(members, mapped, strict=True)}
    return {name: out[name].contiguous() for name in tensors}


def _one(linear_map: LinearMap, direction: Direction, rows: Tensor) -> Tensor:
    steps = {"apply": linear_map.apply, "undo": linear_map.undo, "pull_back": linear_map.pull_back}
    return steps[direction](rows)


def _through(rows: list[Tensor], maps: list[BorderMap], direction: Direction) -> list[Tensor]:
    """Rows through maps of one kind, with one product with the key for all: after each one's own part, or before it."""
    sizes, first = [len(part) for part in rows], maps[0]
    if direction == "apply":
        folded = torch.cat([each.fold(part) for each, part in zip(maps, rows, strict=True)])
        return list(first.turn(folded).split(sizes))
    turned = (first.turn_undone if direction == "undo" else first.turn_back)(torch.cat(rows)).split(sizes)
    return [
        each.unfold(part) if direction == "undo" else each.fold_back(part)
        for each, part in zip(maps, turned, strict=True)
    ]


def _map_of(name: str, folding: Folding) -> LinearMap:
    path, _, which = name.rpartition(".")
    return folding.maps(folding.linears[path])[0 if which == "lora_A" else 1]


def _oriented(name: str, value: Tensor) -> Tensor:
    """lora_A has the mapped side last already; lora_B is turned about. Its own inverse."""
    return value if name.endswith("lora_A") else value.T
