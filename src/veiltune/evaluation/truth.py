"""What the texts in a recorded run really were: the scorer's knowledge, made again from the configuration.

The owner's passes are replayed (`veiltune.evaluation.replay`) and laid beside the recorded ones, phase by phase; a pass whose
shape is not the replayed one's is an error, not a guess. So it is also known of a phase that nothing of it crossed: every
recorded pass is then some other phase's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from veiltune.attacks import View
from veiltune.attacks.passes import (
    begins_pass,
    is_cached,
    lengths_of,
    masks_of_segments,
    places_of,
    whole_passes,
)
from veiltune.batching import epoch_order
from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import UserError
from veiltune.evaluation import replay
from veiltune.evaluation.asked import Asked
from veiltune.evaluation.replay import TruePass
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.study_terms import ALL_PHASES, PHASES, Phase
from veiltune.transport.messages import Message, PlugIn

__all__ = [
    "Moment",
    "Recorded",
    "TruePass",
    "TrueRow",
    "distinct_rows",
    "drawn",
    "scorer_reads",
    "true_passes",
]

Moment = Literal["first", "last"]

SCORER_READS = {
    "TrunkForward": ("training", "cache_id", "attention_mask", "position_ids", "hidden"),
    "SegmentForward": ("training", "cache_id", "segment", "context_id", "hidden"),
    "VeiledForward": ("training", "cache_id", "attention_mask", "hidden"),
    "PassContext": ("context_id", "attention_mask"),
    "SplitRequest": ("terms",),
    "PlugIn": ("method",),
}
FORWARDS = ("TrunkForward", "SegmentForward", "VeiledForward")


@dataclass(frozen=True)
class TrueRow:
    """One sequence that crossed: the message of its pass, its row there, its tokens, what tells it from others, its labels."""

    number: int
    row: int
    tokens: tuple[int, ...] = field(repr=False)
    prompt: tuple[int, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class _Observed:
    """A recorded pass: its texts' shape, and the lengths of its rows where the observer was told of the padding.

    Where positions were left out it is the place of the last one sent, which is the text's last, that tells how long a text is.
    """

    number: int
    training: bool
    shape: tuple[int, int]
    lengths: list[int] | None


def scorer_reads(view_kinds: frozenset[str]) -> frozenset[str]:
    """Fields the scorer needs beside the attack's, of the kinds that the observer sees."""
    return frozenset(f"{kind}.{leaf}" for kind, leaves in SCORER_READS.items() if kind in view_kinds for leaf in leaves)


