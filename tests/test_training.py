"""The training loop: schedules, accumulation, clipping, order, and that protected runs follow plain ones as they learn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import close_sequences, exported_adapter, make_config, relative_error, tuned, write_examples
from veiltune.config import TrainConfig
from veiltune.errors import TrainingError
from veiltune.examples import TokenizedExample
from veiltune.training import COMMIT, Trainer, learning_rates, total_steps
from veiltune.transport.messages import (
    Acknowledged,
    BatchLoss,
    EvalBatch,
    Message,
    OptimizerStep,
    SaveState,
    StepDone,
    TrainBatch,
)
from veiltune.tuner import Tuner

# --- protected runs follow plain ones ---------------------------------------------------------------------------------

LEARNING = {"adamw": 3e-3, "sgd": 0.3}
STEPS = 50


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loss curves on the colour task, each run once."""
    directory = tmp_path_factory.mktemp("curves")
    data = {"train": str(write_examples(directory / "train.jsonl", 40))}
    known: dict[str, list[float]] = {}

    def curve(design: str, optimizer: str, **options: Any) -> list[float]:
        name = "-".join([design, optimizer, *map(str, options.values())])
        if name not in known:
            train = {
                "steps": STEPS, "batch_size": 8, "optimizer": optimizer, "learning_rate": LEARNING[optimizer], "warmup_steps": 5,
            }  # fmt: skip
            tables: dict[str, Any] = {"obfuscatune": {"key_seed": 2, **options}} if design == "obfuscatune" else {}
            known[name] = tuned(make_config(design, "llama", directory / name, data=data, train=train, **tables))[
                "loss"
            ]
        return known[name]

    return curve


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("optimizer", LEARNING)
def test_the_task_is_learnt(optimizer: str, curves: Any) -> None:
    """Otherwise following it would show nothing."""
    loss = curves("local", optimizer)
    assert len(loss) == STEPS
    assert mean(loss[-5:]) < 0.6 * loss[0]


@pytest.mark.parametrize("placement", ["compact", "paper"])
def test_adamw_in_the_enclave_follows_local_at_every_step(placement: str, curves: Any) -> None:
    loss = curves("obfuscatune", "adamw", optimizer_at="enclave", placement=placement)
    assert close_sequences(loss, curves("local", "adamw")) < 1e-3


@pytest.mark.parametrize("optimizer_at", ["host", "enclave"])
def test_sgd_follows_local_wherever_it_is(optimizer_at: str, curves: Any) -> None:
    loss = curves("obfuscatune", "sgd", optimizer_at=optimizer_at)
    assert close_sequences(loss, curves("local", "sgd")) < 1e-3


def test_adamw_on_the_host_takes_its_own_way_to_the_same_loss(curves: Any) -> None:
    """Its moments live in another basis, so the paths differ; the loss they end at does not."""
    loss, plain = curves("obfuscatune", "adamw", optimizer_at="host"), curves("local", "adamw")
    assert close_sequences(loss, plain) > 1e-3
    assert mean(loss[-5:]) == pytest.approx(mean(plain[-5:]), rel=0.02)


# --- schedules --------------------------------------------------------------------------------------------------------


