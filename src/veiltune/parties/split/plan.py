"""What distinguishes one design that cuts the model from another, and what its two parties must agree on.

The parties run the same code under `split`, `online`, `gradfree`, `offsite` and `offline`; a `SplitPlan`, made from the
design's options, says what is trained, how the wire is encoded, and what stands beside or in the place of the trunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from veiltune.config import Config, Section
from veiltune.errors import ProtocolError
from veiltune.models.emulators.options import EmulatorOptions
from veiltune.privacy.decorrelation import DecorrelationOptions
from veiltune.privacy.quantisation import WireOptions

PROTOCOL = 1

LastPositions = Annotated[
    int,
    Field(ge=0, description="of each row of a pass send its first token and so many of its last; 0: send every one"),
]
"""How many of a row's last positions go to the trunk: the owner's own affair (`models.sent_positions`)."""


class ServerOptions(Section):
    """How the provider's trunk server works: its own business, no part of what is agreed on."""

    activations: Literal["recompute", "keep"] = Field(
        default="keep", description="between a forward and its backward: keep the graph, or run the trunk again"
    )
    max_pending: int = Field(default=4, ge=1, description="forwards of one owner that may wait for their backward")
    pending_seconds: float = Field(default=600.0, gt=0, description="how long one may wait")
    max_caches: int = Field(default=4, ge=1, description="generations of one owner at a time")
    max_tokens: int = Field(
        default=65536, ge=1, description="tokens of one message with what its cache holds, padding included"
    )
    max_sessions: int = Field(default=64, ge=1, description="owners at a time")


class CacheOptions(Section):
    """The owner's cache of trunk outputs, under its own directory."""

    max_bytes: int = Field(default=8 << 30, ge=1, description="how much disk it may take")
    sealed: bool = Field(default=False, description="encrypt it at rest")


class WarmUpOptions(Section):
    """Decorrelation of the bottom layers before anything crosses, on the owner's own text, without the trunk."""

    steps: int = Field(default=0, ge=0, description="0: none; the bottom is left as it came")
    learning_rate: float = Field(default=1e-3, gt=0)
    alpha: float = Field(
        default=1.0, ge=0, description="weight of the distance correlation beside fidelity to the old states"
    )
    samples: int = Field(default=256, ge=2, description="rows of a batch that the correlation is taken over")


@dataclass(frozen=True)
class SplitPlan:
    """One design's division of labour.

    Attributes:
        trains: the owner's blocks on both sides of the trunk, or the top ones alone.
        wire: how states and gradients are encoded.
        decorrelation: its weight in the training objective; ``None``: no such term.
        cache: where trunk outputs are kept for all epochs; ``None``: every step crosses.
        warm_up: see `WarmUpOptions`.
        emulator: what stands in for the trunk in training; ``None``: the trunk itself.
        plug_in: the owner returns what it trained, and the provider puts it into its model.
        last_positions: how many of a row's last positions are sent, with its first; 0: all are.
        server: the provider's own settings.
    """

    trains: Literal["owner", "top"] = "owner"
    wire: WireOptions = field(default_factory=WireOptions)
    decorrelation: DecorrelationOptions | None = None
    cache: CacheOptions | None = None
    warm_up: WarmUpOptions | None = None
    emulator: EmulatorOptions | None = None
    plug_in: bool = False
    last_positions: int = 0
    server: ServerOptions = field(default_factory=ServerOptions)


def terms_of(config: Config, plan: SplitPlan, *, pins: Mapping[str, Any]) -> dict[str, Any]:
    """What one party is ready to do, item by item. ``pins``: ``weights`` and ``vocabulary``, where it knows them."""
    emulator = lora = None
    if plan.emulator is not None:  # how it is distilled is the provider's business
        values = plan.emulator.model_dump(mode="json")
        emulator = {name: value for name, value in values.items() if not name.startswith("distil_")}
    if plan.plug_in:  # the provider is to merge it
        lora = config.lora.model_dump(mode="json", include={"rank", "alpha", "targets"})
    return {
        "protocol": PROTOCOL,
        "design": config.design,
        "model": config.model,
        "weights": pins.get("weights"),
        "vocabulary": pins.get("vocabulary"),
        "cut.bottom_layers": config.cut.bottom_layers,
        "cut.top_layers": config.cut.top_layers,
        "dtype": config.dtype,
        "wire": plan.wire.model_dump(mode="json"),
        "emulator": emulator,
        "plug_in": plan.plug_in,
        "lora": lora,
    }


def require_agreement(asked: Mapping[str, Any], served: Mapping[str, Any]) -> None:
    """Refuse what differs. An item that the asker leaves open (``None``, of a pin) is the server's to fill.

    Raises:
        ProtocolError: names the first item that differs, and both its values.
    """
    for name, mine in served.items():
        theirs = asked.get(name)
        if theirs == mine or (name in {"weights", "vocabulary"} and theirs is None):
            continue
        raise ProtocolError(
            f"the owner asks for {name} = {_short(theirs)}, this provider serves {_short(mine)}",
            hint=_HINTS.get(name, f"agree on {name} in both configurations"),
        )
    for name in asked.keys() - served.keys():
        raise ProtocolError(
            f"the owner asks for {name!r}, of which this provider knows nothing", hint="use one version"
        )


_HINTS = {
    "protocol": "install the same version of veiltune on both sides",
    "weights": "the provider has changed its model since this run began: start anew with --overwrite",
    "vocabulary": "the tokenizer is of another model",
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:61]}…"