class Recorded:
    """The passes in a view, and what they are of.

    Args:
        view: loaded with `scorer_reads`.
        config: of the run.
        tokenizer: of the model.
        longest: positions of the model.
        asked: generations of the run.
    """

    def __init__(self, view: View, config: Config, tokenizer: Any, longest: int, asked: Sequence[Asked] = ()) -> None:
        self.view = view
        self.config = config
        self.tokenizer = tokenizer
        self.longest = longest
        self.asked = asked
        passes = list(_observed(view.only(lambda _, message: begins_pass(message))))
        self.trained = [each for each in passes if each.training]
        self.untrained = [each for each in passes if not each.training]
        self.generated = _generated(view)

    @property
    def crossed(self) -> list[Phase]:
        """Phases of which passes may have been recorded, in order."""
        config, apart = self.config, DESIGNS[self.config.design].tunes_apart
        has: dict[Phase, bool] = {
            "tuning": bool(self.trained or (self.untrained and not apart and config.data.train)),
            "validation": bool(self.untrained and not apart and config.data.validation),
            "questions": bool(self.untrained and config.evaluate.tasks),
            "generation": bool(self.generated),
        }
        return [phase for phase in ALL_PHASES if has[phase]]

    @property
    def num_returned(self) -> int:
        """Messages with layers that were tuned on the owner's text."""
        return self.view.count(lambda _, message: isinstance(message, PlugIn))

    def passes(self, phase: Phase) -> dict[int, TruePass]:
        """The true text of each recorded pass of a phase, by the number of its first message.

        Raises:
            UserError: none was recorded, or what was recorded is not this configuration's.
        """
        observed, found = self._aligned(phase)
        if found:
            return found
        told = PHASES[phase]
        if not observed:
            raise UserError(
                f"no pass was recorded of {told}", hint="record a run that has some; or attack another phase"
            )
        raise UserError(
            f"the {len(observed)} recorded passes are not those that this configuration makes of {told}",
            hint="attack a run of `veiltune tune` with its own data; the data file may have changed since",
        )

    def others(self, phase: Phase) -> dict[int, TruePass]:
        """The true text of recorded passes of all other phases but generations, as far as they are told."""
        told = [self._aligned(each)[1] for each in self.crossed if each not in {phase, "generation"}]
        return {number: true for passes in told for number, true in passes.items()}

    def _aligned(self, phase: Phase) -> tuple[list[_Observed], dict[int, TruePass]]:
        config, tokenizer = self.config, self.tokenizer
        if phase == "generation":
            return self.generated, _matched(self.generated, list(replay.generations(self.asked, tokenizer)))
        if phase == "tuning" and self.trained:
            expected = list(replay.training(config, tokenizer))
            return self.trained, _prefix(self.trained, expected)
        if phase == "questions":
            tasks = list(replay.scorings(config, tokenizer, self.longest)) if config.evaluate.tasks else []
            return self.untrained, _stretches(self.untrained, tasks)
        if DESIGNS[config.design].tunes_apart:
            return self.trained, {}
        if self.trained:  # then those that were not trained on crossed as often as they were computed
            return self.untrained, _stretches(self.untrained, list(replay.validation(config, tokenizer)))
        fetched = list(replay.fetches(config, tokenizer))
        found = _stretches(self.untrained, [true for _, true in fetched])
        kept = {id(true) for label, true in fetched if label == phase}
        return self.untrained, {number: true for number, true in found.items() if id(true) in kept}

    def num_unexplained(self) -> int:
        """Recorded passes that are neither questions nor generations: where tuning is on an emulator, none should be left."""
        if not self.untrained:
            return len(self.trained)
        return len(self.trained) + len(self.untrained) - len(self._aligned("questions")[1])


def true_passes(
    view: View, config: Config, tokenizer: Any, longest: int, phase: Phase = "tuning"
) -> dict[int, TruePass]:
    """`Recorded.passes` of a view without generations."""
    return Recorded(view, config, tokenizer, longest).passes(phase)


def _observed(view: View) -> Iterator[_Observed]:
    masks = masks_of_segments(view) if view.rights.sees("PassContext") else {}
    codec = _codec(view)
    for kind in FORWARDS:
        if not view.rights.sees(kind):
            continue
        for seen in view.messages(kind):
            hidden = codec.decode(seen["hidden"]) if kind == "TrunkForward" else seen["hidden"]
            mask = masks.get(seen.number) if kind == "SegmentForward" else seen["attention_mask"]
            rows, length = hidden.shape[:2]
            known = mask is not None or kind == "TrunkForward"  # elsewhere no mask may mean that the enclave keeps it
            lengths = lengths_of(mask, rows, length) if known else None
            if kind == "TrunkForward" and lengths and (told := seen["position_ids"]) is not None:
                places = places_of([told], [length], rows)
                lengths = [int(row[:count].max()) + 1 for row, count in zip(places, lengths, strict=True)]
                length = max(lengths)
            yield _Observed(seen.number, seen["training"], (rows, length), lengths)


def _codec(view: View) -> WireCodec:
    requests = view.messages("SplitRequest") if view.rights.sees("SplitRequest") else []
    options = WireOptions.model_validate(requests[0]["terms"]["wire"]) if requests else WireOptions()
    return WireCodec.for_activations(options)