def shape(name: str, step: int, warmup: int, total: int) -> float:
    """The multiplier of a step, written out from the documentation of `transformers`' schedules."""
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@given(total=st.integers(1, 40), data=st.data())
def test_schedules_are_those_of_transformers(name: Any, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    rates = learning_rates(TrainConfig(schedule=name, learning_rate=0.3, warmup_steps=warmup), total)
    assert rates == pytest.approx([0.3 * shape(name, step, warmup, total) for step in range(total)], abs=1e-12)


@given(examples=st.integers(1, 50), epochs=st.integers(1, 4), batch=st.integers(1, 9), accumulate=st.integers(1, 4))
def test_epochs_are_enough_steps_and_no_more(examples: int, epochs: int, batch: int, accumulate: int) -> None:
    train = TrainConfig(epochs=epochs, batch_size=batch, accumulate=accumulate)
    steps = total_steps(train, examples)
    micro_batches = epochs * math.ceil(examples / batch)  # an epoch's last batch holds the rest
    assert (steps - 1) * accumulate < micro_batches <= steps * accumulate
    assert total_steps(train.model_copy(update={"steps": 7}), examples) == 7


# --- accumulation and clipping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "optimizer_at"), [("local", None), ("obfuscatune", "enclave"), ("obfuscatune", "host")]
)
def test_small_batches_accumulated_equal_one_large_batch(design: str, optimizer_at: str | None, tmp_path: Path) -> None:
    """Examples of different lengths, so a mean of means would differ."""
    data = {"train": str(write_examples(tmp_path / "train.jsonl", 16))}
    tables: dict[str, Any] = {} if optimizer_at is None else {"obfuscatune": {"optimizer_at": optimizer_at}}
    found: list[tuple[list[float], dict[str, torch.Tensor]]] = []
    for batch, accumulate in ((8, 1), (2, 4)):
        train = {"batch_size": batch, "accumulate": accumulate, "steps": 4}
        output = tmp_path / f"{batch}"
        history = tuned(make_config(design, "gpt2", output, data=data, train=train, dtype="float64", **tables))
        found.append((history["loss"], exported_adapter(output)))
    (whole, whole_adapter), (parts, parts_adapter) = found
    assert close_sequences(parts, whole) < 1e-10
    assert max(relative_error(parts_adapter[name], value) for name, value in whole_adapter.items()) < 1e-8


@pytest.mark.parametrize(
    ("design", "optimizer_at"), [("local", None), ("obfuscatune", "enclave"), ("obfuscatune", "host")]
)
@pytest.mark.parametrize("limit", [0.05, 0.0, 1e6])
def test_gradients_are_clipped_to_the_global_norm(
    design: str, optimizer_at: str | None, limit: float, tmp_path: Path
) -> None:
    """One step of SGD moves the second factors by learning rate × gradient (the first factors' gradient is still zero).

    An orthogonal key changes no norm, so the host clips by the same number without knowing the gradient.
    """
    data = {"train": str(write_examples(tmp_path / "train.jsonl", 4))}
    tables: dict[str, Any] = {} if optimizer_at is None else {"obfuscatune": {"optimizer_at": optimizer_at}}
    train = {"steps": 1, "schedule": "constant", "learning_rate": 0.5, "max_grad_norm": limit}
    norms: list[float] = []

    def on_event(name: str, fields: dict[str, Any]) -> None:
        if name == "step":
            norms.append(fields["grad_norm"])

    tuned(make_config(design, "gpt2", tmp_path / "run", data=data, train=train, **tables), on_event=on_event)
    moved = math.sqrt(
        sum(float(v.square().sum()) for n, v in exported_adapter(tmp_path / "run").items() if "lora_B" in n)
    )
    assert norms[0] > 0.1
    assert moved == pytest.approx(0.5 * (limit if limit == 0.05 else norms[0]), rel=1e-4)


# --- the loop itself, over a tuner that only answers ------------------------------------------------------------------


class Answers(Tuner):
    """Answers every request at once and remembers it."""

    def __init__(self, losses: Iterator[float], norm: float = 1.0) -> None:
        self.asked: list[Message] = []
        self.losses = losses
        self.norm = norm

    def _exchange(self, request: Message) -> Iterator[Message]:
        self.asked.append(request)
        if isinstance(request, (TrainBatch, EvalBatch)):
            count = int((request.labels[:, 1:] != -100).sum())
            yield BatchLoss(next(self.losses) * count, count)
        elif isinstance(request, OptimizerStep):
            yield StepDone(self.norm)
        else:
            yield Acknowledged()

    def of(self, kind: type[Message]) -> list[Any]:
        return [request for request in self.asked if isinstance(request, kind)]


def example(number: int) -> TokenizedExample:
    ids = tuple(range(number, number + 3 + number % 3))
    return TokenizedExample(ids, ids)


def trainer(
    tuner: Tuner, output: Path, *, interrupted: Any = lambda: False, events: list[Any] | None = None, **train: Any
) -> Trainer:
    config = make_config("local", "gpt2", output, train={"batch_size": 2, **train})
    return Trainer(
        tuner,
        config,
        [example(number) for number in range(8)],
        [example(number) for number in range(3)],
        pad_id=0,
        report=lambda name, fields: None if events is None else events.append((name, fields)),
        interrupted=interrupted,
    )


