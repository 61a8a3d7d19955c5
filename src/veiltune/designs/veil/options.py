"""The options of `veil`: the table ``[veil]``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from veiltune.config import Section


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
