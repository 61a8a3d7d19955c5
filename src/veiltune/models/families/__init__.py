"""The table of model families. Adding one: a module here, and its line below."""

from __future__ import annotations

from typing import Any

from veiltune.errors import ModelError, nearest
from veiltune.models.families.gemma3 import GEMMA3
from veiltune.models.families.gpt2 import GPT2
from veiltune.models.families.llama import LLAMA
from veiltune.models.families.opt import OPT
from veiltune.models.family import Family

FAMILIES = (GPT2, OPT, LLAMA, GEMMA3)

__all__ = ["FAMILIES", "find_family"]


def find_family(config: Any) -> Family:
    """The family of a `transformers` configuration.

    Raises:
        ModelError: no family covers it, or the family refuses a feature of it.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            reason = family.refuses(config)
            if reason is not None:
                raise ModelError(
                    f"this {config.model_type} model cannot be protected: {reason}", hint="choose another checkpoint"
                )
            return family
    known = [name for family in FAMILIES for name in family.model_types]
    raise ModelError(f"unsupported architecture {config.model_type!r}", hint=nearest(config.model_type, known))
