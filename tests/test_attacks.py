"""Attacks on recorded runs of tiny models: what a view refuses, what each attack gets out of it, and its two controls.

The models are random, the texts random letters: an attack that finds them found them in the transcript.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import helpers
from commands import Ran, runner, write_config
from cutting import cut_config, deep_model
from helpers import make_config
from recording import Record, attacked, recorder, write_letters
from veiltune.attacks import ATTACKS, Auxiliary, EmbeddingTable, View, load_view, make_attack
from veiltune.attacks.passes import Agreement, begins_pass, joined, lengths_of, smashed_states
from veiltune.attacks.procrustes import recover_key
from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import DataError, ExactnessError, ProtocolError, UserError
from veiltune.evaluation import RESULT
from veiltune.evaluation.attacking import Attacked, rights_of, run_config, transcripts_of
from veiltune.evaluation.auxiliary import public_corpus
from veiltune.evaluation.truth import scorer_reads, true_passes
from veiltune.evaluation.unprotected import unprotected
from veiltune.models.bottom import Bottom
from veiltune.models.sources import resolve_model
from veiltune.results import read_result
from veiltune.transport.codec import encode
from veiltune.transport.messages import MESSAGES, TrainBatch
from veiltune.transport.transcript import Transcript

MASKING = ("obfuscatune", "veil")
WIDTH = 32
INT8 = {"wire": {"activation_bits": 8, "gradient_bits": 8}, "decorrelation": {"alpha": 1.0}}
INT4 = {"wire": {"activation_bits": 4, "gradient_bits": 4}, "decorrelation": {"alpha": 1.0}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "split": ("split", {}),
    "split-gpt2": ("split", {}),
    "online-int8": ("online", {"online": INT8}),
    "online-int4": ("online", {"online": INT4}),
    "gradfree": ("gradfree", {"gradfree": {"wire": {"activation_bits": 8}}}),
    "orthogonal": ("obfuscatune", {}),
    "gaussian": ("obfuscatune", {"obfuscatune": {"matrix": "gaussian"}}),
    "veil-0": ("veil", {"veil": {"enclave_layers": 0}}),
    "veil-0-gpt2": ("veil", {"veil": {"enclave_layers": 0, "dropout": "rotated"}}),
    "veil-1": ("veil", {"veil": {"enclave_layers": 1}}),
    "paper-gpt2": ("obfuscatune", {"obfuscatune": {"placement": "paper"}}),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Runs of `RUNS` by name."""

    def configure(name: str, output: Path, victim: str) -> Config:
        design, options = RUNS[name]
        family = "gpt2" if name.endswith("gpt2") else "llama"
        tables: dict[str, Any] = {"data": {"train": victim}, "train": {"steps": 4}, **options}
        tables["session"] = {"record": ["host" if design in MASKING else "provider"]}
        if design in MASKING:
            return make_config(design, family, output, **tables)
        return cut_config(design, output, deep_model(family), **tables)

    return recorder(tmp_path_factory.mktemp("attacked"), configure, texts=16, public=150)


def load(run: Path, observer: str, reads: frozenset[str] | None = None) -> View:
    """The scorer's view of a run."""
    rights = rights_of(run_config(run).design, observer)
    reads = scorer_reads(rights.receives | rights.sends) if reads is None else reads
    return load_view(transcripts_of(run, observer), rights, reads, begins_pass)


# --- the view ---------------------------------------------------------------------------------------------------------


def test_a_view_holds_both_directions_in_order(recorded: Record) -> None:
    reads = frozenset({"TrunkForward.ticket", "TrunkOutput.ticket", "SplitRequest.terms"})
    view = load(recorded("split"), "provider", reads)
    forward, output = view.messages("TrunkForward"), view.messages("TrunkOutput")
    assert [each["ticket"] for each in forward] == [each["ticket"] for each in output]
    assert {(each.sender, each.receiver) for each in forward} == {("owner", "provider")}
    assert {(each.sender, each.receiver) for each in output} == {("provider", "owner")}
    assert all(a.number < b.number for a, b in zip(forward, output, strict=True))


