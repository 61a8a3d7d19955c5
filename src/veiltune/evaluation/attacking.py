"""Attack a recorded run: gather what the attacker may have, let it work on its view, score it against the truth, with controls.

The attack gets a `View` and an `Auxiliary`; truth, tokenizer and scores stay here. What it may be published with is decided by
`veiltune.attacks.controls`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veiltune.attacks import ATTACKS, Attack, Auxiliary, EmbeddingTable, Reconstruction, Rights, View, load_view
from veiltune.attacks.base import predictions
from veiltune.attacks.controls import Finding, Trial, require_controls
from veiltune.attacks.passes import begins_pass
from veiltune.attacks.scores import (
    score_labels,
    score_predictions,
    score_sources,
    score_tensors,
    score_texts,
    score_units,
)
from veiltune.config import Config, load_config
from veiltune.designs import DESIGNS, option_tables
from veiltune.errors import ConfigError, UserError
from veiltune.evaluation.auxiliary import ancestor_of, public_corpus
from veiltune.evaluation.hosted import ancestor_model, enclave_layers, first_states, texts_of, trunk_weights
from veiltune.evaluation.record import RESULT
from veiltune.evaluation.truth import Moment, TruePass, TrueRow, distinct_rows, scorer_reads, true_passes
from veiltune.evaluation.unprotected import unprotected
from veiltune.models.sources import resolve_model
from veiltune.results import read_result, write_result

Say = Callable[[str], None]

HELD_OUT_LENGTH = 128
"""Tokens of a public text that a stolen model is measured on."""


@dataclass(frozen=True)
class Sample:
    """A true text beside what was made of it."""

    truth: str = field(repr=False)
    found: str = field(repr=False)


@dataclass(frozen=True)
class Attacked:
    """What one attack on one run came to."""

    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...] = field(repr=False)


@dataclass(frozen=True)
class _Case:
    """One run, loaded for one attack: the scorer's side of it."""

    attack: Attack
    config: Config
    model: nn.Module
    tokenizer: Any
    view: View
    passes: dict[int, TruePass]
    rows: list[TrueRow]
    known: list[tuple[int, int, int]]
    known_rows: int
    seed: int
    held_out: list[list[int]]

    @property
    def truths(self) -> list[list[int]]:
        return [list(row.tokens) for row in self.rows]


def attack_run(
    run: Path,
    attack: Attack,
    *,
    moment: Moment = "first",
    limit: int = 8,
    seed: int = 0,
    corpus: str | None = None,
    say: Say = lambda _: None,
) -> Attacked:
    """Attack a run's transcript and keep what came of it in the run's ``result.json``.

    Args:
        run: output directory of ``veiltune tune`` with ``session.record`` of the attack's observer.
        attack: with its settings.
        moment: attack the first texts that crossed, or the last: where the owner's layers were tuned, the last ones' states come
            from tuned layers.
        limit: sequences to reconstruct.
        seed: of everything drawn at random.
        corpus: public text for learned attacks, any data source (default: see `veiltune.evaluation.auxiliary`).
        say: told what is being done.

    Raises:
        UserError: no run, no transcript, an attack that does not fit the design, too little text.
        DataError: a transcript that is damaged, edited, or another observer's.
        ProtocolError: the attack reads what its observer does not see.
        ExactnessError: a control failed; nothing is kept.
    """
    config = run_config(run)
    require_fit(attack, config)
    result = read_result(run / RESULT)
    case = _case(run, config, attack, moment, limit, seed, corpus, say)
    found, leaky = _attempts(case, corpus, say)
    setting = "; ".join(part for part in (attack.setting, "" if moment == "first" else "at=last") if part)
    findings = tuple(_findings(case, found, leaky, setting))
    _keep(run, result, attack.name, setting, findings)
    return Attacked(findings, _samples(case, found))


