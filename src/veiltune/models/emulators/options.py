"""Which emulator a provider builds: how many blocks it keeps, how they are compressed, how they are distilled."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from veiltune.config import Section
from veiltune.errors import ConfigError

Kind = Literal["layerdrop", "distilled", "lowrank", "quantised"]
Compression = Literal["none", "lowrank", "quantised"]


class EmulatorOptions(Section):
    """How the emulator of a trunk is made. Every kind may drop blocks; compression acts on those that are kept."""

    kind: Kind = Field(
        default="layerdrop",
        description="layerdrop: some of the trunk's blocks as they are; distilled: those, trained to give the trunk's output; "
        "lowrank, quantised: blocks with compressed linears",
    )
    compression: Compression = Field(
        default="none",
        description="for layerdrop and distilled: how the kept blocks' linears are compressed afterwards",
    )
    layers: int | None = Field(
        default=None,
        ge=1,
        description="trunk blocks kept, uniformly spaced; unset: half for layerdrop and distilled, all for the others",
    )
    rank: float = Field(
        default=0.25,
        gt=0,
        description="lowrank: share of each linear's full rank if at most 1, else the rank itself (a whole number)",
    )
    bits: Literal[8, 4] = Field(default=8, description="quantised: bits a weight")
    group: int = Field(default=64, ge=1, description="quantised: weights along the input that share a scale")
    distil_steps: int = Field(default=200, ge=1)
    distil_learning_rate: float = Field(default=1e-4, gt=0, description="AdamW's at the start; it falls linearly to 0")
    distil_batch: int = Field(default=8, ge=1, description="sequences a step")
    distil_length: int = Field(default=128, ge=2, description="tokens a sequence")
    distil_data: str | None = Field(
        default=None, description="public text to distil on (what data.train takes); unset: random tokens"
    )
    distil_cosine: float = Field(
        default=0.0, ge=0, description="weight of 1 - cosine beside the normalised squared error"
    )
    distil_seed: int = Field(default=0, ge=0, description="draws the sequences of each step")
    distil_checkpoint_every: int = Field(default=50, ge=1, description="steps between states to resume from")

    @model_validator(mode="after")
    def _check(self) -> EmulatorOptions:
        if self.kind in {"lowrank", "quantised"} and self.compression not in {"none", self.kind}:
            raise ValueError(f"compression = {self.compression!r} contradicts kind = {self.kind!r}")
        if self.rank > 1 and self.rank != int(self.rank):
            raise ValueError(f"rank = {self.rank} is neither a share of at most 1 nor a whole number")
        return self

    @property
    def compressor(self) -> Compression:
        """What is done to the linears of the kept blocks."""
        if self.kind == "lowrank" or self.kind == "quantised":  # noqa: PLR1714 - narrows the type
            return self.kind
        return self.compression

    def kept(self, trunk: range) -> tuple[int, ...]:
        """Slots of the trunk's blocks that are kept: uniformly spaced, the first and the last among them.

        *Reference.* Offsite-tuning's uniform layer drop: of n blocks the i-th of k kept is the one nearest to
        i·(n - 1)/(k - 1). One alone is the first.

        Raises:
            ConfigError: the trunk has fewer blocks, or none.
        """
        num = len(trunk)
        share = num if self.kind in {"lowrank", "quantised"} else (num + 1) // 2
        wanted = share if self.layers is None else self.layers
        if not 1 <= wanted <= num:
            raise ConfigError(
                f"an emulator of {wanted} blocks cannot be made from a trunk of {num}",
                hint="lower the emulator's layers, or the owner's bottom_layers and top_layers",
            )
        if wanted == 1:
            return (trunk[0],)
        gaps = wanted - 1
        return tuple(trunk[(2 * i * (num - 1) + gaps) // (2 * gaps)] for i in range(wanted))

    def rank_of(self, full_rank: int) -> int:
        """The rank of the factors of a matrix whose full rank is ``full_rank``."""
        wanted = round(self.rank * full_rank) if self.rank <= 1 else int(self.rank)
        return max(1, min(wanted, full_rank))

    def decisive(self) -> dict[str, Any]:
        """The options that the result depends on beside which blocks are kept, as JSON: what a fingerprint has to cover."""
        wanted = ["kind"]
        if self.compressor == "lowrank":
            wanted += ["rank"]
        if self.compressor == "quantised":
            wanted += ["bits", "group"]
        values = self.model_dump(mode="json")
        if self.kind == "distilled":
            wanted += [name for name in values if name.startswith("distil_") and name != "distil_checkpoint_every"]
        return {"compressor": self.compressor} | {name: values[name] for name in wanted}
