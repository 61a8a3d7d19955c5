"""How each design would cut a model, from its configuration alone: who holds which tensor, the shares, who sees what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from veiltune.config import CutConfig
from veiltune.designs import DESIGNS
from veiltune.errors import UserError
from veiltune.models.accounting import DESIGNS as ACCOUNTED
from veiltune.models.accounting import Shares, TensorPlace, shares, tensor_placement
from veiltune.models.cut import Cut
from veiltune.models.cut_accounting import CutShares, cut_placement, cut_shares
from veiltune.models.family import Placement
from veiltune.models.sources import resolve_config
from veiltune.models.veil_accounting import veil_placement, veil_shares

BATCH, LENGTH = 4, 128
"""Of the forward pass whose FLOPs are counted."""
PLACEMENTS: tuple[Placement, ...] = ("compact", "paper")


@dataclass(frozen=True)
class Inspection:
    """One model under each way of dividing it, by label.

    Labels are "local", "obfuscatune compact", "veil 1+0" (blocks in the enclave), "cut 2+2" (all designs that cut it).

    Attributes:
        model: as the user named it.
        places: who holds each tensor.
        counts: the enclave's shares, or the owner's where the model is cut.
        sees: by design and observer, what it learns: from messages, then otherwise.
    """

    model: str
    places: dict[str, list[TensorPlace]]
    counts: dict[str, Shares | CutShares]
    sees: dict[str, dict[str, list[str]]]

    def as_json(self) -> dict[str, Any]:
        """Plain values, shares included."""
        return {
            "model": self.model,
            "designs": {
                label: {
                    **asdict(count),
                    **_shares_of(count),
                    "tensors": [asdict(place) for place in self.places[label]],
                }
                for label, count in self.counts.items()
            },
            "sees": self.sees,
        }


def _shares_of(count: Shares | CutShares) -> dict[str, float]:
    if isinstance(count, CutShares):
        return {"owner_share": count.owner_share, "flop_share": count.flop_share}
    return {
        "param_share": count.param_share,
        "flop_share": count.flop_share,
        "revealed_param_share": count.revealed_param_share,
    }


def inspect_model(
    model: str,
    placement: Placement | None = None,
    *,
    layers: tuple[int, int] | None = None,
    enclave_layers: Sequence[int] = (),
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """Look at a model under every design. No weight is read.

    Args:
        model: a model source.
        placement: of `obfuscatune`; both if ``None``.
        layers: the owner's first and last layers where the model is cut; as many as are usual and fit if ``None``.
        enclave_layers: of `veil`, a column for each; its default if empty.
        progress: called with a line before anything slow.

    Raises:
        ModelError: the model's configuration cannot be had, or no family covers it.
        ConfigError: ``layers`` or ``enclave_layers`` leave no trunk.
    """
    config = resolve_config(model, progress=progress)
    found = Inspection(model, {}, {}, {})
    for name in ACCOUNTED:
        for each in (placement,) if placement is not None else PLACEMENTS:
            label = f"{name} {each}" if _has_placement(name) else name
            found.places[label] = tensor_placement(config, each, name)
            found.counts[label] = shares(config, each, BATCH, LENGTH, design=name)
        found.sees[name] = observers(name)
    for depth in enclave_layers or (min(1, config.num_hidden_layers - 1),):
        cut = Cut.of(config, depth, 0)
        label = f"veil {depth}+0"
        found.places[label] = veil_placement(config, cut)
        found.counts[label] = veil_shares(config, cut, BATCH, LENGTH)
    found.sees["veil"] = observers("veil")
    usual = min(CutConfig().bottom_layers, (config.num_hidden_layers - 1) // 2)
    if usual or layers is not None:
        cut = Cut.of(config, *(layers or (usual, usual)))
        label = f"cut {cut.bottom_layers}+{cut.top_layers}"
        found.places[label] = cut_placement(config, cut)
        found.counts[label] = cut_shares(config, cut, BATCH, LENGTH)
    found.sees.update({name: observers(name) for name in DESIGNS if name not in found.sees})
    return found


def observers(design: str) -> dict[str, list[str]]:
    """What each observer of a design learns: host first, then the others; messages of mere control are left out."""
    table = DESIGNS[design]
    return {
        who: [
            *(f"{reveal.form}: {reveal.what}" for reveal in table.reveals[who].values() if reveal.form != "control"),
            *(f"besides: {what}" for what in table.also_sees.get(who, ())),
        ]
        for who in observers_of(design)
    }


def observers_of(design: str) -> list[str]:
    """Parties that receive anything under a design, the host first."""
    return sorted(DESIGNS[design].reveals, key=lambda who: (who != "host", who))


def _has_placement(design: str) -> bool:
    if design not in DESIGNS:
        raise UserError(f"there is no design {design!r}", hint=f"designs: {', '.join(DESIGNS)}")
    return "placement" in DESIGNS[design].options.model_fields
