"""Attacks on what an observer saw. The table of them: adding one is a module here, and its line below.

Nothing here knows of sessions, designs or parties: a design comes as a name and the kinds of message it reveals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from veiltune.attacks.activation import ActivationInversion
from veiltune.attacks.anchors import GramAnchors, KnownPlaintext
from veiltune.attacks.arrows import ArrowMatch
from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, Reconstruction
from veiltune.attacks.bisr import Bisr
from veiltune.attacks.codebook import Codebook
from veiltune.attacks.cut_gradients import GradientLabels
from veiltune.attacks.emulator import EmulatorMisuse
from veiltune.attacks.inverter import LearnedInverter, RidgeInverter
from veiltune.attacks.lamp import Lamp
from veiltune.attacks.matching import VocabularyMatching
from veiltune.attacks.procrustes import Procrustes
from veiltune.attacks.retraining import Retraining
from veiltune.attacks.separation import IndependentComponents
from veiltune.attacks.span import Dager
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
    for attack in (
        VocabularyMatching,
        GramAnchors,
        Procrustes,
        KnownPlaintext,
        RidgeInverter,
        LearnedInverter,
        GradientLabels,
        ActivationInversion,
        Bisr,
        Dager,
        Lamp,
        EmulatorMisuse,
        ArrowMatch,
        Codebook,
        IndependentComponents,
        Retraining,
    )
}


def make_attack(name: str, settings: Mapping[str, Any] | None = None) -> Attack:
    """An attack by its name, with settings beside the defaults.

    Raises:
        UserError: an unknown attack or setting, or a value of another type or out of range.
    """
    if name not in ATTACKS:
        raise UserError(f"there is no attack {name!r}", hint=nearest(name, ATTACKS))
    kind = ATTACKS[name]
    known = {each.name: each for each in dataclasses.fields(kind)}
    types = get_type_hints(kind)
    for key, value in (settings or {}).items():
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}", hint=nearest(key, known))
        _check(f"{name}: {key}", value, types[key], known[key].metadata)
    return kind(**(settings or {}))


def _check(what: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> None:
    """Refuse a value of another type, or below its ``least`` (see `veiltune.attacks.base.setting`)."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{what} = {value!r} is none of {', '.join(get_args(kind))}", hint="choose one of these")
        return
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{what} = {value!r} is neither true nor false", hint="correct it")
        return
    least = limits.get("least", 1 if kind is int else 0)
    right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not right or value < least:
        raise UserError(f"{what} = {value!r} is no {kind.__name__} of at least {least}", hint="correct it")