def _generated(view: View) -> list[_Observed]:
    """Generations: the prompt's length stands in the place of the row's."""
    codec = _codec(view)
    found: list[_Observed] = []
    keep: Callable[[int, Message], bool] = lambda _, message: is_cached(message) or not _is_forward(message)  # noqa: E731
    cached = view.only(keep).aimed(None)
    for kind in FORWARDS:
        for pieces in whole_passes(cached, kind) if view.rights.sees(kind) else ():
            parts = [codec.decode(each["hidden"]) if kind == "TrunkForward" else each["hidden"] for each in pieces]
            told = [each["position_ids"] if kind == "TrunkForward" else None for each in pieces]
            widths = [part.shape[1] for part in parts]
            ends = places_of(told, widths, len(parts[0]))[0, [widths[0] - 1, -1]] + 1
            prompt, total = ends.tolist()
            found.append(_Observed(pieces[0].number, False, (len(parts[0]), total), [prompt]))
    return found


def _is_forward(message: Message) -> bool:
    return type(message).__name__ in FORWARDS


# --- recorded beside replayed -----------------------------------------------------------------------------------------


def _prefix(observed: Sequence[_Observed], expected: Sequence[TruePass]) -> dict[int, TruePass]:
    """All observed passes with what they are, where they are the first of those expected."""
    pairs = list(zip(observed, expected, strict=False))
    whole = len(pairs) == len(observed) and all(_fits(*pair) for pair in pairs)
    return {seen.number: true for seen, true in pairs} if whole else {}


def _stretches(observed: Sequence[_Observed], expected: Sequence[TruePass]) -> dict[int, TruePass]:
    """Every place among the observed where all expected passes stand in order; or all observed, if the run was cut short."""
    if not expected or len(observed) < len(expected):
        return _prefix(observed, expected)
    found: dict[int, TruePass] = {}
    start = 0
    while start + len(expected) <= len(observed):
        pairs = list(zip(observed[start : start + len(expected)], expected, strict=True))
        fits = all(_fits(*pair) for pair in pairs)
        found |= {seen.number: true for seen, true in pairs} if fits else {}
        start += len(expected) if fits else 1
    return found


def _matched(observed: Sequence[_Observed], expected: Iterable[TruePass]) -> dict[int, TruePass]:
    """Generations with what they are of, both in order. The last token is not sent back; how far it came the states tell."""
    found: dict[int, TruePass] = {}
    left = iter(expected)
    for seen in observed:
        length = seen.shape[1]
        true = next((each for each in left if seen.lengths == [_prompt_length(each)]), None)
        if true is None or seen.shape[0] != 1 or not 0 <= true.ids.shape[1] - length <= 1:
            return {}
        found[seen.number] = TruePass(true.ids[:, :length], true.mask[:, :length], true.labels[:, :length])
    return found


def _prompt_length(true: TruePass) -> int:
    return int((true.labels < 0).sum())


def _fits(seen: _Observed, true: TruePass) -> bool:
    return seen.shape == tuple(true.ids.shape) and seen.lengths in (None, true.mask.sum(1).tolist())


# --- which of them are attacked ---------------------------------------------------------------------------------------


def distinct_rows(passes: dict[int, TruePass], moment: Moment) -> list[TrueRow]:
    """Sequences in the order they crossed (``last``: from the end), those with an earlier one's prompt left out."""
    chosen: dict[tuple[int, ...], TrueRow] = {}
    for number in sorted(passes, reverse=moment == "last"):
        true = passes[number]
        for index, (ids, mask, labels) in enumerate(zip(true.ids, true.mask, true.labels, strict=True)):
            tokens = tuple(ids[: int(mask.sum())].tolist())
            labelled = torch.nonzero(labels >= 0).flatten().tolist()
            prompt = tokens[: labelled[0]] if labelled and labelled[0] else tokens
            chosen.setdefault(prompt, TrueRow(number, index, tokens, prompt, tuple(labels[: len(tokens)].tolist())))
    return list(chosen.values())


def drawn(rows: Sequence[TrueRow], seed: int) -> list[TrueRow]:
    """Sequences in an order drawn with ``seed``: the scorer asks in order of length, so its first few are like no others."""
    return [rows[index] for index in epoch_order(len(rows), seed, epoch=0)]