def test_a_field_that_was_not_declared_is_refused_by_name(recorded: Record) -> None:
    view = load(recorded("split"), "provider", frozenset({"TrunkForward.ticket"}))
    assert isinstance(view.messages("TrunkForward")[0]["ticket"], int)
    with pytest.raises(ProtocolError, match=r"TrunkForward\.hidden"):
        view.messages("TrunkForward")[0]["hidden"]
    with pytest.raises(ProtocolError, match="TrunkBackward"):
        view.messages("TrunkBackward")
    assert "hidden=" not in repr(view.messages("TrunkForward")[0])


@pytest.mark.parametrize("field", ["TrainBatch.input_ids", "SegmentForward.hidden"])
def test_what_the_observer_did_not_see_is_refused_by_name(field: str, recorded: Record) -> None:
    with pytest.raises(ProtocolError, match=field):
        load(recorded("split"), "provider", frozenset({field}))


def test_gradients_are_not_seen_under_gradfree_and_are_under_split(recorded: Record) -> None:
    reads = frozenset({"TrunkBackward.gradient"})
    assert load(recorded("split"), "provider", reads).messages("TrunkBackward")
    with pytest.raises(ProtocolError, match=r"TrunkBackward\.gradient.*gradfree"):
        load(recorded("gradfree"), "provider", reads)


def damaged(run: Path, directory: Path, damage: Callable[[bytes], bytes]) -> Path:
    """A copy of a run whose provider's transcript was tampered with."""
    copy = directory / "copy"
    shutil.copytree(run, copy)
    (path,) = transcripts_of(copy, "provider")
    path.write_bytes(damage(path.read_bytes()))
    return copy


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-40], "truncated"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], "changed after it was written"),
        (lambda data: data.replace(b'"version": 1', b'"version": 9', 1), "version 9"),
        (lambda data: data.replace(b'"observer": "provider"', b'"observer": "nobodyes"', 1), "nobodyes"),
        (lambda _: b"no transcript at all", "not a transcript"),
    ],
    ids=["trailer cut", "half", "edited", "version", "observer", "no transcript"],
)
def test_a_transcript_that_is_not_as_it_was_written_is_refused(
    damage: Callable[[bytes], bytes], said: str, recorded: Record, tmp_path: Path
) -> None:
    run = damaged(recorded("split"), tmp_path, damage)
    with pytest.raises(DataError, match=said):
        attacked(run, "vocabulary_matching")


def test_a_message_that_the_design_does_not_reveal_is_refused(tmp_path: Path) -> None:
    """A whole, well-formed transcript of the provider's that holds what a provider is never sent."""
    with Transcript(tmp_path / "provider.vtt", "provider") as transcript:
        ids = torch.zeros((1, 2), dtype=torch.int64)
        transcript.received("owner", "TrainBatch", encode(TrainBatch(ids, ids, ids, 1)))
    with pytest.raises(ProtocolError, match="TrainBatch from owner to provider"):
        load_view([tmp_path / "provider.vtt"], rights_of("split", "provider"), frozenset({"TrunkForward.hidden"}))


def test_knowledge_that_was_not_declared_or_not_given_is_refused() -> None:
    with pytest.raises(ProtocolError, match="corpus"):
        Auxiliary(corpus=[[1]]).take("corpus")
    with pytest.raises(UserError, match="corpus"):
        Auxiliary(granted=frozenset({"corpus"})).take("corpus")
    assert Auxiliary(granted=frozenset({"corpus"}), corpus=[[1]]).take("corpus") == [[1]]


@pytest.mark.parametrize("name", ATTACKS)
def test_what_an_attack_declares_exists_and_its_observer_sees_it(name: str) -> None:
    kind = ATTACKS[name]
    assert kind.name == name
    for design, reads in kind.against.items():
        for field in reads:
            message, _, leaf = field.partition(".")
            assert leaf in MESSAGES[message].__dataclass_fields__, field
        if design in DESIGNS:
            rights_of(design, kind.observer).check(reads)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [4, 4]),
        (torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), [2, 4]),
        (torch.tensor([[True, True, False, False], [True] * 4]), [2, 4]),
        (torch.tensor([[0.0, 0.0, -1e38, -1e38], [0.0] * 4])[:, None, None], [2, 4]),
        (torch.ones(4, 4, dtype=torch.bool).tril()[None, None], [4, 4]),
    ],
    ids=["none", "integers", "bool", "additive", "causal"],
)
def test_lengths_come_from_any_kind_of_mask(mask: Any, expected: list[int]) -> None:
    assert lengths_of(mask, 2, 4) == expected


