"""What attacks on parameter gradients have in common: the gradients of each step, whose text they are of, and the key's removal.

*What a gradient says.* For a linear Y = X·W the gradient is dW = Xᵀ·dY: a combination of the rows of X, whatever the loss was.
A LoRA pair has dA = Xᵀ·(dY·Bᵀ)·s, of rank r at most and zero while B is, and dB = s·(X·A)ᵀ·dY (row-vector convention).

*Symbols.* R the key of an input side. The host's dA* = X*ᵀ·(dY·Bᵀ)·s = Rᵀ·dA: its columns span rows of X·R instead of X. An
attacker with an ancestor of the weights estimates R (`veiltune.attacks.procrustes`) and puts dA = R⁻ᵀ·dA*.

Only factor gradients that cross are read: those of designs whose optimiser is in the enclave. Where it is on the host the same
numbers are there, and no message. In a run without protection (the control) full gradients of the first `FULL_BLOCKS` blocks'
linears stand in their place, as every participant of plain federated training sends them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.attacks.passes import FIRST_SEGMENT, lengths_of, masked_weights, masks_of_segments
from veiltune.attacks.procrustes import recovered_keys
from veiltune.attacks.view import Seen, View
from veiltune.errors import DataError
from veiltune.models.family import Family, Linear

FULL_BLOCKS = 3
"""Blocks whose full gradients the control holds: what attacks read, at 14 MB a block of SmolLM2-135M."""
SAME_DIRECTION = 1e-6
"""Singular values below this share of the largest are rounding: gradients are computed in float32."""

KeyFrom = Literal["none", "ancestor"]

GRADIENTS = {
    "obfuscatune": frozenset(
        {
            "FactorGradients.tensors",
            "Factors.tensors",
            "SegmentForward.segment",
            "SegmentForward.training",
            "SegmentForward.context_id",
            "SegmentForward.hidden",
            "PassContext.context_id",
            "PassContext.attention_mask",
            "TrunkShard.tensors",
        }
    )
}
"""What is read, by design. Of ``SegmentForward.hidden`` these attacks take the shape alone."""


@dataclass(frozen=True)
class Step:
    """One step's gradients, and the texts that were in it.

    Attributes:
        gradients: by parameter name, as they crossed.
        factors: the LoRA factors at that step, by parameter name, as they crossed.
        lengths: tokens of each sequence of the step.
        wanted: which of them are asked for, by number in ``lengths``, in the order of the view.
    """

    gradients: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    lengths: list[int]
    wanted: list[int]


def steps_of(view: View) -> list[Step]:
    """Every step with a sequence that is asked for, in order.

    Raises:
        DataError: no gradients crossed for a sequence that is asked for.
    """
    masks = masks_of_segments(view)
    kinds = ("SegmentForward", "Factors", "FactorGradients")
    events = sorted((seen for kind in kinds for seen in view.messages(kind)), key=lambda seen: seen.number)
    found: list[Step] = []
    factors: dict[str, Tensor] = {}
    lengths: list[int] = []
    wanted: list[int] = []
    for seen in events:
        if seen.kind == "Factors":
            factors = {**factors, **seen["tensors"]}
        elif seen.kind == "FactorGradients":
            if wanted:
                found.append(Step(seen["tensors"], factors, lengths, wanted))
            lengths, wanted = list[int](), list[int]()
        elif seen["segment"] == FIRST_SEGMENT and seen["training"]:
            wanted += [len(lengths) + row for row in _asked(view, seen)]
            rows, seq = seen["hidden"].shape[:2]
            lengths += lengths_of(masks.get(seen.number), rows, seq)
    if wanted or not found:
        raise DataError(
            "no gradients crossed for the texts in question",
            hint="record a run with optimizer_at = enclave; on the host the same gradients are no message",
        )
    return found


def _asked(view: View, seen: Seen) -> list[int]:
    return view.rows(seen.number, len(seen["hidden"])) if view.targets is None or seen.number in view.targets else []


def input_keys(
    view: View, ancestor: Mapping[str, Tensor], family: Family, linears: Collection[Linear]
) -> dict[str, Float[Tensor, "d d"]]:
    """The input-side keys of these linears, estimated from masked weights and an ancestor, by label."""
    readers = [linear for linear in linears if linear.side == "input"]
    return {
        label: key.float() for label, key in recovered_keys(masked_weights(view), ancestor, family, readers).items()
    }


def plain_step(step: Step, keys: Mapping[str, Tensor], readers: Collection[Linear]) -> Step:
    """A step with the keys taken off what meets them on the input side: d(lora_A) = d(lora_A*)·R⁻¹, lora_A = lora_A*·Rᵀ."""
    gradients, factors = dict(step.gradients), dict(step.factors)
    for linear in readers:
        name, key = f"{linear.path}.lora_A", keys.get(linear.key)
        if key is not None and name in gradients:
            gradients[name] = (gradients[name].double() @ torch.linalg.inv(key.double())).float()
            factors[name] = factors[name].float() @ key.T
    return dataclasses.replace(step, gradients=gradients, factors=factors)


def input_rows(
    gradients: Mapping[str, Tensor], linears: Collection[Linear], family: Family
) -> Float[Tensor, "n d"] | None:
    """Vectors in the span of what these linears read, from their gradients; ``None`` if all of them are zero.

    All linears must read the same states.
    """
    parts: list[Tensor] = []
    for linear in linears:
        full, factor = gradients.get(f"{linear.path}.weight"), gradients.get(f"{linear.path}.lora_A")
        rows = factor if full is None else full.T if family.weights_in_out else full
        if rows is not None and bool(rows.any()):
            parts.append(rows.double())
    return torch.cat(parts) if parts else None


def basis_of(rows: Float[Tensor, "n d"], most: int) -> Float[Tensor, "k d"]:
    """An orthonormal basis of the span, of at most ``most`` directions: the strongest."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    count = min(most, int((values > SAME_DIRECTION * values[0]).sum()))
    return vectors[:count].float()


def residuals(states: Float[Tensor, "*batch d"], basis: Float[Tensor, "k d"]) -> Float[Tensor, "*batch"]:
    """What of each state lies outside the span, relative to the state: 0 inside, about √(1 - k/d) for a random direction."""
    inside = (states @ basis.T).square().sum(-1)
    whole = states.square().sum(-1).clamp_min(1e-30)
    return (1 - inside / whole).clamp_min(0).sqrt()


def attention_inputs(family: Family, config: Any, block: int) -> list[Linear]:
    """The linears that read a block's first normed states."""
    label = f"block{block}.attention.in"
    return [linear for linear in family.linears(int(config.num_hidden_layers)) if linear.key == label]
