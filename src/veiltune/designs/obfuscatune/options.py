"""The options of `obfuscatune`: the table ``[obfuscatune]``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from veiltune.config import Section
from veiltune.errors import nearest
from veiltune.models.family import Placement
from veiltune.privacy.orthogonal import KEY_KINDS


class ObfuscaTuneOptions(Section):
    """The table ``[obfuscatune]``."""

    matrix: str = Field(
        default="orthogonal", description="kind of key: orthogonal, gaussian (naive), conditioned, butterfly"
    )
    condition_number: float | None = Field(default=None, description="of matrix = 'conditioned'")
    placement: Placement = Field(
        default="compact", description="what the enclave computes: compact, or as in the paper"
    )
    optimizer_at: Literal["host", "enclave"] = "enclave"
    spot_checks: float = Field(
        default=0,
        ge=0,
        le=1,
        description="share of what the host returns that the enclave checks; needs optimizer_at = 'enclave', and with "
        "placement = 'compact' disk for the trunk",
    )
    key_seed: int | None = Field(
        default=None, description="reproducible keys, for tests only; unset: from the system's randomness"
    )

    @model_validator(mode="after")
    def _check_matrix(self) -> ObfuscaTuneOptions:
        if self.matrix not in KEY_KINDS:
            raise ValueError(f"matrix {self.matrix!r} is no kind of key; {nearest(self.matrix, KEY_KINDS)}")
        if (self.matrix == "conditioned") != (self.condition_number is not None):
            raise ValueError("condition_number belongs to matrix = 'conditioned', and to it alone")
        if self.condition_number is not None and self.condition_number < 1:
            raise ValueError("a condition number is at least 1")
        return self
