"""Attacks of the provider at the cut: labels from gradients, inversion by optimisation, bottoms that the attacker does not have.

Tiny random models and texts of random letters, in which nothing follows from anything else.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
from cutting import cut_config, deep_model, plain
from recording import Record, attacked, recorder
from veiltune.attacks import Auxiliary, make_attack, remembered
from veiltune.attacks.activation import by_linear_map, matched
from veiltune.attacks.adapting import Channel, fit_correction
from veiltune.attacks.bisr import _guess
from veiltune.attacks.cut_gradients import _least_squares
from veiltune.attacks.fluency import Fluency, written
from veiltune.attacks.inverter import LearnedInverter
from veiltune.attacks.matching import match_states
from veiltune.attacks.passes import Agreement
from veiltune.attacks.remembered import MOST, learnt
from veiltune.attacks.scores import score_labels
from veiltune.attacks.shadow import Shadows, Tuning
from veiltune.attacks.shortlist import Shortlist
from veiltune.config import Config
from veiltune.errors import UserError
from veiltune.models.bottom import Bottom
from veiltune.models.families import find_family
from veiltune.models.skeleton import blocks_of
from veiltune.models.top import Top
from veiltune.privacy.quantisation import WireOptions

INT8 = {"wire": {"activation_bits": 8, "gradient_bits": 8}, "decorrelation": {"alpha": 1.0}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "split": ("split", {}),
    "split-gpt2": ("split", {}),
    "split-bare": ("split", {"cut": {"bottom_layers": 1, "top_layers": 0}}),
    "online-int8": ("online", {"online": INT8}),
    "gradfree": ("gradfree", {"gradfree": {"wire": {"activation_bits": 8}}}),
}
PLAIN = Agreement(1, WireOptions(), 1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Runs of `RUNS` by name."""

    def configure(name: str, output: Path, victim: str) -> Config:
        design, options = RUNS[name]
        model = deep_model("gpt2" if name.endswith("gpt2") else "llama")
        tables = {"data": {"train": victim}, "train": {"steps": 3}, "session": {"record": ["provider"]}}
        return cut_config(design, output, model, **tables, **options)

    return recorder(tmp_path_factory.mktemp("cut"), configure, texts=12, public=150)


@pytest.fixture(scope="module")
def model() -> Any:
    return plain(deep_model("llama"))


def texts(count: int, length: int = 16, seed: int = 0) -> list[Tensor]:
    """Random tokens."""
    return list(torch.randint(5, 250, (count, length), generator=torch.Generator().manual_seed(seed)))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recovery(found: list[list[int]], truth: list[Tensor]) -> float:
    pairs = zip(found, truth, strict=True)
    return sum(float((torch.tensor(a) == b).float().mean()) for a, b in pairs) / len(truth)


# --- labels from gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("layers", [0, 2])
@torch.no_grad()
def test_the_top_and_the_trunk_below_it_make_the_model(family: str, layers: int) -> None:
    whole = plain(deep_model(family))
    blocks = blocks_of(whole, find_family(whole.config))
    kept: list[Any] = []
    blocks[len(blocks) - layers - 1].register_forward_hook(lambda _module, _args, output: kept.append(output))
    ids = torch.stack(texts(2, 8))
    logits = whole(input_ids=ids).logits
    top = Top(whole, layers)
    states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    assert torch.equal(top.head(top.head_inputs(states)), logits)


def test_least_squares_agree_with_a_solver() -> None:
    """Each row of the batch is a system of its own; 12 unknowns take 12 steps but for rounding."""
    systems = torch.randn(2, 20, 12, generator=rng(), dtype=torch.float64)
    wanted = torch.randn(2, 20, 1, generator=rng(1), dtype=torch.float64)
    found = _least_squares(lambda x: systems @ x, lambda r: systems.mT @ r, wanted, 40)
    assert helpers.relative_error(found, torch.linalg.lstsq(systems, wanted).solution) < 1e-4


@pytest.mark.parametrize("name", ["split", "split-gpt2", "split-bare"])
def test_gradients_tell_the_labels(name: str, recorded: Record) -> None:
    found = attacked(recorded(name), "gradient_labels")
    assert found["label_recovery"].leaky_control >= 0.95
    assert found["label_recovery"].value >= 0.9
    assert found["label_precision"].value >= 0.9
    assert found["label_recovery"].shuffled_control < 0.2


