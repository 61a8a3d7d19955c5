"""What the pre-flight's measure says of unrelated and of related weights: where its threshold stands between them.

Unrelated: Gaussian matrices of SmolLM2-135M's shapes, every pair drawn anew; and trained ones, each block of SmolLM2 against
every other block examined, which share nothing but that they were trained together. Related: SmolLM2's own weights with Gaussian
noise of a stated relative size, with a rank-16 change as LoRA leaves it, and with the channels of the stream in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2
from veiltune.models.ancestry import side_by_side
from veiltune.models.families import find_family
from veiltune.models.sources import resolve_model
from veiltune.privacy.alignment import ALIGNED_EXCESS, Alignment, align

KINDS = ("attention.in", "attention.out", "mlp.in", "mlp.out")
BLOCKS = 8
DISTANCES = (0.01, 0.1, 0.5, 1.0, 2.0)
LORA_RANK, LORA_SIZE = 16, 0.2
RANDOM_PAIRS = 20

Groups = dict[str, list[Tensor]]


def groups_of(model: str, blocks: int) -> Groups:
    """By kind of key, the weights that meet it in evenly spaced blocks, (d, n) each."""
    checkpoint = resolve_model(model)
    family = find_family(checkpoint.config)
    layers = int(checkpoint.config.num_hidden_layers)
    chosen = sorted({round(i * (layers - 1) / (blocks - 1)) for i in range(blocks)})
    found: Groups = {kind: [] for kind in KINDS}
    for block, kind in itertools.product(chosen, KINDS):
        linears = [each for each in family.linears(layers) if each.key == f"block{block}.{kind}"]
        found[kind].append(side_by_side(dict(checkpoint.tensors(f"{e.path}.weight" for e in linears)), linears, family))
    return found


def _near(weights: Tensor, change: Tensor, size: float) -> Tensor:
    return weights + change * (size * weights.norm() / change.norm())


def _related(weights: Tensor, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Ancestors of some weights, by what they differ in."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    for distance in DISTANCES:
        yield f"noise {100 * distance:g}%", _near(weights, noise(*weights.shape), distance)
    rows, columns = weights.shape
    yield (
        f"rank {LORA_RANK}, {100 * LORA_SIZE:g}%",
        _near(weights, noise(rows, LORA_RANK) @ noise(LORA_RANK, columns), LORA_SIZE),
    )
    yield "channels permuted", weights[torch.randperm(rows, generator=rng)]


def _row(relation: str, kind: str, found: list[Alignment]) -> Row:
    excess = torch.tensor([each.excess for each in found])
    return {
        "model": SMOLLM2,
        "relation": relation,
        "kind": kind,
        "n": len(found),
        "excess_mean": float(excess.mean()),
        "excess_low": float(excess.min()),
        "excess_high": float(excess.max()),
        "residual_mean": sum(each.residual for each in found) / len(found),
        "weight_error_mean": sum(each.weight_error for each in found) / len(found),
        "aligned": sum(each.is_aligned for each in found),
        "threshold": ALIGNED_EXCESS,
    }


def measure(quick: bool) -> list[Row]:
    """Rows by relation and kind of key; quickly, three blocks and attention outputs alone."""
    groups = groups_of(SMOLLM2, 3 if quick else BLOCKS)
    rng = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for kind in KINDS[1:2] if quick else KINDS:
        weights = groups[kind]
        shape = weights[0].shape
        pairs = [
            torch.randn(2, *shape, generator=rng, dtype=torch.float64) for _ in range(2 if quick else RANDOM_PAIRS)
        ]
        rows.append(_row("random, unrelated", kind, [align(one, other, rng) for one, other in pairs]))
        crossed = [align(one, other, rng) for one, other in itertools.permutations(weights, 2)]
        rows.append(_row("trained, other block", kind, crossed))
        related: dict[str, list[Alignment]] = {}
        for each in weights:
            for relation, ancestor in _related(each, rng):
                related.setdefault(relation, []).append(align(ancestor, each, rng))
        rows += [_row(relation, kind, found) for relation, found in related.items()]
    return rows


if __name__ == "__main__":
    run("ancestry", __doc__, measure)
