"""What the model itself thinks likely to follow: a prior for whoever guesses text, and one that a provider has for nothing."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    def extend(self, parents: Int[Tensor, " n"], tokens: Int[Tensor, " n"]) -> None:
        """Each prefix becomes that of ``parents`` with one more token."""
        if self._length:
            self._cache.batch_select_indices(parents)
        position = torch.full((len(tokens), 1), self._length)
        logits = self._model(
            input_ids=tokens[:, None], position_ids=position, past_key_values=self._cache, use_cache=True
        ).logits[:, -1]
        self._length += 1
        self.next = logits.float().log_softmax(-1)
