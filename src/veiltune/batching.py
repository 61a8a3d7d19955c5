"""Batches of tokenised examples: shuffled anew each epoch by the seed, and cheap to enter in the middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from veiltune.errors import DataError
from veiltune.examples import IGNORED, TokenizedExample


@dataclass(frozen=True)
class Batch:
    """Right-padded examples. ``num_target_tokens`` counts the labels that bear loss after the model's shift by one."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    num_target_tokens: int


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches in one pass; the last may be smaller."""
    return -(-num_examples // batch_size)


def batches(
    examples: Sequence[TokenizedExample],
    batch_size: int,
    *,
    seed: int | None,
    pad_id: int,
    epochs: int | None = None,
    steps: int | None = None,
    start: int = 0,
) -> Iterator[Batch]:
    """Batches ``start`` to the end of ``epochs`` passes, or to batch ``steps`` (exactly one of the two is given).

    Args:
        examples: tokenised examples.
        batch_size: examples per batch; an epoch's last batch holds the rest.
        seed: epoch e is shuffled by (seed, e); ``None`` keeps the order.
        pad_id: token in padded places (masked out, without loss).
        epochs: passes over the examples.
        steps: batches in all, from the first epoch's first, over as many epochs as it takes.
        start: batches already done; they are skipped by arithmetic, not drawn.

    Raises:
        DataError: there are no examples.
        ValueError: both or neither of ``epochs`` and ``steps``, or a size below one.
    """
    if not examples:
        raise DataError("there are no examples to make batches of", hint="check data.train and data.limit")
    if (epochs is None) == (steps is None):
        raise ValueError("give either epochs or steps")
    if batch_size < 1 or start < 0:
        raise ValueError(f"batch_size is {batch_size} and start is {start}")
    per_epoch = steps_per_epoch(len(examples), batch_size)
    total = steps if steps is not None else per_epoch * (epochs or 0)
    return _generate(examples, batch_size, seed, pad_id, range(start, total))


def _generate(
    examples: Sequence[TokenizedExample], batch_size: int, seed: int | None, pad_id: int, numbers: range
) -> Iterator[Batch]:
    per_epoch = steps_per_epoch(len(examples), batch_size)
    order: list[int] = []
    known_epoch = -1
    for number in numbers:
        epoch, index = divmod(number, per_epoch)
        if epoch != known_epoch:
            order, known_epoch = epoch_order(len(examples), seed, epoch), epoch
        yield collate([examples[i] for i in order[index * batch_size : (index + 1) * batch_size]], pad_id)


def epoch_order(num_examples: int, seed: int | None, epoch: int) -> list[int]:
    """The permutation of epoch ``epoch``; the identity without a seed."""
    if seed is None:
        return list(range(num_examples))
    # Unlike seed + epoch, this does not make one run's second epoch the next seed's first.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % (1 << 63))
    return torch.randperm(num_examples, generator=generator).tolist()


def collate(examples: Sequence[TokenizedExample], pad_id: int) -> Batch:
    """One batch, padded on the right to its longest example."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(examples), length), dtype=torch.int64)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        input_ids[row, :end] = torch.tensor(example.input_ids, dtype=torch.int64)
        attention_mask[row, :end] = 1
        labels[row, :end] = torch.tensor(example.labels, dtype=torch.int64)
    return Batch(input_ids, attention_mask, labels, sum(example.num_target_tokens for example in examples))