def forever(value: float) -> Iterator[float]:
    while True:
        yield value


@pytest.mark.parametrize(
    ("losses", "norm", "what"),
    [([2.0, math.nan], 1.0, "loss"), ([2.0, math.inf], 1.0, "loss"), ([], math.nan, "gradient norm")],
)
def test_a_loss_that_is_not_finite_stops_the_run(losses: list[float], norm: float, what: str, tmp_path: Path) -> None:
    tuner = Answers(iter([*losses, *[1.0] * 9]), norm)
    run = trainer(tuner, tmp_path, steps=4, checkpoint_every=1, accumulate=1)
    run.validation = []
    with pytest.raises(TrainingError, match=f"the {what} of step {len(losses) or 1} is (nan|inf)") as caught:
        run.run()
    assert "learning_rate" in str(caught.value.hint)
    assert len(tuner.of(OptimizerStep)) == 1
    assert [save.step for save in tuner.of(SaveState)] == list(range(1, len(losses)))
    assert (tmp_path / COMMIT).exists() == bool(losses)


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    tuner = Answers(iter([2.0, 1.5, *[math.nan] * 9]))
    run = trainer(tuner, tmp_path, steps=4, checkpoint_every=1, evaluate_every=2, accumulate=1)
    with pytest.raises(TrainingError, match="the validation loss of step 2 is nan"):
        run.run()
    assert [save.step for save in tuner.of(SaveState)] == [1], "the state that gave it is no checkpoint"
    assert json.loads((tmp_path / COMMIT).read_text(encoding="utf-8"))["step"] == 1


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    tuner = Answers(iter([1.0, 3.0]))
    run = trainer(tuner, tmp_path, steps=1, accumulate=2)
    run.validation = []
    history = run.run()
    counts = [int((batch.labels[:, 1:] != -100).sum()) for batch in tuner.of(TrainBatch)]
    assert history.loss == [pytest.approx((counts[0] * 1.0 + counts[1] * 3.0) / sum(counts))]
    assert {batch.normalizer for batch in tuner.of(TrainBatch)} == {sum(counts)}


def test_validation_and_checkpoints_come_when_asked_and_at_the_end(tmp_path: Path) -> None:
    events: list[Any] = []
    tuner = Answers(forever(1.5))
    history = trainer(tuner, tmp_path, steps=5, evaluate_every=2, checkpoint_every=3, events=events).run()
    assert [step for step, _ in history.validation_loss] == [2, 4, 5]
    assert all(value == pytest.approx(1.5) for _, value in history.validation_loss)
    assert [save.step for save in tuner.of(SaveState)] == [3, 5]
    assert [fields["step"] for name, fields in events if name == "checkpoint"] == [3, 5]
    assert history.step == 5
    assert not history.interrupted


def test_an_interruption_checkpoints_and_the_rest_is_what_would_have_come(tmp_path: Path) -> None:
    whole = Answers(forever(1.0))
    trainer(whole, tmp_path / "whole", steps=7, accumulate=2).run()

    first = Answers(forever(1.0))
    asked = iter([False, False, True])
    history = trainer(first, tmp_path / "parts", steps=7, accumulate=2, interrupted=lambda: next(asked)).run()
    assert history.interrupted
    assert history.step == 3
    assert [save.step for save in first.of(SaveState)] == [3]

    rest = Answers(forever(1.0))
    second = trainer(rest, tmp_path / "parts", steps=7, accumulate=2)
    second.resume(json.loads((tmp_path / "parts" / COMMIT).read_text()))
    assert second.run().step == 7
    assert len(second.history.loss) == 7
    joined = [*first.of(TrainBatch), *rest.of(TrainBatch)]
    for one, other in zip(joined, whole.of(TrainBatch), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
    rates = [step.learning_rate for step in [*first.of(OptimizerStep), *rest.of(OptimizerStep)]]
    assert rates == [step.learning_rate for step in whole.of(OptimizerStep)]
    assert len(set(rates)) == 7
