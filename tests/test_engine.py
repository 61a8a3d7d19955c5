"""The training engine on a small model in the clear, each request against the same thing computed the long way."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from veiltune.checkpoints import StateStore
from veiltune.config import TrainConfig
from veiltune.engine import Engine, ParameterBackend, target_logits, target_states
from veiltune.errors import ProtocolError
from veiltune.models.presets import random_config
from veiltune.models.trunk import make_optimizer
from veiltune.transport.messages import (
    MESSAGES,
    Acknowledged,
    AdapterRequest,
    AdapterTensors,
    BatchLoss,
    CostReport,
    CostRequest,
    EvalBatch,
    GeneratedToken,
    GenerateRequest,
    GradientsRequest,
    LoadState,
    Logits,
    LogitsRequest,
    Message,
    OptimizerStep,
    SaveState,
    ScoreBatch,
    Scores,
    StepDone,
    TrainBatch,
)
from veiltune.tuner import Tuner

IGNORED = -100
VOCABULARY = 259
CPU = torch.device("cpu")
EPS = torch.finfo(torch.float64).eps

models = pytest.mark.parametrize("family", ["gpt2", "llama"])


class Counting(ParameterBackend):
    """Counts what the engine says about passes."""

    passes = generations = 0

    def end_of_pass(self) -> None:
        self.passes += 1

    def end_of_generation(self) -> None:
        self.generations += 1


@dataclasses.dataclass
class Rig:
    """An engine, what it stands on, and what it emitted."""

    engine: Engine
    model: Any
    backend: Counting
    emitted: list[Message]

    def ask(self, request: Message) -> Any:
        return self.engine.handle(request)


def rig(family: str, directory: Path, *, dtype: torch.dtype = torch.float64, **train: Any) -> Rig:
    """A tiny model whose every parameter is trained, as if it were an adapter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = random_config(f"random:{family}:2,32,4,{VOCABULARY}")
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    for value in model.parameters():  # else the logits are nearly equal, and little would show
        value.data.mul_(3)
    parameters = dict(model.named_parameters())
    settings_ = TrainConfig.model_validate({"optimizer": "sgd", "learning_rate": 0.1, **train})
    backend = Counting(parameters, make_optimizer(parameters, settings_), StateStore(directory, "f"))
    emitted: list[Message] = []
    return Rig(Engine(model, backend, CPU, emitted.append), model, backend, emitted)


def batch(lengths: list[int], *, unlabelled: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded random tokens; the first few of each row bear no loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :unlabelled] = IGNORED
    return ids.masked_fill(mask == 0, 256), mask, labels


