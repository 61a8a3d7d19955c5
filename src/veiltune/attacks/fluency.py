"""What the model itself thinks likely to follow: a prior for whoever guesses text, and text. A provider has both for nothing."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.remembered import learnt


class Fluency:
    """Log-probabilities of the next token after some prefixes that grow by a token at a time.

    Args:
        model: a causal language model.
        prefixes: how many.
    """

    def __init__(self, model: Any, prefixes: int) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache: Any = DynamicCache()
        self._length = 0
        self.next: Float[Tensor, "n v"] | None = None
        """Log-probabilities of the next token after each prefix; none while they are empty."""
        self._rows = torch.arange(prefixes)

    @torch.no_grad()
    def extend(self, parents: Int[Tensor, " n"], tokens: Int[Tensor, " n"]) -> Float[Tensor, "n v"]:
        """Each prefix becomes that of ``parents`` with one more token; the log-probabilities after it."""
        if self._length:
            self._cache.batch_select_indices(parents)
        position = torch.full((len(tokens), 1), self._length)
        logits = self._model(
            input_ids=tokens[:, None], position_ids=position, past_key_values=self._cache, use_cache=True
        ).logits[:, -1]
        self._length += 1
        self.next = logits.float().log_softmax(-1)
        return self.next


def written(model: Any, count: int, length: int) -> Int[Tensor, "count length"]:
    """Texts that the model writes itself, each from a token drawn evenly: drawn once, the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(0)
    return learnt(["written", count, length], model, (), generator, lambda: _sampled(model, count, length, generator))


def _sampled(model: Any, count: int, length: int, generator: torch.Generator) -> Int[Tensor, "count length"]:
    vocabulary, rows = len(model.get_input_embeddings().weight), torch.arange(count)
    ids = torch.randint(vocabulary, (count, 1), generator=generator)
    fluency = Fluency(model, count)
    for _ in range(length - 1):
        following = fluency.extend(rows, ids[:, -1])
        chosen = torch.multinomial(following[:, :vocabulary].exp(), 1, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
    return ids