def test_rounded_gradients_of_tuned_layers_tell_labels_too(recorded: Record) -> None:
    found = attacked(recorded("online-int8"), "gradient_labels", at="last")["label_recovery"]
    assert found.leaky_control >= 0.95
    assert found.value >= 0.5


def test_the_published_form_reads_them_as_well(recorded: Record) -> None:
    found = attacked(recorded("split-bare"), "gradient_labels", limit=2, method="tag", iterations=250)
    assert found["label_recovery"].leaky_control >= 0.95
    assert found["label_recovery"].value >= 0.9


def test_where_no_gradient_crosses_there_is_nothing_to_match(recorded: Record) -> None:
    for name in ("gradient_labels", "bisr"):
        with pytest.raises(UserError, match=f"{name} is no attack on gradfree"):
            attacked(recorded("gradfree"), name)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="solve, tag"):
        make_attack("gradient_labels", {"method": "guess"})


def test_labels_count_where_they_stand() -> None:
    def decode(tokens: Any) -> str:
        return " ".join(f"w{token}" for token in tokens)

    truth = [[7, -100, 3, 4], [-100, -100, -100, 5]]
    right, none = score_labels(truth, truth, decode), score_labels(truth, [[-100] * 4] * 2, decode)
    assert right["label_recovery"] == right["label_precision"] == [1.0, 1.0]
    assert none["label_recovery"] == none["label_precision"] == [0.0, 0.0]
    moved = score_labels(truth, [[-100, 3, 4, -100], [-100, -100, 5, -100]], decode)
    assert moved["label_recovery"] == [0.0, 0.0]
    assert moved["label_rougeL"] == [1.0, 1.0], "the first token bears no loss, and does not count"


# --- a bottom that the attacker does not have ----------------------------------------------------------------------------


class Squeezed(Agreement):
    """A bottleneck of half the width, known to all."""

    def projected(self, states: Tensor) -> Tensor:
        basis = torch.linalg.qr(torch.randn(states.shape[-1], states.shape[-1], generator=rng(7))).Q
        return states @ basis[:, : states.shape[-1] // 2]


def crossing(model: Any, truth: list[Tensor], agreed: Agreement, *, moved: float, noise: float) -> list[Tensor]:
    """What crosses of texts through a bottom that was moved by a linear map, with noise, both relative to the states."""
    ids = torch.stack(truth)
    with torch.no_grad():
        z = agreed.projected(Bottom(model, agreed.bottom_layers).states(ids))
    k, size = z.shape[-1], float(z.square().mean().sqrt())
    map_ = torch.randn(k, k, generator=rng(3)) / k**0.5
    moved_states = z + moved * z @ map_ + noise * size * torch.randn(z.shape, generator=rng(4))
    return list(moved_states)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("agreed", "moved"), [(PLAIN, 1.5), (Squeezed(1, WireOptions(), 1), 0.6)], ids=["whole", "squeezed"]
)
def test_guessing_and_correcting_finds_what_the_public_bottom_does_not(
    agreed: Agreement, moved: float, model: Any
) -> None:
    truth = texts(12)
    sequences = crossing(model, truth, agreed, moved=moved, noise=0.0)

    def found(seen: list[Tensor], rounds: int) -> float:
        return recovery(match_states(Bottom(model, 1), agreed, seen, rng(), shortlist=64, rounds=rounds), truth)

    once, adapted = found(sequences, 0), found(sequences, 2)
    assert once < 0.9
    assert adapted > once + 0.05
    assert found([*sequences[1:], sequences[0]], 0) < 0.2


def test_a_correction_is_the_map_and_the_noise() -> None:
    x = torch.randn(2000, 6, generator=rng())
    true_map, noise = torch.randn(6, 6, generator=rng(1)) / 4, torch.tensor([0.01, 0.3, 0.01, 0.01, 0.01, 0.01])
    z = x + x @ true_map + 2.0 + noise * torch.randn(2000, 6, generator=rng(2))
    z[:100] = torch.randn(100, 6, generator=rng(3))  # wrong guesses
    found = fit_correction(x, z, torch.zeros(6))
    assert helpers.relative_error(found.linear, true_map) < 0.1
    assert helpers.relative_error(found.offset - found.centre @ found.linear, torch.full((6,), 2.0)) < 0.1
    spreads = found.covariance.diagonal().sqrt()
    assert spreads.argmax() == 1
    moved = found.apply(x[None, :5], starts=True)[0]
    assert torch.equal(moved[0], x[0]), "the first position has an offset of its own, here none"
    assert not torch.equal(moved[1], x[1])


