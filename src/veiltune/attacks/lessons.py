"""What a learned inverter is taught: public text through the public bottom, as the provider would get it over the agreed wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from veiltune.attacks.passes import Agreement
from veiltune.attacks.shadow import Shadows

TEXTS = 16
"""Of like length, in one lesson."""


@dataclass(frozen=True)
class Lesson:
    """Public states as the provider would get them, right-padded, and their tokens; ``sent``: which would really be sent."""

    states: Float[Tensor, "n seq k"]
    ids: Int[Tensor, "n seq"]
    present: Bool[Tensor, "n seq"]
    sent: Bool[Tensor, "n seq"]


@dataclass(frozen=True)
class Text:
    """Tokens of a public text, and how many of its last ones would be sent, with its first."""

    tokens: Sequence[int] = field(repr=False)
    tail: int


def whole(texts: Sequence[Sequence[int]]) -> list[Text]:
    """Texts of which every position is sent."""
    return [Text(text, len(text)) for text in texts]


Shapes = tuple[tuple[int, int], ...]
"""Of each text its length, and how many of its last positions crossed, with its first."""


def shapes_of(places: Sequence[Int[Tensor, " _"]]) -> Shapes:
    """Of texts that crossed, from the places that each was told to have."""
    return tuple((int(each[-1]) + 1, len(each) - 1) for each in places)


def shaped(texts: Sequence[Sequence[int]], shapes: Shapes, rng: torch.Generator) -> list[Text]:
    """Public texts cut into pieces as long as those that crossed, with as many positions sent."""
    found: list[Text] = []
    for text in texts:
        start = 0
        while start < len(text):
            length, tail = shapes[int(torch.randint(len(shapes), (1,), generator=rng))]
            found.append(Text(text[start : start + length], tail))
            start += length
    return found


class Teacher:
    """Makes lessons of public text. Those in which nothing is drawn are kept: 4 bytes a token and channel."""

    def __init__(self, shadows: Shadows, agreed: Agreement, texts: Sequence[Text], rng: torch.Generator) -> None:
        self._shadows = shadows
        self._agreed = agreed
        self._rng = rng
        ordered = sorted(texts, key=lambda text: len(text.tokens))
        self._groups = [ordered[start : start + TEXTS] for start in range(0, len(ordered), TEXTS)]
        self._is_fixed = shadows.count == 1 and not agreed.wire.stochastic
        self._kept: dict[int, Lesson] = {}

    def __len__(self) -> int:
        """How many lessons there are."""
        return len(self._groups)

    def lesson(self, number: int) -> Lesson:
        """Texts of like length, by one of the bottoms. Where nothing is drawn, a lesson is made once."""
        if number in self._kept:
            return self._kept[number]
        lesson = self._made(number)
        if self._is_fixed:
            self._kept[number] = lesson
        return lesson

    def _made(self, number: int) -> Lesson:
        texts = [torch.tensor(text.tokens) for text in self._groups[number]]
        tails = torch.tensor([text.tail for text in self._groups[number]])
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        which = int(torch.randint(self._shadows.count, (1,), generator=self._rng))
        states = self._agreed.sent(self._shadows.states(ids, which), self._rng)
        every = torch.arange(ids.shape[1])
        present = every < lengths[:, None]
        sent = present & ((every == 0) | (every >= (lengths - tails)[:, None]))
        return Lesson(states, ids, present, sent)


def scaled(states: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch e"]:
    """Each state divided by its root mean square (the first position's is far larger than others'), and that size's logarithm."""
    size = states.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return torch.cat([states / size, size.log()], dim=-1)