def _attempts(case: _Case, corpus: str | None, say: Say) -> tuple[Reconstruction, Reconstruction]:
    """What the attack makes of the view, and of the same without protection; both draw alike."""
    attack = case.attack
    auxiliary = _auxiliary(case, attack, corpus, say)
    what = f"attacking {len(case.rows) - case.known_rows} sequences: " if attack.of_texts else ""
    say(f"{what}{attack.summary}")
    found = attack.run(case.view, auxiliary, torch.Generator().manual_seed(case.seed))
    say("the same without protection (leaky control)")
    layers = enclave_layers(case.config) if attack.leaky_layers is None else attack.leaky_layers
    bare = unprotected(case.view, case.model, case.passes, case.config.cut, layers)
    if attack.leaky_settings:
        auxiliary = _auxiliary(case, dataclasses.replace(attack, **attack.leaky_settings), corpus, say)
    if attack.leaky_knows_text:
        auxiliary = dataclasses.replace(auxiliary, corpus=texts_of(case.passes))
    return found, attack.leaky(bare, auxiliary, torch.Generator().manual_seed(case.seed))


def run_config(run: Path) -> Config:
    """The configuration that a run left.

    Raises:
        UserError: the directory is no run.
    """
    path = run / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{str(run)!r} is no run of Veiltune", hint="give a run's output directory") from None
    try:
        return load_config(values, options=option_tables())
    except (ConfigError, AttributeError, TypeError) as error:
        raise UserError(f"{str(path)!r} cannot be used: {error}", hint="run again with this version") from None


def require_fit(attack: Attack, config: Config) -> None:
    """Refuse an attack that says nothing about a run's design.

    Raises:
        UserError: it does not apply.
    """
    design = config.design
    if design not in attack.against:
        fitting = ", ".join(sorted(name for name, kind in ATTACKS.items() if design in kind.against)) or "none"
        raise UserError(f"{attack.name} is no attack on {design}", hint=f"attacks on {design}: {fitting}")
    if attack.single_tokens and (layers := enclave_layers(config)):
        raise UserError(
            f"{attack.name} knows single tokens' states, and with veil.enclave_layers = {layers} none of them crosses",
            hint="its failure there would prove nothing; known_plaintext takes whole known texts and reads through the blocks",
        )


def rights_of(design_name: str, observer: str) -> Rights:
    """What an observer sees under a design."""
    design = DESIGNS[design_name]
    peers = [b if a == observer else a for a, b in design.links if observer in {a, b}]
    return Rights.under(design_name, observer, design.reveals, peers)


