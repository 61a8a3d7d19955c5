"""The closed vocabularies of what was attacked: what an attacker knows beside its view, and which texts it is after.

Two attackers who know different things are two attackers, and so are one who is after the texts that were tuned on and one who
is after what was asked later. Figures of different ones are shown side by side and never as one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, TypeVar, get_args

Knows = Literal["nothing", "public_text", "public_ancestor", "known_plaintext"]
"""What an attack takes beside what its observer sees and holds itself; the strongest of several."""
Phase = Literal["tuning", "validation", "questions", "generation"]
"""Which of the owner's texts an attack is after."""

T = TypeVar("T")

KNOWS: Mapping[Knows, str] = {
    "nothing": "nothing beyond what the observer sees and holds (a provider holds its own weights)",
    "public_text": "public text of the same language",
    "public_ancestor": "a public ancestor of the secret weights, at the stated distance (0: those weights)",
    "known_plaintext": "some of the owner's tokens, and what the model does to them before they are sent",
}
PHASES: Mapping[Phase, str] = {
    "tuning": "texts that were tuned on",
    "validation": "held-out texts, on which the loss was measured while tuning",
    "questions": "questions asked later: scored items of tasks, before and after tuning",
    "generation": "prompts and answers that were generated",
}
_NOUNS: Mapping[Phase, str] = {
    "tuning": "tuning texts",
    "validation": "held-out texts",
    "questions": "questions",
    "generation": "generations",
}
_INCLUDED: Mapping[Knows, tuple[Knows, ...]] = {
    "nothing": ("nothing",),
    "public_text": ("nothing", "public_text"),
    "public_ancestor": ("nothing", "public_text", "public_ancestor"),
    "known_plaintext": ("nothing", "public_text", "known_plaintext"),
}


def within(knows: Knows | None, allowed: Collection[Knows] | None) -> bool:
    """Whether whoever has all of ``allowed`` can make an attack that takes ``knows``.

    Nothing is always had, and public text by whoever has more. An attack that does not say what it takes counts against
    everyone, and ``None`` allows all.
    """
    return allowed is None or knows is None or knows == "nothing" or any(knows in _INCLUDED[each] for each in allowed)


def in_order(found: Iterable[T], order: Iterable[T]) -> list[T]:
    """The distinct values in the order of a vocabulary, those outside it last."""
    known: Sequence[T] = list(order)
    distinct = list(dict.fromkeys(found))
    return sorted(distinct, key=lambda each: known.index(each) if each in known else len(known))


def told_knows(knows: Knows | None) -> str:
    """The knowledge in two or three words."""
    return "not stated" if knows is None else knows.replace("_", " ")


def told_phase(phase: Phase | None) -> str:
    """Whose texts, in a word or two; empty where none are stated."""
    return _NOUNS.get(phase, "") if phase else ""


ALL_KNOWS: tuple[Knows, ...] = get_args(Knows)
ALL_PHASES: tuple[Phase, ...] = get_args(Phase)
