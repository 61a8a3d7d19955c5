"""What veil does inside blocks, undone by an ancestor once the stream's key is known: order of heads, their maps, hidden units.

*Symbols.* A the ancestor's rows, C = B·R̂ᵀ the host's turned back, so that C = S·A up to the ancestor's distance.

- *Units*: an assignment by the cosines of gate, up and down together (Hungarian method); each one's scale from the lengths,
  s² = |u*|·|e| / (|u|·|e*|), which noise on the ancestor lengthens alike.
- *Heads*: key-value heads are assigned by ‖A_V·C_Vᵀ‖, the nuclear norm, which no orthogonal map changes; query heads within their
  group by what the map found from V makes of the output projection.
- *V and O*: one orthogonal map a group, by Procrustes over both.
- *Q and K*: with learned positions the same; with rotary ones a complex number for each pair of coordinates: the phase from both,
  the size from |q*|·|k| / (|q|·|k*|); with QK-norm its sign.

*Reference.* Direction similarity: ArrowMatch (Wang et al., "Game of Arrows", USENIX Security 2025), there against weights
obfuscated beside a trusted execution environment.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.folded import BlockRows, Heads
from veiltune.attacks.stream import directions
from veiltune.models.rotated.inner import Geometry


def undo_inside(ancestor: BlockRows, turned: BlockRows, geometry: Geometry) -> BlockRows:
    """The host's rows, turned back already, as the plain trunk has them."""
    return undo_heads(ancestor, undo_units(ancestor, turned), geometry)


def assigned(alike: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """For each row a column of its own, with the greatest sum."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(alike.numpy(), maximize=True)
    return torch.from_numpy(columns)


def undo_units(ancestor: BlockRows, turned: BlockRows) -> BlockRows:
    """The hidden units in their order and at their scales."""
    alike = torch.stack([a @ c.T for a, c in zip(directions(ancestor), directions(turned), strict=True)]).sum(0)
    order = assigned(alike)
    up, down = turned.up[order], turned.down[order]
    grown = (up.norm(dim=-1) * ancestor.down.norm(dim=-1)) / (down.norm(dim=-1) * ancestor.up.norm(dim=-1)).clamp_min(
        1e-12
    )
    scale = grown.clamp_min(1e-12).sqrt()[:, None]
    gate = None if turned.gate is None else turned.gate[order]
    return dataclasses.replace(turned, gate=gate, up=up / scale, down=down * scale)


def undo_heads(ancestor: BlockRows, turned: BlockRows, geometry: Geometry) -> BlockRows:
    """The heads in their order, each in its own basis."""
    group = geometry.heads // geometry.kv_heads
    kv_order = assigned(_nuclear(ancestor.v, turned.v))
    values = [_orthogonal(ancestor.v[i], turned.v[j]) for i, j in enumerate(kv_order.tolist())]
    q_order: list[int] = []
    for i, j in enumerate(kv_order.tolist()):
        ours, theirs = ancestor.o[i * group : (i + 1) * group], turned.o[j * group : (j + 1) * group]
        back = torch.einsum("vw,nwd->nvd", values[i], theirs)
        q_order += (j * group + assigned(torch.einsum("mwd,nwd->mn", ours, back))).tolist()
    v, o, q, k = turned.v[kv_order], turned.o[q_order], turned.q[q_order], turned.k[kv_order]
    v, o = _undo_orthogonal(ancestor.v, ancestor.o, v, o)
    if geometry.has_rotary:
        k, q = _undo_turns(ancestor, k, q, signs=geometry.has_qk_norm)
    else:
        k, q = _undo_orthogonal(ancestor.k, ancestor.q, k, q)
    return dataclasses.replace(turned, q=q, k=k, v=v, o=o)


def _nuclear(ours: Heads, theirs: Heads) -> Float[Tensor, "n n"]:
    """‖A_i·C_jᵀ‖ of every pair."""
    products = torch.einsum("mwd,nvd->mnwv", ours, theirs)
    return torch.linalg.matrix_norm(products, ord="nuc")


def _orthogonal(ours: Float[Tensor, "w d"], theirs: Float[Tensor, "w d"]) -> Float[Tensor, "w w"]:
    """The orthogonal U for which U·theirs is nearest to ours."""
    u, _, vh = torch.linalg.svd(ours @ theirs.T)
    return u @ vh


def _undo_orthogonal(ours: Heads, ours_many: Heads, few: Heads, many: Heads) -> tuple[Heads, Heads]:
    """One orthogonal map for each key-value head and the query heads of its group, from all of them."""
    group = len(many) // len(few)
    new_few: list[Tensor] = []
    new_many: list[Tensor] = []
    for i in range(len(few)):
        part = slice(i * group, (i + 1) * group)
        mine = torch.cat([ours[i], *ours_many[part]], dim=1)
        theirs = torch.cat([few[i], *many[part]], dim=1)
        back = _orthogonal(mine, theirs)
        new_few.append(back @ few[i])
        new_many.append(back @ many[part])
    return torch.stack(new_few), torch.cat(new_many)


def _complex(heads: Heads) -> Tensor:
    """Rows i and i + w/2 as one complex row."""
    x, y = heads.chunk(2, dim=1)
    return torch.complex(x.contiguous(), y.contiguous())


def _undo_turns(ancestor: BlockRows, k: Heads, q: Heads, *, signs: bool) -> tuple[Heads, Heads]:
    """One complex number for each key-value head and pair: k* = k·z̃, q* = q·z of one phase and of inverse sizes."""
    group = len(q) // len(k)
    ours_k, ours_q, k_pairs, q_pairs = (_complex(each) for each in (ancestor.k, ancestor.q, k, q))
    products = (k_pairs * ours_k.conj()).sum(-1) + (q_pairs * ours_q.conj()).sum(-1).view(len(k), group, -1).sum(1)
    if signs:
        phase = torch.where(products.real < 0, -1.0, 1.0).to(products.dtype)
        size = torch.ones_like(products.real)
    else:
        phase = products / products.abs().clamp_min(1e-20)
        q_grown = _size(q_pairs, group) / _size(ours_q, group)
        size = (q_grown * _size(ours_k, 1) / _size(k_pairs, 1)).sqrt()
    for_q = (phase * size).repeat_interleave(group, 0)[..., None]
    for_k = (phase / size)[..., None]
    return _real(k_pairs / for_k), _real(q_pairs / for_q)


def _size(pairs: Tensor, group: int) -> Tensor:
    """Length of each pair's rows, over the heads of a group."""
    squares = pairs.abs().square().sum(-1)
    return squares.view(-1, group, squares.shape[-1]).sum(1).sqrt().clamp_min(1e-20)


def _real(pairs: Tensor) -> Heads:
    return torch.cat([pairs.real, pairs.imag], dim=1)