# --- the truth and the control's view -------------------------------------------------------------------------------


def plain_and_passes(run: Path, observer: str) -> tuple[Any, View, Any]:
    config, view = run_config(run), load(run, observer)
    checkpoint = resolve_model(config.model)
    return checkpoint.load_plain(torch.float32), view, true_passes(view, config, checkpoint.load_tokenizer(), 1 << 30)


@pytest.mark.parametrize("name", ["split", "split-gpt2"])
def test_without_protection_the_control_view_is_what_was_recorded(name: str, recorded: Record) -> None:
    """At the first step of `split` nothing is tuned yet and nothing is rounded: the replayed truth gives the recorded states."""
    model, view, passes = plain_and_passes(recorded(name), "provider")
    bare = unprotected(view, model, passes, run_config(recorded(name)).cut)
    first = min(passes)
    mine, theirs = (smashed_states(each.aimed({first: range(4)})) for each in (bare, view))
    for one, other in zip(joined(mine), joined(theirs), strict=True):
        assert one.shape == other.shape
        assert helpers.relative_error(one, other) < 1e-5


def test_data_that_changed_since_the_run_is_refused(recorded: Record, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded("split"), run)
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["data"]["train"] = str(write_letters(tmp_path / "other.jsonl", 16, seed=5))
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="not those that this configuration makes"):
        attacked(run, "vocabulary_matching")


@torch.no_grad()
def test_the_public_bottom_continues_from_its_cache() -> None:
    from transformers import DynamicCache

    model = helpers.plain_model("llama")
    bottom, ids = Bottom(model, 1), torch.tensor([[5, 6, 7, 8]])
    whole, cache = bottom.states(ids), DynamicCache()
    parts = [bottom.states(ids[:, i : i + 1], position_ids=torch.tensor([[i]]), cache=cache) for i in range(4)]
    assert helpers.relative_error(torch.cat(parts, 1), whole) < 1e-5
    assert torch.equal(Bottom(model, 0).states(ids), model.get_input_embeddings()(ids))


# --- attacks on states at the cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["split", "split-gpt2", "online-int8", "gradfree"])
def test_vocabulary_matching_reads_every_token(name: str, recorded: Record) -> None:
    found = attacked(recorded(name), "vocabulary_matching")["token_recovery"]
    assert found.leaky_control >= 0.95
    assert found.value >= 0.95, "rounding to 8 bits, which the attacker repeats, protects nothing"
    assert found.shuffled_control < 0.2
    assert found.n == 4


def test_vocabulary_matching_of_tuned_layers_with_a_beam(recorded: Record) -> None:
    """The last texts came from a bottom that the attacker has only as it was before tuning."""
    found = attacked(recorded("online-int4"), "vocabulary_matching", at="last", limit=2, beam=2)["token_recovery"]
    assert found.leaky_control >= 0.95
    assert found.value >= 0.9
    assert "beam=2" in found.setting
    assert "at=last" in found.setting


def test_knowing_the_rounding_helps(recorded: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    aware = attacked(recorded("online-int4"), "vocabulary_matching", limit=2)["token_recovery"].value
    monkeypatch.setattr(Agreement, "rounded", lambda _self, states, **_: states)
    unaware = attacked(recorded("online-int4"), "vocabulary_matching", limit=2)["token_recovery"].value
    assert aware >= unaware
    assert aware >= 0.95


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("attack", "layers", "least"),
    [("ridge_inverter", 0, 0.6), ("learned_inverter", 0, 0.8), ("learned_inverter", 1, 0.8)],
)
def test_inverters_learn_from_public_text(attack: str, layers: int, least: float, recorded: Record) -> None:
    settings = (
        {"layers": layers, "width": 128, "epochs": 20, "learning_rate": 4e-3} if attack == "learned_inverter" else {}
    )
    found = attacked(recorded("online-int8"), attack, limit=4, **settings)
    assert found["token_recovery"].value >= least
    assert found["token_recovery"].shuffled_control < 0.2
    assert found["bag_f1"].leaky_control >= least


