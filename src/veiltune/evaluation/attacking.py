"""Attack a recorded run: gather what the attacker may have, let it work on its view, score it against the truth, with controls.

The attack gets a `View` and an `Auxiliary`; truth, tokenizer and scores stay here. What it may be published with is decided by
`veiltune.attacks.controls`. Where the design has nothing of a phase cross, the transcript is read to say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veiltune.attacks import Attack, Auxiliary, EmbeddingTable, Reconstruction
from veiltune.attacks.controls import Finding
from veiltune.evaluation.auxiliary import ancestor_of, public_corpus
from veiltune.evaluation.case import (
    Case,
    Nothing,
    Say,
    Wanted,
    load_case,
    require_fit,
    rights_of,
    run_config,
    transcripts_of,
)
from veiltune.evaluation.hosted import ancestor_model, enclave_layers, texts_of
from veiltune.evaluation.record import RESULT
from veiltune.evaluation.scoring import Sample, findings_of, in_best_order, samples_of
from veiltune.evaluation.truth import Moment
from veiltune.evaluation.unprotected import unprotected
from veiltune.results import read_result, write_result
from veiltune.study_terms import Phase

__all__ = ["Attacked", "Sample", "attack_run", "require_fit", "rights_of", "run_config", "transcripts_of"]


@dataclass(frozen=True)
class Attacked:
    """What one attack on one run came to.

    Attributes:
        findings: by metric; none where nothing crossed.
        samples: texts with what was made of them.
        phase: whose texts were attacked; ``None``: it is no attack on texts.
        nothing: that nothing of the phase crossed, as the transcript says.
    """

    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...] = field(repr=False)
    phase: Phase | None = None
    nothing: Nothing | None = None


def attack_run(
    run: Path,
    attack: Attack,
    *,
    phase: Phase | None = None,
    moment: Moment = "first",
    limit: int = 8,
    seed: int = 0,
    corpus: str | None = None,
    say: Say = lambda _: None,
) -> Attacked:
    """Attack a run's transcript and keep what came of it in the run's ``result.json``, if it has one.

    Args:
        run: output directory of a run with ``session.record`` of the attack's observer.
        attack: with its settings.
        phase: whose texts are attacked; ``None``: of the first phase of which something crossed.
        moment: attack the first texts that crossed, or the last: where the owner's layers were tuned, the last ones' states come
            from tuned layers.
        limit: sequences to reconstruct.
        seed: of everything drawn at random.
        corpus: public text for learned attacks, any data source (default: see `veiltune.evaluation.auxiliary`).
        say: told what is being done.

    Raises:
        UserError: no run, no transcript, an attack that does not fit the design or the phase, too little text.
        DataError: a transcript that is damaged, edited, or another observer's.
        ProtocolError: the attack reads what its observer does not see.
        ExactnessError: a control failed; nothing is kept.
    """
    config = run_config(run)
    require_fit(attack, config)
    if (run / RESULT).is_file():
        read_result(run / RESULT)  # what came of it is to be kept there: better refused now than then
    case = load_case(run, config, attack, Wanted(phase, moment, limit, seed, corpus), say)
    if isinstance(case, Nothing):
        say(f"nothing of {case.phase} crossed: 0 passes of it, {case.num_others} of other texts")
        _keep(run, f"nothing_crossed[{case.phase}]", _as_figures(case, attack.observer))
        return Attacked((), (), case.phase, case)
    found, leaky = (in_best_order(each, case.truths) for each in _attempts(case, corpus, say))
    said = [attack.setting, "" if moment == "first" else "at=last"]
    setting = "; ".join(part for part in said if part)
    findings = tuple(findings_of(case, found, leaky, setting))
    phases = "" if case.phase in {None, "tuning"} else f"phase={case.phase}"
    key = "; ".join(part for part in (setting, phases) if part)
    _keep(run, f"{attack.name}[{key}]" if key else attack.name, _by_metric(findings))
    return Attacked(findings, samples_of(case, found), case.phase)


def _attempts(case: Case, corpus: str | None, say: Say) -> tuple[Reconstruction, Reconstruction]:
    """What the attack makes of the view, and of the same without protection; both draw alike."""
    attack = case.attack
    auxiliary = _auxiliary(case, attack, corpus, say)
    what = f"attacking {len(case.rows) - case.known_rows} sequences: " if attack.of_texts else ""
    say(f"{what}{attack.summary}")
    found = attack.run(case.view, auxiliary, torch.Generator().manual_seed(case.seed))
    say("the same without protection (leaky control)")
    layers = enclave_layers(case.config) if attack.leaky_layers is None else attack.leaky_layers
    view = case.view
    if case.phase == "generation":  # a generation's first message stands for the whole of it
        view = view.only(lambda number, message: number in case.passes or not hasattr(message, "cache_id"))
    bare = unprotected(view, case.model, case.passes, case.config.cut, layers, beside=case.beside)
    if attack.leaky_settings:
        auxiliary = _auxiliary(case, dataclasses.replace(attack, **attack.leaky_settings), corpus, say)
    if attack.leaky_knows_text:
        auxiliary = dataclasses.replace(auxiliary, corpus=texts_of({**case.beside, **case.passes}))
    return found, attack.leaky(bare, auxiliary, torch.Generator().manual_seed(case.seed))


def _auxiliary(case: Case, attack: Attack, corpus: str | None, say: Say) -> Auxiliary:
    """What the attacker has: only what it takes of this run is made, and granted."""
    takes = attack.takes(case.config.design, enclave_layers(case.config))
    given: dict[str, Any] = {}
    if "base_weights" in takes:
        given["base_weights"] = case.model
    if "embedding_table" in takes:
        given["embedding_table"] = EmbeddingTable(case.model)
    if "known_pairs" in takes:
        given["known_pairs"] = case.known
    if "public_ancestor" in takes:
        given["public_ancestor"] = ancestor_of(case.model, getattr(attack, "distance", 0.0), case.seed)
        if "ancestor_model" in takes:
            given["ancestor_model"] = ancestor_model(case.model, given["public_ancestor"])
    if "corpus" in takes:
        given["corpus"] = public_corpus(case.config, case.tokenizer, [*case.truths, *case.held_out], corpus, say)
    return Auxiliary(granted=takes, **given)


def _by_metric(findings: Sequence[Finding]) -> Mapping[str, Any]:
    fields = ("value", "n", "ci95", "leaky_control", "shuffled_control", "observer", "knows", "phase")
    return {each.metric: {name: getattr(each, name) for name in fields} for each in findings}


def _as_figures(nothing: Nothing, observer: str) -> Mapping[str, Any]:
    """As a figure of the record: a count, which has neither interval nor controls."""
    counted = {"value": float(nothing.num_passes), "n": nothing.num_others, "ci95": None, "observer": observer}
    return {"passes": {**counted, "phase": nothing.phase, "returned": nothing.num_returned}}


def _keep(run: Path, key: str, figures: Mapping[str, Any]) -> None:
    """Into the record, under the attack's name and, where they are not the defaults, its settings; a mere generation has none."""
    if not (run / RESULT).is_file():
        return
    result = read_result(run / RESULT)
    write_result(run / RESULT, result.model_copy(update={"privacy": {**result.privacy, key: figures}}))
