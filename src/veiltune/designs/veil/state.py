"""The enclave's sealed state, bound to the provider's weights: what was trained on one checkpoint is not resumed on another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from veiltune.checkpoints import StateStore
from veiltune.errors import CheckpointError

_WEIGHTS = "weights"


class WeightsStore(StateStore):
    """A `StateStore` that keeps the weights' fingerprint in every file, and asks for it again. See `bind`."""

    weights: str = ""

    @classmethod
    def bind(cls, store: StateStore, weights: str) -> Self:
        """``store`` for weights with this fingerprint."""
        bound = cls(store.directory, store.fingerprint, store.key)
        bound.weights = weights
        return bound

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """See `StateStore.save`."""
        stamp = torch.frombuffer(bytearray(self.weights.encode()), dtype=torch.uint8)
        super().save(step, {**tensors, _WEIGHTS: stamp})

    def load(self, step: int) -> dict[str, Tensor]:
        """See `StateStore.load`.

        Raises:
            CheckpointError: besides, the state is of other weights.
        """
        tensors = super().load(step)
        found = bytes(tensors.pop(_WEIGHTS).tolist()).decode()
        if found != self.weights:
            raise CheckpointError(
                f"the run was begun with the weights {found[:16]}…, the provider has {self.weights[:16]}…",
                hint="resume with the checkpoint it began with, or start anew with --overwrite",
            )
        return tensors