def test_an_inverter_that_learnt_nothing_is_withheld(recorded: Record) -> None:
    run = recorded("split")
    before = (run / RESULT).read_text(encoding="utf-8")
    with pytest.raises(ExactnessError, match="leaky control of ridge_inverter failed"):
        attacked(run, "ridge_inverter", vocabulary=1)
    assert (run / RESULT).read_text(encoding="utf-8") == before, "nothing of it is kept"


# --- attacks on masked states and weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["orthogonal", "paper-gpt2", "veil-0", "veil-0-gpt2"])
def test_a_rotation_keeps_what_gram_anchors_need(name: str, recorded: Record) -> None:
    found = attacked(recorded(name), "gram_anchors")["token_recovery"]
    assert found.value >= 0.95
    assert found.leaky_control >= 0.95
    assert found.shuffled_control < 0.2


def test_states_of_more_than_one_token_are_not_for_anchors(recorded: Record) -> None:
    with pytest.raises(UserError, match="enclave_layers = 1"):
        attacked(recorded("veil-1"), "gram_anchors")


def test_a_gaussian_key_keeps_it_only_roughly(recorded: Record) -> None:
    """R·Rᵀ is the identity in expectation, so inner products are off by about 1/√d of the norms: a part of the tokens goes."""
    found = attacked(recorded("gaussian"), "gram_anchors")["token_recovery"]
    assert found.leaky_control >= 0.95
    assert found.value < 0.6


@pytest.mark.parametrize("key", ["orthogonal", "gaussian"])
def test_known_plaintext_above_d_recovers_any_key(key: str, recorded: Record) -> None:
    found = attacked(recorded(key), "known_plaintext", pairs=WIDTH + 4)
    assert found["token_recovery"].value >= 0.95
    assert found["state_error"].value < 1e-2  # κ·eps for the Gaussian key, κ up to some thousand
    assert found["state_error"].shuffled_control > 0.5


def test_known_plaintext_below_d_recovers_a_share_of_each_state(recorded: Record) -> None:
    """Of a state of random direction the span of k known ones holds about k/d of the square; the rest stays unknown."""
    pairs = 8
    states = attacked(recorded("orthogonal"), "known_plaintext", pairs=pairs)["state_error"]
    assert 0.6 < states.value < 1.0
    assert abs(states.value - (1 - pairs / WIDTH) ** 0.5) < 0.2
    assert states.leaky_control > 0.5, "the states are as little known without a key: it is the pairs that are few"
    gaussian = attacked(recorded("gaussian"), "known_plaintext", pairs=pairs)["token_recovery"]
    assert gaussian.value < 0.75 < gaussian.leaky_control


def test_procrustes_is_exact_with_the_weights_themselves_and_worse_with_distance(recorded: Record) -> None:
    found = {d: attacked(recorded("orthogonal"), "procrustes", distance=d) for d in (0.0, 0.01, 0.1, 0.5)}
    errors = {d: each["weight_error"].value for d, each in found.items()}
    assert errors[0.0] < 1e-4
    assert errors[0.0] < errors[0.01] < errors[0.1] < errors[0.5]
    assert all(errors[d] < d for d in (0.01, 0.1, 0.5)), "the thief ends nearer than the ancestor was"
    assert found[0.01]["token_recovery"].value >= 0.95
    assert all(each["weight_cosine"].leaky_control > 0.999 for each in found.values())
    assert all(each["weight_error"].shuffled_control > 1 for each in found.values())


def test_procrustes_solves_for_keys_of_both_kinds() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((12, 40), generator=generator, dtype=torch.float64)
    gaussian = torch.randn((12, 12), generator=generator, dtype=torch.float64)
    for key in (torch.linalg.qr(gaussian).Q, gaussian):
        assert helpers.relative_error(recover_key(weight, torch.linalg.inv(key) @ weight), key) < 1e-8


# --- settings, corpora, the verb -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("vocabulary_match", {}, "vocabulary_matching"),
        ("gram_anchors", {"anchor": 3}, "anchors"),
        ("gram_anchors", {"anchors": 0}, "at least 1"),
        ("gram_anchors", {"anchors": "many"}, "no int"),
        ("gram_anchors", {"anchors": True}, "no int"),
        ("procrustes", {"distance": -0.1}, "at least 0"),
    ],
)
def test_bad_names_and_settings_are_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make_attack(name, settings)
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_an_attack_that_does_not_apply_is_refused_with_those_that_do(recorded: Record) -> None:
    with pytest.raises(UserError, match="no attack on split") as caught:
        attacked(recorded("split"), "gram_anchors")
    assert "vocabulary_matching" in str(caught.value.hint)