def test_optimised_inputs_find_texts_and_shuffled_states_do_not(model: Any) -> None:
    truth = texts(6, 12)
    sequences = crossing(model, truth, PLAIN, moved=0.0, noise=0.05)
    channel = Channel(Bottom(model, 1), PLAIN)
    guesses = by_linear_map(channel, sequences, 32, rng())
    first = recovery([guess.tokens[:, 0].tolist() for guess in guesses], truth)
    found = recovery(matched(channel, sequences, guesses, 60), truth)
    assert found >= max(0.9, first)
    crossed = matched(channel, [*sequences[1:], sequences[0]], guesses, 60)
    assert recovery(crossed, truth) < found - 0.2


def test_the_shortlist_knows_the_noise(model: Any) -> None:
    """Noise that fills a few directions is left out of the map once its covariance was estimated."""
    channel = Channel(Bottom(model, 1), PLAIN)
    truth = texts(40)
    sequences = crossing(model, truth, PLAIN, moved=0.0, noise=0.05)
    loud = 3 * torch.linalg.qr(torch.randn(32, 4, generator=rng(5))).Q.T
    for index, each in enumerate(sequences):
        sequences[index] = each + each.square().mean().sqrt() * torch.randn(len(each), 4, generator=rng(index)) @ loud
    seen, wanted = torch.cat([each[1:] for each in sequences]), torch.cat([each[1:] for each in truth])

    def first(linear: Shortlist) -> float:
        return float((linear.tokens(seen, 1, 1)[:, 0] == wanted).float().mean())

    unaware = first(Shortlist(channel, rng()))
    channel.adapt(sequences, [each.tolist() for each in truth])
    assert first(Shortlist(channel, rng())) > unaware + 0.2


def test_the_model_writes_what_it_finds_likely(model: Any) -> None:
    """Likelier to it than random tokens are, and the same for whoever asks again."""
    mine = written(model, 24, 12)
    assert mine.shape == (24, 12)
    assert torch.equal(mine, written(model, 24, 12))
    random = torch.randint(int(mine.max()) + 1, mine.shape, generator=rng(1))

    def surprise(ids: Tensor) -> float:
        logits = model(input_ids=ids).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    with torch.no_grad():
        assert surprise(mine) < surprise(random)


@torch.no_grad()
def test_the_prior_is_the_models_own(model: Any) -> None:
    ids = torch.stack(texts(2, 5))
    fluency = Fluency(model, 2)
    for position in range(5):
        fluency.extend(torch.arange(2), ids[:, position])
    whole = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    assert fluency.next is not None
    assert helpers.relative_error(fluency.next, whole) < 1e-4
    fluency.extend(torch.tensor([1, 1]), ids[:, 0])
    assert torch.equal(fluency.next[0], fluency.next[1]) == bool(ids[0, 0] == ids[1, 0])


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        ("vocabulary_matching", {"rounds": 1, "prior": 0.2, "beam": 2}),
        ("activation_inversion", {"shortlist": 48, "steps": 60}),
        ("learned_inverter", {"width": 128, "epochs": 5, "shadow_steps": 4}),
        ("bisr", {"width": 64, "epochs": 3, "shortlist": 32}),
    ],
)
def test_each_reads_rounded_states_of_tuned_layers(attack: str, settings: dict[str, Any], recorded: Record) -> None:
    found = attacked(recorded("online-int8"), attack, at="last", **settings)
    assert found["token_recovery"].leaky_control >= 0.9
    assert found["token_recovery"].value >= 0.75
    assert found["token_recovery"].shuffled_control < 0.2
    assert ("label_recovery" in found) == (attack == "bisr")


