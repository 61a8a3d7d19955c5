"""What the texts in a recorded run really were: the scorer's knowledge, made again from the configuration.

The owner's order of examples follows from the data, the seed and the batch size, so it is replayed and laid beside the
recorded passes; a pass whose shape is not the replayed one's is an error, not a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from veiltune.attacks import View
from veiltune.attacks.passes import lengths_of, masks_of_segments
from veiltune.batching import Batch, batches
from veiltune.config import Config
from veiltune.data import load_tokenized
from veiltune.errors import UserError
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.training import total_steps
from veiltune.transport.messages import Message, ScoreBatch, Scores
from veiltune.tuner import Tuner

Moment = Literal["first", "last"]

SCORER_READS = {
    "TrunkForward": ("training", "attention_mask", "hidden"),
    "SegmentForward": ("training", "context_id", "hidden"),
    "VeiledForward": ("training", "attention_mask", "hidden"),
    "PassContext": ("context_id", "attention_mask"),
    "SplitRequest": ("terms",),
}


@dataclass(frozen=True)
class TruePass:
    """One pass as the owner ran it; ``labels`` begin where the prompt ends (-100 before)."""

    ids: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)


@dataclass(frozen=True)
class TrueRow:
    """One sequence that crossed: the message of its pass, its row there, its tokens, what tells it from others, its labels."""

    number: int
    row: int
    tokens: tuple[int, ...] = field(repr=False)
    prompt: tuple[int, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class _Observed:
    """A recorded pass: its shape, and the lengths of its rows where the observer was told of the padding."""

    number: int
    training: bool
    shape: tuple[int, int]
    lengths: list[int] | None


def scorer_reads(view_kinds: frozenset[str]) -> frozenset[str]:
    """Fields the scorer needs beside the attack's, of the kinds that the observer sees."""
    return frozenset(f"{kind}.{leaf}" for kind, leaves in SCORER_READS.items() if kind in view_kinds for leaf in leaves)


def true_passes(view: View, config: Config, tokenizer: Any, longest: int) -> dict[int, TruePass]:
    """The true text of recorded passes, by the number of their message.

    Training passes if any crossed; else those that fetched trunk outputs to keep; else those that scored tasks.

    Raises:
        UserError: no pass without a cache was recorded, or what was recorded is not this configuration's.
    """
    observed = list(_observed(view))
    trained = [each for each in observed if each.training]
    candidates = [_training(config, tokenizer)] if trained else [_fetches(config, tokenizer)]
    if not trained and config.evaluate.tasks:
        candidates.append(_scorings(config, tokenizer, longest))
    for expected in candidates:
        found = _aligned(trained or observed, list(expected), partial=bool(trained))
        if found:
            return found
    raise UserError(
        f"the {len(trained or observed)} recorded passes are not those that this configuration makes",
        hint="attack a run of `veiltune tune` with its own data; the data file may have changed since",
    )


def _observed(view: View) -> Iterator[_Observed]:
    masks = masks_of_segments(view) if view.rights.sees("PassContext") else {}
    codec = WireCodec.for_activations(WireOptions())
    if view.rights.sees("SplitRequest"):
        requests = view.messages("SplitRequest")
        if requests:
            codec = WireCodec.for_activations(WireOptions.model_validate(requests[0]["terms"]["wire"]))
    for kind in ("TrunkForward", "SegmentForward", "VeiledForward"):
        if not view.rights.sees(kind):
            continue
        for seen in view.messages(kind):
            hidden = codec.decode(seen["hidden"]) if kind == "TrunkForward" else seen["hidden"]
            mask = masks.get(seen.number) if kind == "SegmentForward" else seen["attention_mask"]
            rows, length = hidden.shape[:2]
            known = mask is not None or kind == "TrunkForward"  # elsewhere no mask may mean that the enclave keeps it
            yield _Observed(
                seen.number, seen["training"], (rows, length), lengths_of(mask, rows, length) if known else None
            )


def _aligned(observed: Sequence[_Observed], expected: Sequence[TruePass], *, partial: bool) -> dict[int, TruePass]:
    """Observed passes with what they are, where all of them (or a stretch of them, unless ``partial``) fit in order."""
    if not observed or not expected:
        return {}
    last = 0 if partial else max(0, len(observed) - len(expected))
    for start in range(last + 1):
        pairs = list(zip(observed[start:], expected, strict=False))
        if pairs and all(_fits(*pair) for pair in pairs) and (not partial or len(pairs) == len(observed)):
            return {seen.number: true for seen, true in pairs}
    return {}


def _fits(seen: _Observed, true: TruePass) -> bool:
    return seen.shape == tuple(true.ids.shape) and seen.lengths in (None, true.mask.sum(1).tolist())


# --- the owner's passes, again ----------------------------------------------------------------------------------------


def _batches(config: Config, tokenizer: Any) -> Iterator[Batch]:
    if config.data.train is None:
        return
    examples = load_tokenized(config.data.train, config, tokenizer, split="train")
    steps = total_steps(config.train, len(examples)) * config.train.accumulate
    pad = int(tokenizer.pad_token_id)
    yield from batches(examples, config.train.batch_size, seed=config.seed, steps=steps, pad_id=pad)


def _training(config: Config, tokenizer: Any) -> Iterator[TruePass]:
    for batch in _batches(config, tokenizer):
        yield TruePass(batch.input_ids, batch.attention_mask, batch.labels)


def _fetches(config: Config, tokenizer: Any) -> Iterator[TruePass]:
    """Each batch's texts that were not asked for before, in order, shortened to the longest of them."""
    known: set[tuple[int, ...]] = set()
    for batch in _batches(config, tokenizer):
        lengths = batch.attention_mask.sum(1).tolist()
        rows = [tuple(row[:length].tolist()) for row, length in zip(batch.input_ids, lengths, strict=True)]
        missing = [i for i, row in enumerate(rows) if row not in known and row not in rows[:i]]
        known.update(rows)
        if missing:
            length = max(lengths[i] for i in missing)
            parts = (batch.input_ids, batch.attention_mask, batch.labels)
            yield TruePass(*(part[missing, :length] for part in parts))


class _Capture(Tuner):
    """A tuner that keeps the batches it is asked to score."""

    def __init__(self) -> None:
        self.requests: list[ScoreBatch] = []

    def _exchange(self, request: Message) -> Iterator[Message]:
        assert isinstance(request, ScoreBatch)  # noqa: S101 - nothing else is asked of it
        self.requests.append(request)
        count = len(request.input_ids)
        yield Scores(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool))


def _scorings(config: Config, tokenizer: Any, longest: int) -> Iterator[TruePass]:
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


# --- which of them are attacked ---------------------------------------------------------------------------------------


def distinct_rows(passes: dict[int, TruePass], moment: Moment) -> list[TrueRow]:
    """Sequences in the order they crossed (``last``: from the end), those with an earlier one's prompt left out."""
    chosen: dict[tuple[int, ...], TrueRow] = {}
    for number in sorted(passes, reverse=moment == "last"):
        true = passes[number]
        for index, (ids, mask, labels) in enumerate(zip(true.ids, true.mask, true.labels, strict=True)):
            tokens = tuple(ids[: int(mask.sum())].tolist())
            labelled = torch.nonzero(labels >= 0).flatten().tolist()
            prompt = tokens[: labelled[0]] if labelled and labelled[0] else tokens
            chosen.setdefault(prompt, TrueRow(number, index, tokens, prompt, tuple(labels[: len(tokens)].tolist())))
    return list(chosen.values())