def full_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def summed_loss(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    logits = full_logits(model, ids, mask)
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest entry of all."""
    assert actual.keys() == expected.keys()
    largest = max(float(value.detach().abs().max()) for value in expected.values())
    return max(float((actual[name] - value).detach().abs().max()) for name, value in expected.items()) / largest


# --- logits and loss --------------------------------------------------------------------------------------------------


@models
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), unlabelled=st.integers(0, 3), seed=st.integers(0, 9)
)
def test_target_logits_are_the_full_logits_where_there_is_a_label(
    family: str, lengths: list[int], unlabelled: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = rig(family, tmp_path_factory.getbasetemp()).model.eval()
    ids, mask, labels = batch(lengths, unlabelled=unlabelled, seed=seed)
    with torch.no_grad():
        states, targets, rows = target_states(model, ids, mask, labels)
        logits = target_logits(model, states)
        full = full_logits(model, ids, mask)
    places = [
        (row, place)
        for row in range(len(lengths))
        for place in range(1, labels.shape[1])
        if labels[row, place] != IGNORED
    ]
    assert rows.tolist() == [row for row, _ in places]
    assert targets.tolist() == [int(labels[row, place]) for row, place in places]
    assert logits.shape == (len(places), VOCABULARY)
    if places:
        expected = torch.stack([full[row, place - 1] for row, place in places])
        assert float((logits - expected).abs().max()) <= 64 * EPS * float(expected.abs().max())


def test_losses_are_taken_in_float32_or_better(tmp_path: Path) -> None:
    ids, mask, labels = batch([5])
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        model = rig("llama", tmp_path, dtype=dtype).model.eval()
        states, _, _ = target_states(model, ids, mask, labels)
        assert states.dtype == dtype
        assert target_logits(model, states).dtype == wide


@models
def test_evaluation_gives_the_summed_loss_and_leaves_no_gradient(family: str, tmp_path: Path) -> None:
    made = rig(family, tmp_path)
    ids, mask, labels = batch([7, 4, 5])
    answer = made.ask(EvalBatch(ids, mask, labels))
    assert isinstance(answer, BatchLoss)
    assert answer.loss_sum == pytest.approx(float(summed_loss(made.model, ids, mask, labels).detach()), rel=1e-12)
    assert answer.num_tokens == int((labels[:, 1:] != IGNORED).sum()) == 10
    assert all(value.grad is None for value in made.model.parameters())
    assert made.backend.passes == 1


@models
def test_logits_of_every_position_are_the_models(family: str, tmp_path: Path) -> None:
    made = rig(family, tmp_path)
    ids, mask, _ = batch([6, 6])
    answer = made.ask(LogitsRequest(ids, mask))
    assert isinstance(answer, Logits)
    assert torch.equal(answer.logits, full_logits(made.model, ids, mask).detach())
    assert not answer.logits.requires_grad


def test_dropout_acts_in_training_alone(tmp_path: Path) -> None:
    made = rig("gpt2", tmp_path)
    for module in made.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    ids, mask, labels = batch([7, 7])
    plain = made.ask(EvalBatch(ids, mask, labels)).loss_sum
    trained = [made.ask(TrainBatch(ids, mask, labels, 1)).loss_sum for _ in range(2)]
    assert trained[0] != trained[1] != plain
    assert made.ask(EvalBatch(ids, mask, labels)).loss_sum == plain
    assert made.ask(ScoreBatch(ids, mask, labels)).log_probs.sum() == pytest.approx(-plain, rel=1e-12)


# --- gradients and steps ----------------------------------------------------------------------------------------------


@models
@settings(max_examples=8)
@given(cuts=st.sets(st.integers(1, 5)), seed=st.integers(0, 5))
def test_micro_batches_with_a_common_normalizer_equal_one_batch(
    family: str, cuts: set[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = rig(family, tmp_path_factory.getbasetemp())
    ids, mask, labels = batch([7, 3, 6, 4, 4, 5], seed=seed)
    tokens = int((labels[:, 1:] != IGNORED).sum())
    expected_loss = summed_loss(made.model, ids, mask, labels)
    edges = [0, *sorted(cuts), len(ids)]
    losses = [made.ask(TrainBatch(ids[a:b], mask[a:b], labels[a:b], tokens)) for a, b in itertools.pairwise(edges)]
    assert sum(part.loss_sum for part in losses) == pytest.approx(float(expected_loss.detach()), rel=1e-12)
    assert sum(part.num_tokens for part in losses) == tokens
    assert made.backend.passes == len(losses)
    answer = made.ask(GradientsRequest())
    assert isinstance(answer, AdapterTensors)
    assert difference(answer.tensors, gradients_of(expected_loss / tokens, made.model)) < 1e-12


def test_before_any_pass_gradients_are_zero(tmp_path: Path) -> None:
    made = rig("llama", tmp_path)
    answer = made.ask(GradientsRequest())
    assert answer.tensors.keys() == dict(made.model.named_parameters()).keys()
    assert not any(bool(value.any()) for value in answer.tensors.values())


@models
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e9])
def test_a_step_is_torchs_own_clipping_and_step(family: str, optimizer: str, limit: float, tmp_path: Path) -> None:
    made = rig(family, tmp_path, optimizer=optimizer, weight_decay=0.01)
    twin = copy.deepcopy(made.model)
    own: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    twin_optimizer = own(twin.parameters(), lr=1.0, weight_decay=0.01)
    ids, mask, labels = batch([6, 5])
    for rate in (0.1, 0.02):  # the second shows that the first step's gradients are gone
        made.ask(TrainBatch(ids, mask, labels, 7))
        answer = made.ask(OptimizerStep(rate, limit))
        assert isinstance(answer, StepDone)
        twin_optimizer.zero_grad()
        (summed_loss(twin, ids, mask, labels) / 7).backward()
        gradients = [value.grad for value in twin.parameters()]
        norm = torch.linalg.vector_norm(torch.cat([value.flatten() for value in gradients if value is not None]))
        if limit:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), limit)
        twin_optimizer.param_groups[0]["lr"] = rate
        twin_optimizer.step()
        assert answer.grad_norm == pytest.approx(float(norm), rel=1e-10)
        assert float(norm) > 1e-3, "so that the small limit clips"
        assert all(value.grad is None for value in made.model.parameters())
    assert difference(made.ask(AdapterRequest()).tensors, dict(twin.named_parameters())) < 1e-10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_gradients_alone(value: float, tmp_path: Path) -> None:
    made = rig("gpt2", tmp_path)
    ids, mask, labels = batch([5, 5])
    made.ask(TrainBatch(ids, mask, labels, 1))
    before = {name: gradient.clone() for name, gradient in made.ask(GradientsRequest()).tensors.items()}
    made.model.transformer.ln_f.bias.data.fill_(value)
    answer = made.ask(TrainBatch(ids, mask, labels, 1))
    assert not math.isfinite(answer.loss_sum)
    after = made.ask(GradientsRequest()).tensors
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert made.backend.passes == 2, "the host's graphs are freed all the same"


@models
def test_saved_state_is_gone_back_to(family: str, tmp_path: Path) -> None:
    made = rig(family, tmp_path, optimizer="adamw")
    ids, mask, labels = batch([6, 5])

    def run(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append(made.ask(TrainBatch(ids, mask, labels, 7)).loss_sum)
            made.ask(OptimizerStep(1e-3, 1.0))
        return losses

    run(2)
    assert made.ask(SaveState(2)) == Acknowledged()
    rest = run(3)
    assert made.ask(LoadState(2)) == Acknowledged()
    assert run(3) == rest
    assert len(set(rest)) == 3


# --- scores -----------------------------------------------------------------------------------------------------------


class Direct(Tuner):
    """The owner's side with no channel between; remembers what it asked."""

    def __init__(self, made: Rig) -> None:
        self.made = made
        self.asked: list[Message] = []

    def _exchange(self, request: Message) -> Iterator[Message]:
        self.asked.append(request)
        self.made.emitted.clear()
        answer = self.made.ask(request)
        yield from self.made.emitted
        yield answer


def long_way(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability and greediness of one pair, alone and unpadded."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        log_probs = full_logits(model, ids, torch.ones_like(ids)).log_softmax(-1)[0, len(context) - 1 : -1]
    picked = log_probs[range(len(continuation)), continuation]
    return float(picked.sum()), log_probs.argmax(-1).tolist() == continuation


def greedy(model: Any, context: list[int], count: int) -> list[int]:
    ids = list(context)
    with torch.no_grad():
        for _ in range(count):
            row = torch.tensor([ids])
            ids.append(int(full_logits(model, row, torch.ones_like(row))[0, -1].argmax()))
    return ids[len(context) :]


@models
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_the_full_computation_in_the_order_asked(family: str, batch_size: int, tmp_path: Path) -> None:
    made = rig(family, tmp_path)
    made.model.eval()
    draw = torch.Generator().manual_seed(3)
    contexts = [torch.randint(0, 256, (n,), generator=draw).tolist() for n in (3, 1, 6, 2, 4)]
    likely = [greedy(made.model, context, 2 + n % 2) for n, context in enumerate(contexts)]
    # The likeliest continuation, the same with its last token wrong, the same with its first wrong, and a single token.
    pairs = [
        (context, continuation)
        for context, best in zip(contexts, likely, strict=True)
        for continuation in (best, [*best[:-1], (best[-1] + 1) % 256], [(best[0] + 1) % 256, *best[1:]], best[:1])
    ]
    tuner = Direct(made)
    found = tuner.score(pairs, batch_size=batch_size, pad_id=256)
    expected = [long_way(made.model, *pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert [is_greedy for _, is_greedy in expected] == [True, False, False, True] * len(contexts)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-10)
    sizes = [request.input_ids.shape for request in tuner.asked if isinstance(request, ScoreBatch)]
    assert len(sizes) == math.ceil(len(pairs) / batch_size)
    assert [width for _, width in sizes] == sorted((width for _, width in sizes), reverse=True), (
        "the longest come first"
    )


def test_nothing_to_score_is_no_request(tmp_path: Path) -> None:
    tuner = Direct(rig("gpt2", tmp_path))
    assert tuner.score([]) == []
    assert tuner.asked == []


def test_scores_of_a_row_do_not_depend_on_its_neighbours_or_padding(tmp_path: Path) -> None:
    made = rig("llama", tmp_path)
    ids, mask, labels = batch([7, 3])
    both = made.ask(ScoreBatch(ids, mask, labels))
    alone = made.ask(ScoreBatch(ids[1:, :3], mask[1:, :3], labels[1:, :3]))
    assert isinstance(both, Scores)
    assert float(both.log_probs[1]) == pytest.approx(float(alone.log_probs[0]), rel=1e-12)
    assert both.log_probs.dtype == torch.float64


# --- generation -------------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize(
    "decoding", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 50}], ids=["greedy", "sampled"]
)
def test_generated_tokens_are_those_of_transformers(family: str, decoding: dict[str, Any], tmp_path: Path) -> None:
    made = rig(family, tmp_path)
    made.model.eval()
    ids, _, _ = batch([5])
    wanted = {"max_new_tokens": 8, "min_new_tokens": 8, **decoding}
    torch.manual_seed(11)
    expected = made.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **wanted)[0, 5:].tolist()
    found = list(Direct(made).generate(ids, {**wanted, "seed": 11}))
    assert found == expected
    assert len(set(found)) > 1
    assert made.backend.generations == 1
    assert made.emitted == [GeneratedToken(token, last=False) for token in expected]
    if decoding["do_sample"]:
        assert list(Direct(made).generate(ids, {**wanted, "seed": 12})) != expected
    else:
        assert found == greedy(made.model, ids[0].tolist(), 8), "the cache changes nothing"


