"""The owner's passes, made again from its configuration: what each phase of a run computes, in order.

The order of examples follows from the data, the seed and the batch size; of tasks from their items; of generations from what
the run kept of prompts and answers (`veiltune.evaluation.asked`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veiltune.batching import Batch, batches
from veiltune.config import Config
from veiltune.data import load_tokenized
from veiltune.evaluation.asked import Asked
from veiltune.examples import IGNORED
from veiltune.study_terms import Phase
from veiltune.training import total_steps
from veiltune.transport.messages import Message, ScoreBatch, Scores
from veiltune.tuner import Tuner


@dataclass(frozen=True)
class TruePass:
    """One pass as the owner ran it; ``labels`` begin where the prompt ends (-100 before)."""

    ids: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)


def training(config: Config, tokenizer: Any) -> Iterator[TruePass]:
    """Batches that are trained on."""
    yield from map(_of_batch, _batches(config, tokenizer))


def validation(config: Config, tokenizer: Any) -> Iterator[TruePass]:
    """Held-out batches, as often as the loss on them is measured."""
    for batch in _training_and_held_out(config, tokenizer):
        if batch[0] == "validation":
            yield _of_batch(batch[1])


def _training_and_held_out(config: Config, tokenizer: Any) -> Iterator[tuple[Phase, Batch]]:
    """All batches while tuning, in their order (`veiltune.training.Trainer.run`)."""
    train = config.train
    held_out = _held_out(config, tokenizer)
    done, group = 0, train.accumulate
    stream = list(_batches(config, tokenizer))
    total = len(stream) // group
    for number, batch in enumerate(stream, 1):
        yield "tuning", batch
        if number % group:
            continue
        done += 1
        if done == total or (train.evaluate_every and done % train.evaluate_every == 0):
            yield from (("validation", each) for each in held_out)


def _held_out(config: Config, tokenizer: Any) -> list[Batch]:
    if config.data.validation is None:
        return []
    examples = load_tokenized(config.data.validation, config, tokenizer, split="validation")
    pad = int(tokenizer.pad_token_id)
    return list(batches(examples, config.train.batch_size, seed=None, epochs=1, pad_id=pad))


def _of_batch(batch: Batch) -> TruePass:
    return TruePass(batch.input_ids, batch.attention_mask, batch.labels)


def _batches(config: Config, tokenizer: Any) -> Iterator[Batch]:
    if config.data.train is None:
        return
    examples = load_tokenized(config.data.train, config, tokenizer, split="train")
    steps = total_steps(config.train, len(examples)) * config.train.accumulate
    pad = int(tokenizer.pad_token_id)
    yield from batches(examples, config.train.batch_size, seed=config.seed, steps=steps, pad_id=pad)


def fetches(config: Config, tokenizer: Any) -> Iterator[tuple[Phase, TruePass]]:
    """Where trunk outputs are kept: each batch's texts that were not asked for before, shortened to the longest of them."""
    known: set[tuple[int, ...]] = set()
    for phase, batch in _training_and_held_out(config, tokenizer):
        lengths = batch.attention_mask.sum(1).tolist()
        rows = [tuple(row[:length].tolist()) for row, length in zip(batch.input_ids, lengths, strict=True)]
        missing = [i for i, row in enumerate(rows) if row not in known and row not in rows[:i]]
        known.update(rows)
        if missing:
            length = max(lengths[i] for i in missing)
            parts = (batch.input_ids, batch.attention_mask, batch.labels)
            yield phase, TruePass(*(part[missing, :length] for part in parts))


class _Capture(Tuner):
    """A tuner that keeps the batches it is asked to score."""

    def __init__(self) -> None:
        self.requests: list[ScoreBatch] = []

    def _exchange(self, request: Message) -> Iterator[Message]:
        assert isinstance(request, ScoreBatch)  # noqa: S101 - nothing else is asked of it
        self.requests.append(request)
        count = len(request.input_ids)
        yield Scores(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool))


def scorings(config: Config, tokenizer: Any, longest: int) -> Iterator[TruePass]:
    """Batches of scored items of all tasks; ``longest``: positions of the model."""
    from veiltune.tasks import DEFAULT_MAX_LENGTH, evaluate

    capture = _Capture()
    evaluate(
        config.evaluate.tasks,
        lambda pairs: capture.score(pairs, pad_id=int(tokenizer.pad_token_id)),
        tokenizer,
        limit=config.evaluate.limit,
        max_length=min(DEFAULT_MAX_LENGTH, longest),
    )
    for request in capture.requests:
        yield TruePass(request.input_ids, request.attention_mask, request.labels)


def generations(asked: Sequence[Asked], tokenizer: Any) -> Iterator[TruePass]:
    """Prompts with their answers, one a pass."""
    for each in asked:
        prompt = each.prompt_tokens(tokenizer)
        ids = torch.tensor([[*prompt, *each.tokens]])
        labels = ids.clone()
        labels[:, : len(prompt)] = IGNORED
        yield TruePass(ids, torch.ones_like(ids), labels)