@pytest.mark.parametrize(("name", "lessons"), [("split", 1), ("online-int8", 2)])
def test_an_inverter_is_trained_once_a_wire(
    name: str, lessons: int, recorded: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run and its control share one where what was agreed on is the same, and bisr has the same again."""
    trained: list[str] = []
    train = LearnedInverter._train

    def counted(self: Any, decoder: Any, teacher: Any) -> None:
        trained.append(self.name)
        train(self, decoder, teacher)

    monkeypatch.setattr(LearnedInverter, "_train", counted)
    monkeypatch.setattr(remembered, "_kept", OrderedDict())
    settings = {"width": 68, "epochs": 3}
    found = attacked(recorded(name), "learned_inverter", **settings)
    again = attacked(recorded(name), "learned_inverter", **settings)
    assert trained == ["learned_inverter"] * lessons
    assert {key: each.value for key, each in found.items()} == {key: each.value for key, each in again.items()}
    attacked(recorded(name), "bisr", steps=2, shortlist=16, **settings)
    assert len(trained) == lessons


# --- parts ---------------------------------------------------------------------------------------------------------------


def test_shadow_bottoms_move_away_from_the_public_one(model: Any) -> None:
    corpus = [each.tolist() for each in texts(20)]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    ids = torch.stack(texts(2, 8, seed=5))
    alone = Shadows(model, PLAIN, Tuning(0, 1.0, 4, 0.05), corpus, rng())
    shadows = Shadows(model, PLAIN, Tuning(8, 1.0, 4, 0.05), corpus, rng())
    public = Bottom(model, 1).states(ids).detach()
    assert alone.count == 1
    assert torch.equal(alone.states(ids, 0), public)
    moves = [helpers.relative_error(shadows.states(ids, which), public) for which in range(shadows.count)]
    assert len(moves) == 5
    assert moves[0] < 1e-6 < moves[1]
    assert moves[-1] > moves[1]
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_what_was_learnt_once_is_not_learnt_again(model: Any) -> None:
    """Same model, text, draws and settings: one lesson, and the generator goes on as after the first."""
    corpus = [each.tolist() for each in texts(3)]
    made: list[float] = []

    def make(generator: torch.Generator) -> Any:
        made.append(float(torch.rand(1, generator=generator)))
        return made[-1]

    def asked(name: str = "a", seed: int = 3, corpus: Any = corpus) -> tuple[float, float]:
        generator = rng(seed)
        found = learnt([name], model, corpus, generator, lambda: make(generator))
        return found, float(torch.rand(1, generator=generator))

    first = asked()
    assert asked() == first
    assert len(made) == 1
    asked(name="b")
    asked(seed=4)
    asked(corpus=corpus[:2])
    assert len(made) == 4
    changed = model.get_input_embeddings().weight
    with torch.no_grad():
        was = changed[0, 0].clone()
        changed[0, 0] += 1
    asked()
    with torch.no_grad():
        changed[0, 0] = was
    assert len(made) == 5, "another model"
    for number in range(MOST):
        asked(f"new {number}")
    assert len(made) == 5 + MOST
    assert asked() == first
    assert len(made) == 6 + MOST, "what was not asked for longest is gone"


def test_lessons_draw_the_wires_noise_and_candidates_do_not() -> None:
    states = torch.randn(2, 4, 16, generator=rng())
    wire = WireOptions(activation_bits=4, stochastic=True)
    random, fixed = Agreement(1, wire), Agreement(1, wire.model_copy(update={"stochastic": False}))
    assert not torch.equal(random.sent(states, rng(1)), random.sent(states, rng(2)))
    assert torch.equal(random.rounded(states, starts=True), states)
    assert torch.equal(fixed.sent(states), fixed.rounded(states, starts=True))
    assert not torch.equal(fixed.rounded(states, starts=True), states)


def test_a_label_begins_above_the_inverters_best() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 3)
    guess = _guess(scores, [-100, 1, 3], 2)
    assert guess.tokens.gather(1, guess.logits.argmax(1, keepdim=True))[:, 0].tolist() == [0, 1, 3]
    assert all(len(set(row)) == 2 for row in guess.tokens.tolist())


def test_knowledge_that_is_not_given_is_asked_for(model: Any) -> None:
    attack = make_attack("activation_inversion")
    with pytest.raises(UserError, match="base_weights"):
        Auxiliary(granted=attack.auxiliary).take("base_weights")
    assert dataclasses.is_dataclass(attack)
    assert model is not None
