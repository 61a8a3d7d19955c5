"""One recorded run loaded for one attack: the scorer's side of it, with the truth of the phase that is attacked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veiltune.attacks import ATTACKS, Attack, EmbeddingTable, Rights, View, load_view
from veiltune.attacks.passes import begins_pass, carries_first, is_cached
from veiltune.config import Config, load_config
from veiltune.data import load_tokenized
from veiltune.designs import DESIGNS, option_tables
from veiltune.errors import ConfigError, UserError
from veiltune.evaluation.asked import read_asked
from veiltune.evaluation.auxiliary import public_corpus
from veiltune.evaluation.hosted import enclave_layers
from veiltune.evaluation.truth import (
    Moment,
    Recorded,
    TruePass,
    TrueRow,
    distinct_rows,
    drawn,
    scorer_reads,
)
from veiltune.models.sources import resolve_model
from veiltune.study_terms import ALL_PHASES, PHASES, Phase, in_order
from veiltune.transport.messages import Message

Say = Callable[[str], None]

HELD_OUT_LENGTH = 128
"""Tokens of a public text that a stolen model is measured on."""


@dataclass(frozen=True)
class Case:
    """One run, loaded for one attack.

    Attributes:
        attack: with its settings.
        config: of the run.
        phase: whose texts are attacked; ``None``: none are.
        model: the plain causal language model before tuning.
        tokenizer: its own.
        view: the attack's, aimed at ``rows``.
        passes: the truth of the phase.
        beside: the truth of other phases' passes in the view, for an attack whose leaky control knows all text.
        rows: sequences in the order of the view.
        known: pairs that the attacker is given.
        known_rows: how many sequences those take.
        seed: of everything drawn.
        held_out: public texts that a stolen model is measured on.
        others: texts of the run beside those attacked, for the shuffled control where one text alone is attacked.
    """

    attack: Attack
    config: Config
    phase: Phase | None
    model: nn.Module
    tokenizer: Any
    view: View
    passes: dict[int, TruePass]
    beside: dict[int, TruePass]
    rows: list[TrueRow]
    known: list[tuple[int, int, int]]
    known_rows: int
    seed: int
    held_out: list[list[int]]
    others: list[list[int]]

    @property
    def truths(self) -> list[list[int]]:
        """The tokens of every sequence."""
        return [list(row.tokens) for row in self.rows]


@dataclass(frozen=True)
class Wanted:
    """Of a run, what is to be attacked, and with which draws and public text; see `attacking.attack_run`."""

    phase: Phase | None
    moment: Moment
    limit: int
    seed: int
    corpus: str | None


@dataclass(frozen=True)
class Nothing:
    """Of a phase nothing crossed: every recorded pass was told to be of another.

    Attributes:
        phase: of which.
        num_passes: recorded passes of it: 0.
        num_others: recorded passes, all of other phases.
        num_returned: messages with layers that were tuned in it.
    """

    phase: Phase
    num_passes: int
    num_others: int
    num_returned: int


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


def load_case(run: Path, config: Config, attack: Attack, wanted: Wanted, say: Say) -> Case | Nothing:
    """Everything of a run that an attack and its scores need; of a phase in which nothing crossed, that.

    Raises:
        UserError: no transcript, no such phase, too little text.
        DataError: a transcript that is damaged, edited, or another observer's.
        ProtocolError: the attack reads what its observer does not see.
    """
    say("reading the transcript")
    rights = rights_of(config.design, attack.observer)
    reads = attack.against[config.design]
    rights.check(reads)
    kinds = rights.receives | rights.sends
    whole = load_view(transcripts_of(run, attack.observer), rights, reads | scorer_reads(kinds), carries_first)
    checkpoint = resolve_model(config.model)
    tokenizer = checkpoint.load_tokenizer()
    longest = int(getattr(checkpoint.config, "max_position_embeddings", None) or 1 << 30)
    if not attack.of_texts:
        view = whole.only(lambda _, message: begins_pass(message)).narrowed(reads)
        texts = public_corpus(config, tokenizer, (), wanted.corpus, lambda _: None)
        held_out = [text[:HELD_OUT_LENGTH] for text in texts[-wanted.limit :]]
        model = checkpoint.load_plain(torch.float32)
        return Case(attack, config, None, model, tokenizer, view, {}, {}, [], [], 0, wanted.seed, held_out, [])
    recorded = Recorded(whole, config, tokenizer, longest, read_asked(run))
    phase = _phase(attack, recorded, wanted.phase)
    if phase in {"tuning", "validation"} and DESIGNS[config.design].tunes_apart:
        return _nothing(recorded, phase)
    passes = recorded.passes(phase)
    say("loading the plain model")
    model = checkpoint.load_plain(torch.float32)
    told_by = "text" if enclave_layers(config) else "place" if EmbeddingTable(model).has_positions else "token"
    others = _other_texts(config, tokenizer, wanted.limit) if phase == "generation" else []
    candidates = distinct_rows(passes, wanted.moment)
    if phase in {"validation", "questions"}:  # in the order of a file, or of length
        candidates = drawn(candidates, wanted.seed)
    rows, known, known_rows = _chosen(candidates, attack, wanted.limit, told_by, alone=bool(others))
    targets: dict[int, list[int]] = {}
    for row in rows:
        targets.setdefault(row.number, []).append(row.row)
    view = whole.only(_of_phase(phase)).narrowed(reads).aimed(targets)
    beside = recorded.others(phase) if phase != "generation" and attack.leaky_knows_text else {}
    truth = (passes, beside, rows, known, known_rows)
    return Case(attack, config, phase, model, tokenizer, view, *truth, wanted.seed, [], others)


def _phase(attack: Attack, recorded: Recorded, phase: Phase | None) -> Phase:
    """The phase that is asked for, else the first of which something crossed.

    Raises:
        UserError: the attack is not for it, the run has none of it, or nothing was recorded.
    """
    config, fitting = recorded.config, in_order(attack.phases, ALL_PHASES)
    if phase is None:
        found = [each for each in recorded.crossed if each in attack.phases]
        if not found:
            raise UserError(
                f"no pass was recorded that {attack.name} could attack",
                hint=f"it is after {', '.join(fitting)}; record a run with some",
            )
        return found[0]
    if phase not in attack.phases:
        raise UserError(f"{attack.name} is not for {PHASES[phase]}", hint=f"it is for {', '.join(fitting)}")
    has = {"tuning": config.data.train, "validation": config.data.validation, "questions": config.evaluate.tasks}
    if not has.get(phase, recorded.generated):
        raise UserError(f"the run has no {PHASES[phase]}", hint=f"recorded are {', '.join(recorded.crossed) or 'none'}")
    return phase


def _nothing(recorded: Recorded, phase: Phase) -> Nothing:
    """That nothing of a phase crossed.

    Raises:
        UserError: passes were recorded that are of no other phase.
    """
    unexplained = recorded.num_unexplained()
    if unexplained:
        raise UserError(
            f"{unexplained} recorded passes are neither questions nor generations of this configuration",
            hint="attack a run of `veiltune tune` with its own data and tasks",
        )
    others = len(recorded.untrained) + len(recorded.generated)
    return Nothing(phase, len(recorded.trained), others, recorded.num_returned)


def _of_phase(phase: Phase) -> Callable[[int, Message], bool]:
    """Which messages belong to generations, or to all else."""

    def belongs(_: int, message: Message) -> bool:
        if phase == "generation":
            return is_cached(message) or not hasattr(message, "cache_id")
        return not is_cached(message)

    return belongs


def _other_texts(config: Config, tokenizer: Any, limit: int) -> list[list[int]]:
    if config.data.train is None:
        return []
    examples = load_tokenized(config.data.train, config, tokenizer, split="train")
    return [list(example.input_ids) for example in examples[:limit]]


def _chosen(
    rows: Sequence[TrueRow], attack: Attack, limit: int, told_by: str, *, alone: bool
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
    if len(known) < wanted or len(others) < (1 if alone else 2):
        raise UserError(
            f"the recorded texts hold {len(known)} distinct known tokens of {wanted}, and {len(others)} texts beside them",
            hint="lower anchors or pairs, or record more text",
        )
    ordered = sorted([*rows[:taken], *others], key=lambda row: (row.number, row.row))
    pairs = [(ordered.index(row), position, token) for row, position, token in known.values()]
    return ordered, pairs, taken
