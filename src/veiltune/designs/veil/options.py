"""The options of `veil`: the table ``[veil]``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from veiltune.config import Section
from veiltune.errors import ConfigError
from veiltune.models.family import Family


class VeilOptions(Section):
    """The table ``[veil]``."""

    enclave_layers: int = Field(
        default=1, ge=0, description="first blocks in the enclave; with 0 equal tokens enter the trunk as equal rows"
    )
    enclave_top_layers: int = Field(default=0, ge=0, description="last blocks in the enclave")
    optimizer_at: Literal["host", "enclave"] = "enclave"
    inner: bool = Field(
        default=True, description="also hide Q, K, V and MLP states by maps of their own; false: for study"
    )
    dropout: Literal["refuse", "rotated"] = Field(
        default="refuse",
        description="of trunk states, in training: refuse it, or drop channels of the rotated basis instead of plain ones",
    )
    sandwich_norms: Literal["refuse", "open"] = Field(
        default="refuse",
        description="of families that norm what a branch adds (Gemma): what stands for such a norm lets the host compute the "
        "rotation, so 'open' hides nothing of the stream and is for study",
    )
    key_seed: int | None = Field(
        default=None, description="reproducible keys, for tests only; unset: from the system's randomness"
    )
    ranks: int = Field(
        default=1,
        ge=1,
        description="processes the host shares the trunk among; heads and hidden units must divide evenly",
    )
    rendezvous: str | None = Field(
        default=None,
        description="HOST:PORT where the host's first rank awaits the others, which are started elsewhere; unset: it starts them",
    )
    compile: bool = Field(default=False, description="torch.compile the host's blocks, in passes without a KV cache")
    compile_backend: Literal["inductor", "aot_eager"] = Field(
        default="inductor", description="aot_eager: traced but not compiled, where there is no compiler; for study"
    )
    checkpointing: bool = Field(
        default=False, description="the host keeps only what enters blocks, and computes them again in the backward"
    )
    canaries: float = Field(
        default=0,
        ge=0,
        le=1,
        description="share of steps, of passes without a backward and of generations that the enclave computes again; needs "
        "optimizer_at = 'enclave', and disk for the trunk",
    )
    protected: str | None = Field(
        default=None,
        description="directory of veiltune protect: the host takes its trunk from there instead of from the enclave",
    )
    key: str | None = Field(
        default=None,
        description="the key of protected; unset: where veiltune protect leaves it, DIR.enclave/protection.key",
    )


def refuse_sandwich_norms(options: VeilOptions, family: Family) -> None:
    """R⁻¹·diag(g)·R, which stands for a norm on what a branch adds, has the rows of R for eigenvectors.

    Raises:
        ConfigError: the family has such norms, and the options do not allow them.
    """
    if options.sandwich_norms == "refuse" and any(segment.post_norm for segment in family.segments):
        raise ConfigError(
            f"{family.name} norms what its branches add, and what stands for such a norm gives the rotation away",
            hint="use obfuscatune, or set veil.sandwich_norms = 'open' to study it without that protection",
        )
