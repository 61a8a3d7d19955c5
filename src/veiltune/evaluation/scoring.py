"""What an attack came up with beside the truth: its figures with both controls, and samples of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import eq
from typing import Any

import torch

from veiltune.attacks import Reconstruction
from veiltune.attacks.base import predictions
from veiltune.attacks.controls import Finding, Trial, require_controls
from veiltune.attacks.inside import assigned
from veiltune.attacks.scores import (
    score_labels,
    score_predictions,
    score_sources,
    score_tensors,
    score_texts,
    score_units,
)
from veiltune.evaluation.case import Case
from veiltune.evaluation.hosted import first_states, trunk_weights


@dataclass(frozen=True)
class Sample:
    """A true text beside what was made of it."""

    truth: str = field(repr=False)
    found: str = field(repr=False)


def in_best_order(found: Reconstruction, truths: Sequence[Sequence[int]]) -> Reconstruction:
    """Texts that an attack could not tell apart, each put where most of its tokens are right: their order is no finding."""
    if not found.tokens or not found.alike:
        return found
    tokens = list(found.tokens)
    for group in found.alike:
        rows = [[sum(map(eq, truths[true], found.tokens[mine])) for mine in group] for true in group]
        for true, place in zip(group, assigned(torch.tensor(rows).float()).tolist(), strict=True):
            tokens[true] = found.tokens[group[place]]
    return replace(found, tokens=tokens)


def _scored_rows(case: Case) -> list[int]:
    """Sequences that are scored: those of which the attacker knew nothing."""
    known = {sequence for sequence, *_ in case.known}
    return [index for index in range(len(case.rows)) if index not in known]


def findings_of(case: Case, found: Reconstruction, leaky: Reconstruction, setting: str) -> list[Finding]:
    """The figures of an attack.

    Raises:
        ExactnessError: a control failed.
    """
    figures: dict[str, dict[str, Any]] = {}
    chance: dict[str, float] = {}
    generator = torch.Generator().manual_seed(case.seed)
    for trial in _trials(case, found, leaky):
        figures.update(trial.figures(generator))
        chance.update(trial.chance())
    require_controls(case.attack.name, case.attack.control, figures, chance)
    heading = (case.attack.name, case.attack.observer, case.config.design, setting)
    told: dict[str, Any] = {"knows": case.attack.knows, "phase": case.phase}
    return [Finding(*heading, metric, **figure, **told) for metric, figure in figures.items()]


def _trials(case: Case, found: Reconstruction, leaky: Reconstruction) -> list[Trial]:
    rows = _scored_rows(case)
    trials: list[Trial] = []
    if found.tokens and leaky.tokens:
        score = partial(score_texts, decode=partial(case.tokenizer.decode, skip_special_tokens=True))
        sides = (case.truths, found.tokens, leaky.tokens)
        trials.append(Trial(score, *([side[i] for i in rows] for side in sides), others=case.others))
    if found.labels and leaky.labels:
        score = partial(score_labels, decode=partial(case.tokenizer.decode, skip_special_tokens=True))
        sides = ([list(row.labels) for row in case.rows], found.labels, leaky.labels)
        trials.append(Trial(score, *([side[i] for i in rows] for side in sides)))
    if found.states and leaky.states:
        truths = first_states(case.model, case.config, case.truths)
        sides = (truths, found.states, leaky.states)
        trials.append(Trial(partial(score_tensors, what="state"), *([side[i] for i in rows] for side in sides)))
    if found.weights and leaky.weights:
        names = sorted(found.weights)
        true = trunk_weights(case.model, case.config.design)
        sides = ([each[name] for name in names] for each in (true, found.weights, leaky.weights))
        trials.append(Trial(partial(score_tensors, what="weight"), *sides))
    if found.units and leaky.units:
        names = sorted(found.units)
        true = trunk_weights(case.model, case.config.design)
        shaped = [true[name] if true[name].shape == found.units[name].shape else true[name].T for name in names]
        sides = ([each[name] for name in names] for each in (found.units, leaky.units))
        trials.append(Trial(score_units, shaped, *sides))
    if found.sources and leaky.sources:
        truths = first_states(case.model, case.config, case.truths)
        trials.append(Trial(score_sources, truths, found.sources, leaky.sources, leaky.source_truth))
    if found.predict and leaky.predict:
        sides = tuple([predict(text) for text in case.held_out] for predict in (found.predict, leaky.predict))
        nexts = [text[1:] for text in case.held_out]
        theirs = [predictions(case.model, text) for text in case.held_out]
        trials.append(Trial(partial(score_predictions, what="next_token_accuracy"), nexts, *sides))
        trials.append(Trial(partial(score_predictions, what="agreement"), theirs, *sides))
    return trials


def samples_of(case: Case, found: Reconstruction) -> tuple[Sample, ...]:
    """Each scored text beside what was made of it."""
    if not found.tokens:
        return ()
    decode = case.tokenizer.decode
    guessed = [[token for token in each if token >= 0] for each in found.tokens]
    return tuple(Sample(decode(case.truths[i]), decode(guessed[i])) for i in _scored_rows(case))
