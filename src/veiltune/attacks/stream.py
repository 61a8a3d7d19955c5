"""The key of a rotated trunk from its weights and a public ancestor of them, though heads and hidden units are disguised too.

*Symbols.* As in `attacks.folded`: A the ancestor's rows of the stream, B = S·A·R the host's. One hidden unit of an MLP has the
rows g, u (gate and up) and e (down).

1. *Invariants.* What neither R, nor an order of units, nor their scales change tells which unit is which: |g|, |u|·|e|, the
   cosines between g, u and e, and quadratic forms uMe of their directions in matrices M that turn with R alone. As such M
   serve VᵀV, OᵀO, QᵀK summed over heads (blind to head maps: these are orthogonal, or what rotary commutes with), and uᵀe
   summed over units (blind to order and scales).
2. *Units.* Each of the ancestor's is paired with the nearest one in standardised invariants, where that is mutual.
3. *Procrustes.* R̂ is the orthogonal matrix that turns the paired directions into one another. Then, with R̂ known, units are
   paired by direction, and so on, until nothing changes: iterative closest points, with a start that is far from chance.

*Reference.* The invariants are ours. Step 3 is Besl and McKay, "A method for registration of 3-D shapes" (1992), after
Schönemann.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from veiltune.attacks.folded import BlockRows

FIRST_BLOCKS = 3
"""Blocks whose units are paired by invariants; the others follow once R is roughly known."""
FORMS = 48
"""Matrices of which quadratic forms are taken."""
MAX_TURNS = 12
SETTLED = 0.999

Blocks = Mapping[int, BlockRows]


def align_stream(ancestor: Blocks, seen: Blocks) -> Float[Tensor, "d d"]:
    """R̂, for which A·R̂ is nearest to B up to what is done to heads and units. Both hold the same blocks."""
    some = list(ancestor)[:: max(1, len(ancestor) // FIRST_BLOCKS)][:FIRST_BLOCKS]
    pairs = {block: _first_pairs(ancestor, seen, block) for block in some}
    key = _turn(ancestor, seen, pairs)
    for _ in range(MAX_TURNS):
        before = pairs
        pairs = {block: pair_units(ancestor[block].turned(key), seen[block]) for block in some}
        key = _turn(ancestor, seen, pairs)
        if _agreement(before, pairs) > SETTLED:
            break
    every = {block: pair_units(ancestor[block].turned(key), seen[block]) for block in ancestor}
    return _turn(ancestor, seen, every)


def _agreement(before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> float:
    return min(float((before[block] == after[block]).float().mean()) for block in after)


def directions(block: BlockRows) -> list[Float[Tensor, "units d"]]:
    """What each unit has in the stream, without lengths: gate if there is one, up, down."""
    return [normalize(each, dim=-1) for each in (block.gate, block.up, block.down) if each is not None]


def pair_units(turned: BlockRows, seen: BlockRows) -> Int[Tensor, " units"]:
    """For each unit of a turned ancestor the host's one of the most alike directions, -1 where that is not mutual."""
    alike = torch.stack([a @ b.T for a, b in zip(directions(turned), directions(seen), strict=True)]).sum(0)
    return _mutual(alike)


def _mutual(alike: Float[Tensor, "n n"]) -> Int[Tensor, " n"]:
    there, back = alike.argmax(1), alike.argmax(0)
    return torch.where(back[there] == torch.arange(len(there)), there, -1)


def _turn(ancestor: Blocks, seen: Blocks, pairs: Mapping[int, Tensor]) -> Float[Tensor, "d d"]:
    """The rotation of paired directions into one another."""
    dim = next(iter(ancestor.values())).up.shape[-1]
    cross = torch.zeros((dim, dim), dtype=torch.float64)
    for block, found in pairs.items():
        mine, theirs = torch.nonzero(found >= 0).flatten(), found[found >= 0]
        for a, b in zip(directions(ancestor[block]), directions(seen[block]), strict=True):
            cross += (a[mine].T @ b[theirs]).double()
    u, _, vh = torch.linalg.svd(cross)
    return (u @ vh).float()


# --- before anything of R is known ------------------------------------------------------------------------------------


def _first_pairs(ancestor: Blocks, seen: Blocks, block: int) -> Int[Tensor, " units"]:
    ours = _invariants(ancestor[block], _forms(ancestor))
    theirs = _invariants(seen[block], _forms(seen))
    centre, spread = ours.mean(0), ours.std(0).clamp_min(1e-12)
    return _mutual(-torch.cdist((ours - centre) / spread, (theirs - centre) / spread))


def _forms(blocks: Blocks) -> list[Float[Tensor, "d d"]]:
    """Matrices that turn with R alone, of blocks spread over the trunk."""
    found: list[Tensor] = []
    chosen = list(blocks.values())
    for block in chosen[:: max(1, 4 * len(chosen) // FORMS)]:
        keys = block.k.repeat_interleave(len(block.q) // len(block.k), 0)
        for left, right in ((block.v, block.v), (block.o, block.o), (block.q, keys)):
            found.append(left.flatten(0, 1).T @ right.flatten(0, 1))
        found.append(block.up.T @ block.down)
    return [each / each.norm().clamp_min(1e-12) for each in found[:FORMS]]


def _invariants(block: BlockRows, forms: Sequence[Float[Tensor, "d d"]]) -> Float[Tensor, "units f"]:
    units = directions(block)
    lengths = [block.up.norm(dim=-1) * block.down.norm(dim=-1)]
    if block.gate is not None:
        lengths.append(block.gate.norm(dim=-1))
    found = [each.clamp_min(1e-12).log() for each in lengths]
    found += [(units[i] * units[j]).sum(-1) for i in range(len(units)) for j in range(i)]
    for form in forms:
        turned = [each @ form for each in units]
        found += [(one * other).sum(-1) for one in turned for other in units]
    return torch.stack(found, dim=1)