def test_too_few_known_tokens_are_refused(recorded: Record) -> None:
    with pytest.raises(UserError, match="of 500"):
        attacked(recorded("orthogonal"), "known_plaintext", pairs=500)


def test_the_corpus_is_disjoint_from_the_victims_text(recorded: Record, tmp_path: Path) -> None:
    run = recorded("split")
    config, tokenizer = run_config(run), resolve_model(run_config(run).model).load_tokenizer()
    victims = [json.loads(line)["text"] for line in Path(str(config.data.train)).read_text("utf-8").splitlines()]
    mixed = tmp_path / "mixed.jsonl"
    public = (run.parent / "public.jsonl").read_text("utf-8").splitlines()[:5]
    quoting = json.dumps({"text": f"He said: {victims[0]}"})
    mixed.write_text("\n".join([*public, quoting]) + "\n", encoding="utf-8")
    truths = [tokenizer(text)["input_ids"] for text in victims]
    said: list[str] = []
    kept = public_corpus(config, tokenizer, truths, str(mixed), said.append)
    assert len(kept) == 5
    assert "1 left out" in said[0]
    with pytest.raises(DataError, match="own data"):
        public_corpus(config, tokenizer, truths, config.data.train, said.append)


def test_results_are_kept_beside_earlier_ones(recorded: Record) -> None:
    run = recorded("orthogonal")
    attacked(run, "gram_anchors")
    attacked(run, "gram_anchors", anchors=6)
    privacy = read_result(run / RESULT).privacy
    assert {"gram_anchors", "gram_anchors[anchors=6]"} <= set(privacy)
    for metrics in privacy.values():
        for figures in metrics.values():
            assert {"value", "ci95", "leaky_control", "shuffled_control", "n"} <= set(figures)
            assert figures["leaky_control"] is not None
            assert figures["shuffled_control"] is not None


@pytest.fixture
def veiltune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return runner(capsys)


def test_the_verb_prints_a_table_or_one_object(veiltune: Any, recorded: Record) -> None:
    run = str(recorded("orthogonal"))
    shown = veiltune("attack", run, "--attack", "gram_anchors", "--limit", "3")
    assert (shown.code, shown.out) == (0, "")
    assert "token_recovery" in shown.err
    assert "leaky" in shown.err
    rows = veiltune("attack", run, "--attack", "gram_anchors", "--limit", "3", "--json").json["rows"]
    assert {"attack", "observer", "design", "setting", "metric", "value", "ci95", "leaky_control"} <= set(rows[0])
    (recovery,) = (row for row in rows if row["metric"] == "token_recovery")
    assert recovery["n"] == 3


def test_the_verb_refuses_what_is_missing(veiltune: Any, recorded: Record, tmp_path: Path) -> None:
    unknown = veiltune("attack", str(recorded("split")), "--attack", "vocabulary")
    assert unknown.code == 2
    assert "vocabulary_matching" in unknown.err
    nowhere = veiltune("attack", str(tmp_path), "--attack", "gram_anchors")
    assert nowhere.code == 2
    assert "no run" in nowhere.err
    config = write_config(tmp_path, train__steps=1)
    assert veiltune("tune", str(config)).code == 0
    unrecorded = veiltune("attack", str(tmp_path / "out"), "--attack", "gram_anchors")
    assert unrecorded.code == 2
    assert 'session.record=["host"]' in unrecorded.err


@torch.no_grad()
def test_a_table_of_first_states() -> None:
    table = EmbeddingTable(helpers.plain_model("gpt2"))
    tokens, positions = torch.tensor([3, 3]), torch.tensor([0, 1])
    raw, centred = (table.states(tokens, positions, form) for form in ("raw", "centred"))
    assert not torch.equal(raw[0], raw[1]), "learned positions tell equal tokens apart"
    assert float(centred.mean(-1).abs().max()) < 1e-7
    assert isinstance(Attacked((), ()), Attacked)
