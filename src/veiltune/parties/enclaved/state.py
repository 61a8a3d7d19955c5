"""The enclave's sealed state, bound to the provider's weights: what was trained on one checkpoint is not resumed on another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from veiltune.checkpoints import StateStore
from veiltune.errors import CheckpointError
from veiltune.tee.sealing import SealingKey

_WEIGHTS = "weights"


class WeightsStore(StateStore):
    """A `StateStore` that keeps the fingerprint ``weights`` in every file, and asks for it again."""

    def __init__(self, directory: Path, fingerprint: str, key: SealingKey, weights: str) -> None:
        super().__init__(directory, fingerprint, key)
        self.weights = weights

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