def transcripts_of(run: Path, observer: str) -> list[Path]:
    """An observer's transcripts in the order they were written.

    Raises:
        UserError: there are none.
    """
    paths = sorted((run / "transcript").glob(f"{observer}*.vtt"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise UserError(
            f"{str(run)!r} holds no transcript of the {observer}",
            hint=f'tune again with --set session.record=["{observer}"]',
        )
    return paths


def _case(
    run: Path, config: Config, attack: Attack, moment: Moment, limit: int, seed: int, corpus: str | None, say: Say
) -> _Case:
    say("reading the transcript")
    rights = rights_of(config.design, attack.observer)
    reads = attack.against[config.design]
    rights.check(reads)
    kinds = rights.receives | rights.sends
    whole = load_view(transcripts_of(run, attack.observer), rights, reads | scorer_reads(kinds), begins_pass)
    checkpoint = resolve_model(config.model)
    tokenizer = checkpoint.load_tokenizer()
    longest = int(getattr(checkpoint.config, "max_position_embeddings", None) or 1 << 30)
    passes = true_passes(whole, config, tokenizer, longest) if attack.of_texts else {}
    say("loading the plain model")
    model = checkpoint.load_plain(torch.float32)
    if not attack.of_texts:
        texts = public_corpus(config, tokenizer, (), corpus, lambda _: None)
        held_out = [text[:HELD_OUT_LENGTH] for text in texts[-limit:]]
        return _Case(attack, config, model, tokenizer, whole.narrowed(reads), {}, [], [], 0, seed, held_out)
    kept = "place" if EmbeddingTable(model).has_positions else "token"
    told_by = "text" if enclave_layers(config) else kept
    rows, known, known_rows = _chosen(distinct_rows(passes, moment), attack, limit, told_by)
    targets: dict[int, list[int]] = {}
    for row in rows:
        targets.setdefault(row.number, []).append(row.row)
    view = whole.narrowed(reads).aimed(targets)
    return _Case(attack, config, model, tokenizer, view, passes, rows, known, known_rows, seed, [])


def _chosen(
    rows: Sequence[TrueRow], attack: Attack, limit: int, told_by: str
) -> tuple[list[TrueRow], list[tuple[int, int, int]], int]:
    """Sequences in the order of their passes, the pairs that the attacker knows, and how many sequences those take.

    Known states are told apart by their token, their token and place, or (where they come of all before them) are all distinct.
    """
    wanted = getattr(attack, "anchors", 0) or getattr(attack, "pairs", 0)
    known: dict[tuple[int, int], tuple[TrueRow, int, int]] = {}
    taken = 0
    while len(known) < wanted and taken < len(rows):
        for position, token in enumerate(rows[taken].tokens):
            if len(known) < wanted:
                label = {"token": (token, 0), "place": (token, position), "text": (-1 - taken, position)}[told_by]
                known.setdefault(label, (rows[taken], position, token))
        taken += 1
    others = list(rows[taken : taken + limit])
    if len(known) < wanted or len(others) < 2:
        raise UserError(
            f"the recorded texts hold {len(known)} distinct known tokens of {wanted}, and {len(others)} texts beside them",
            hint="lower anchors or pairs, or record more text",
        )
    ordered = sorted([*rows[:taken], *others], key=lambda row: (row.number, row.row))
    pairs = [(ordered.index(row), position, token) for row, position, token in known.values()]
    return ordered, pairs, taken


# --- what the attacker has --------------------------------------------------------------------------------------------


def _auxiliary(case: _Case, attack: Attack, corpus: str | None, say: Say) -> Auxiliary:
    given: dict[str, Any] = {}
    if "base_weights" in attack.auxiliary:
        given["base_weights"] = case.model
    if "embedding_table" in attack.auxiliary:
        given["embedding_table"] = EmbeddingTable(case.model)
    if "known_pairs" in attack.auxiliary:
        given["known_pairs"] = case.known
    if "public_ancestor" in attack.auxiliary:
        given["public_ancestor"] = ancestor_of(case.model, getattr(attack, "distance", 0.0), case.seed)
        if "ancestor_model" in attack.auxiliary:
            given["ancestor_model"] = ancestor_model(case.model, given["public_ancestor"])
    if "corpus" in attack.auxiliary:
        given["corpus"] = public_corpus(case.config, case.tokenizer, [*case.truths, *case.held_out], corpus, say)
    return Auxiliary(granted=attack.auxiliary, **given)


# --- scoring ----------------------------------------------------------------------------------------------------------


def _scored_rows(case: _Case) -> list[int]:
    """Sequences that are scored: those of which the attacker knew nothing."""
    known = {sequence for sequence, *_ in case.known}
    return [index for index in range(len(case.rows)) if index not in known]


def _findings(case: _Case, found: Reconstruction, leaky: Reconstruction, setting: str) -> list[Finding]:
    figures: dict[str, dict[str, Any]] = {}
    chance: dict[str, float] = {}
    generator = torch.Generator().manual_seed(case.seed)
    for trial in _trials(case, found, leaky):
        figures.update(trial.figures(generator))
        chance.update(trial.chance())
    require_controls(case.attack.name, case.attack.control, figures, chance)
    heading = (case.attack.name, case.attack.observer, case.config.design, setting)
    return [Finding(*heading, metric, **figure) for metric, figure in figures.items()]


def _trials(case: _Case, found: Reconstruction, leaky: Reconstruction) -> list[Trial]:
    rows = _scored_rows(case)
    trials: list[Trial] = []
    if found.tokens and leaky.tokens:
        score = partial(score_texts, decode=partial(case.tokenizer.decode, skip_special_tokens=True))
        sides = (case.truths, found.tokens, leaky.tokens)
        trials.append(Trial(score, *([side[i] for i in rows] for side in sides)))
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


def _samples(case: _Case, found: Reconstruction) -> tuple[Sample, ...]:
    if not found.tokens:
        return ()
    decode = case.tokenizer.decode
    return tuple(Sample(decode(case.truths[i]), decode(found.tokens[i])) for i in _scored_rows(case))


def _keep(run: Path, result: Any, name: str, setting: str, findings: Sequence[Finding]) -> None:
    """Into the record, under the attack's name and, where they are not the defaults, its settings."""
    key = f"{name}[{setting}]" if setting else name
    fields = ("value", "n", "ci95", "leaky_control", "shuffled_control", "observer")
    figures: Mapping[str, Any] = {each.metric: {f: getattr(each, f) for f in fields} for each in findings}
    privacy = {**result.privacy, key: figures}
    write_result(run / RESULT, result.model_copy(update={"privacy": privacy}))