def test_an_answer_ends_at_its_end_token_and_is_closed(tmp_path: Path) -> None:
    made = rig("gpt2", tmp_path)
    made.model.eval()
    ids, _, _ = batch([5])
    tokens = greedy(made.model, ids[0].tolist(), 4)
    end = tokens[1]
    wanted = tokens[: tokens.index(end) + 1]
    answer = made.ask(
        GenerateRequest(ids, {"do_sample": False, "max_new_tokens": 9, "eos_token_id": end, "pad_token_id": 256})
    )
    assert answer == GeneratedToken(-1, last=True)
    assert [message.token for message in made.emitted if isinstance(message, GeneratedToken)] == wanted


# --- requests ---------------------------------------------------------------------------------------------------------


def test_adapter_and_figures_are_answered(tmp_path: Path) -> None:
    made = rig("gpt2", tmp_path)
    factors = made.ask(AdapterRequest()).tensors
    assert all(torch.equal(factors[name], value) for name, value in made.model.named_parameters())
    assert not any(value.requires_grad for value in factors.values())
    assert made.ask(CostRequest()) == CostReport({})


REQUESTS = {
    TrainBatch, EvalBatch, OptimizerStep, ScoreBatch, LogitsRequest, GenerateRequest, GradientsRequest, AdapterRequest,
    SaveState, LoadState, CostRequest,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted({*MESSAGES.values()} - REQUESTS, key=lambda kind: kind.__name__))
def test_what_is_no_request_is_refused(kind: type[Message], tmp_path: Path) -> None:
    engine = Engine(
        nn.Linear(1, 1), Counting({}, torch.optim.SGD([torch.ones(1)], lr=1), StateStore(tmp_path, "f")), CPU, print
    )
    message = object.__new__(kind)  # its contents must not matter
    with pytest.raises(ProtocolError, match=f"does not answer {kind.__name__}$"):
        engine.handle(message)


def test_a_tuner_refuses_an_answer_of_another_kind() -> None:
    class Confused(Tuner):
        def __init__(self, *answers: Message) -> None:
            self.answers = answers

        def _exchange(self, request: Message) -> Iterator[Message]:
            yield from self.answers

    ids, mask, labels = batch([4])
    with pytest.raises(ProtocolError, match="expected BatchLoss, got StepDone"):
        Confused(StepDone(1.0)).accumulate(ids, mask, labels, 1)
    with pytest.raises(ProtocolError, match="expected StepDone, got nothing"):
        Confused().step(0.1)
    with pytest.raises(ProtocolError, match="expected GeneratedToken, got Scores"):
        list(Confused(GeneratedToken(1, last=False), Scores(ids, ids)).generate(ids, {}))
