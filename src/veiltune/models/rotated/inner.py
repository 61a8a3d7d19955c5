"""Inside a block: secret maps of Q, K, V and the MLP's hidden units that leave what the block computes as it is.

*Reference.* QuaRot and SpinQuant (arXiv 2405.16406) rotate V and the output's input for quantisation; ours are secret, and Q
and K are turned too, as far as what acts on them allows.

*Symbols.* Per head, rows q, k, v of width w; a group is the query heads that share a key-value head.

- Heads are put in a secret order: key-value heads among themselves, and query heads within their group.
- V·U with U Haar orthogonal per key-value head, U⁻¹ in W_o for each query head of the group. Always.
- Q·U and K·U, U Haar orthogonal per head, with learned positions: q·U·(k·U)ᵀ = q·kᵀ.
- With rotary positions, coordinates i and i + w/2 are one complex number that rotary multiplies by a phase. What commutes with
  every phase is multiplication: q by ρ·exp(jφ), k by exp(jφ)/ρ, one ρ and φ for each key-value head and frequency.
- With QK-norm besides, the norm takes the mean square over the head and multiplies by a gain for each coordinate, the same for
  all heads: of the turns only signs are left (φ = 0 or π), one for each key-value head and frequency. The gains of Q and K are
  scaled by ρ and 1/ρ, one for each frequency.
- The MLP's hidden units are permuted. Where the branch is linear (up) or the activation is positively homogeneous (ReLU), each
  is scaled by a secret positive factor, and its row of the down-projection by the inverse.

*Reveals.* Attention scores and probabilities. Norms of V, and of Q and K without rotary. With rotary, products of paired norms.
With QK-norm, Q and K up to signs and the order of heads. The multiset of the gate's activations at every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from veiltune.models.family import Family
from veiltune.models.rotated.maps import HeadRotations, InnerMap, Joined, PairTurns, Same, ScaledOrder
from veiltune.privacy.orthogonal import make_key
from veiltune.secrets import MasterSecret

_LOG_SCALE = math.log(2.0)
"""Secret factors lie between 1/2 and 2: wide enough to hide norms, narrow enough to cost no precision."""


@dataclass(frozen=True)
class Geometry:
    """What of a block's inside the maps depend on.

    Attributes:
        heads: query heads.
        kv_heads: key-value heads.
        width: of a head.
        units: hidden units of the MLP.
        has_rotary: positions are rotary.
        has_qk_norm: Q and K are normalised by head, with a gain.
        is_relu: the activation is positively homogeneous.
    """

    heads: int
    kv_heads: int
    width: int
    units: int
    has_rotary: bool
    has_qk_norm: bool
    is_relu: bool

    @classmethod
    def of(cls, config: Any, family: Family, *, units: int, has_qk_norm: bool) -> Geometry:
        """From a `transformers` configuration; ``units`` and ``has_qk_norm`` as found in its modules."""
        heads = int(config.num_attention_heads)
        names = ("activation_function", "hidden_act", "hidden_activation")
        activation = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
        return cls(
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            units=units,
            has_rotary=family.positions is None,
            has_qk_norm=has_qk_norm,
            is_relu=activation == "relu",
        )


@dataclass(frozen=True)
class InnerMaps:
    """The maps of one block, by path inside the block.

    Attributes:
        outputs: on the output side of each input-side linear.
        inputs: on the input side of each output-side linear.
        qk_gains: factors on the gains of the QK-norms (w,), by the norm's path.
    """

    outputs: dict[str, InnerMap]
    inputs: dict[str, InnerMap]
    qk_gains: dict[str, Float64[Tensor, " w"]]


def no_inner_maps(family: Family) -> InnerMaps:
    """Everything as it is."""
    return InnerMaps(
        outputs={path: Same() for segment in family.segments for path in segment.inputs},
        inputs={segment.output: Same() for segment in family.segments},
        qk_gains={},
    )


def draw_inner_maps(family: Family, geometry: Geometry, secret: MasterSecret, block: int) -> InnerMaps:
    """The maps that ``secret`` has for a block; the same arguments give the same maps."""
    label = f"block{block}/inner"
    kv_order, q_order = _orders(geometry, secret, label)
    q, k, gains = _scores(geometry, secret, label, kv_order, q_order)
    rotations = torch.stack([_haar(secret, f"{label}/v{head}", geometry.width) for head in range(geometry.kv_heads)])
    group = geometry.heads // geometry.kv_heads
    values = HeadRotations(kv_order, rotations)
    attended = HeadRotations(q_order, rotations.repeat_interleave(group, 0))
    attention, mlp = family.attention, family.mlp
    outputs: dict[str, InnerMap] = {}
    if len(attention.inputs) == 1:
        widths = [geometry.heads * geometry.width] + 2 * [geometry.kv_heads * geometry.width]
        outputs[attention.inputs[0]] = Joined([q, k, values], widths)
    else:
        outputs |= dict(zip(attention.inputs, (q, k, values), strict=True))
    units = _units(geometry, secret, label, is_scaled=geometry.is_relu or len(mlp.inputs) == 2)
    if len(mlp.inputs) == 2:  # gate, whose activation allows no scale, then up
        outputs[mlp.inputs[0]] = ScaledOrder(units[0], torch.ones(geometry.units, dtype=torch.float64))
    outputs[mlp.inputs[-1]] = ScaledOrder(*units)
    inputs: dict[str, InnerMap] = {attention.output: attended.dual(), mlp.output: ScaledOrder(*units).dual()}
    return InnerMaps(outputs, inputs, dict(zip(attention.exposed, gains, strict=False)))


def _orders(geometry: Geometry, secret: MasterSecret, label: str) -> tuple[Tensor, Tensor]:
    """The order of key-value heads, and that of query heads which follows it group by group."""
    kv_order = secret.permutation(f"{label}/heads", geometry.kv_heads)
    group = geometry.heads // geometry.kv_heads
    within = [old * group + secret.permutation(f"{label}/group{old}", group) for old in kv_order.tolist()]
    return kv_order, torch.cat(within)


def _scores(
    geometry: Geometry, secret: MasterSecret, label: str, kv_order: Tensor, q_order: Tensor
) -> tuple[InnerMap, InnerMap, tuple[Tensor, ...]]:
    """Maps of Q and K, and factors on the gains of QK-norms."""
    group, half = geometry.heads // geometry.kv_heads, geometry.width // 2
    if not geometry.has_rotary:
        blocks = torch.stack([_haar(secret, f"{label}/qk{head}", geometry.width) for head in range(geometry.kv_heads)])
        return HeadRotations(q_order, blocks.repeat_interleave(group, 0)), HeadRotations(kv_order, blocks), ()
    shape = (geometry.kv_heads, half)
    if geometry.has_qk_norm:
        signs = torch.where(secret.normal(f"{label}/signs", shape) < 0, -1.0, 1.0).to(torch.complex128)
        turns: tuple[Tensor, Tensor] = (signs, signs)
        scale = _scale(secret, f"{label}/gains", (half,)).repeat(2)
        gains: tuple[Tensor, ...] = (scale, 1 / scale)
    else:
        angle = _uniform(secret, f"{label}/angles", shape) * (2 * math.pi)
        scale = _scale(secret, f"{label}/scales", shape)
        turns, gains = (torch.polar(scale, angle), torch.polar(1 / scale, angle)), ()
    return PairTurns(q_order, turns[0].repeat_interleave(group, 0)), PairTurns(kv_order, turns[1]), gains


def _units(geometry: Geometry, secret: MasterSecret, label: str, *, is_scaled: bool) -> tuple[Tensor, Tensor]:
    order = secret.permutation(f"{label}/units", geometry.units)
    if not is_scaled:
        return order, torch.ones(geometry.units, dtype=torch.float64)
    return order, _scale(secret, f"{label}/unit-scales", (geometry.units,))


def _haar(secret: MasterSecret, label: str, dim: int) -> Tensor:
    return make_key("orthogonal", dim, secret, label).matrix()


def _uniform(secret: MasterSecret, label: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform on (0, 1), through the normal distribution function."""
    return torch.special.ndtr(secret.normal(label, shape))


def _scale(secret: MasterSecret, label: str, shape: tuple[int, ...]) -> Tensor:
    return ((2 * _uniform(secret, label, shape) - 1) * _LOG_SCALE).exp()
