"""Attacks on what an observer saw. The table of them: adding one is a module here, and its line below.

Nothing here knows of sessions, designs or parties: a design comes as a name and the kinds of message it reveals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from veiltune.attacks.anchors import GramAnchors, KnownPlaintext
from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, Reconstruction
from veiltune.attacks.inverter import LearnedInverter, RidgeInverter
from veiltune.attacks.matching import VocabularyMatching
from veiltune.attacks.procrustes import Procrustes
from veiltune.attacks.view import Rights, View, load_view
from veiltune.errors import UserError, nearest

__all__ = [
    "ATTACKS",
    "Attack",
    "Auxiliary",
    "EmbeddingTable",
    "Reconstruction",
    "Rights",
    "View",
    "load_view",
    "make_attack",
]

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (VocabularyMatching, GramAnchors, Procrustes, KnownPlaintext, RidgeInverter, LearnedInverter)
}


def make_attack(name: str, settings: Mapping[str, Any] | None = None) -> Attack:
    """An attack by its name, with settings beside the defaults.

    Raises:
        UserError: an unknown attack or setting, or a value of another type or out of range.
    """
    if name not in ATTACKS:
        raise UserError(f"there is no attack {name!r}", hint=nearest(name, ATTACKS))
    kind = ATTACKS[name]
    known = {each.name for each in dataclasses.fields(kind)}
    types = get_type_hints(kind)
    for key, value in (settings or {}).items():
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}", hint=nearest(key, known))
        wanted = (int, float) if types[key] is float else types[key]
        least = 0 if key in {"distance", "layers"} else 1
        if (
            isinstance(value, bool)
            or not isinstance(value, wanted)
            or (value < least and types[key] is int)
            or value < 0
        ):
            raise UserError(
                f"{name}: {key} = {value!r} is no {types[key].__name__} of at least {least}", hint="correct it"
            )
    return kind(**(settings or {}))
