"""Before masked weights go anywhere: does a public model give their keys away?

*Reveals.* Nothing: both models are read by the provider alone. What it finds goes to its own user and into the run's record.

*Bound.* It answers for the ancestors it was given, and for weights of the same shape; see `models.ancestry` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from veiltune.config import ProviderConfig
from veiltune.errors import ModelError
from veiltune.models.ancestry import AncestorCheck, check_ancestor
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.sources import resolve_model


def check_ancestors(
    settings: ProviderConfig, checkpoint: Checkpoint, report: Callable[[str, dict[str, Any]], None]
) -> list[AncestorCheck]:
    """Hold the model against every public ancestor of the configuration, and report each finding.

    Raises:
        ModelError: it is aligned with one, and ``provider.allow_public_ancestor`` is false; or an ancestor cannot be had.
    """
    found: list[AncestorCheck] = []
    for source in settings.public_ancestors:
        check = check_ancestor(checkpoint, resolve_model(source), blocks=settings.ancestor_blocks)
        report("ancestor", {"ancestor": source, "verdict": check.verdict, "what": str(check)})
        found.append(check)
    aligned = [check for check in found if check.verdict == "aligned"]
    if aligned and not settings.allow_public_ancestor:
        raise ModelError(
            f"nothing was sent: {checkpoint.source!r} is {aligned[0]}",
            hint="the host could recover keys, weights and text; provision another model, or accept it with "
            "provider.allow_public_ancestor = true",
        )
    return found
