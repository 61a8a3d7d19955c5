"""The host's trunk on the enclave's own disk: what its answers are computed again with, in an enclave too small to hold it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import final

from torch import Tensor

from veiltune.secrets import Secret
from veiltune.tee.sealing import SealingKey, seal_file, unseal_file


@final
class SealedTrunk(Secret):
    """Tensors in the host's basis, block by block, under a key that only this session has.

    Args:
        directory: emptied.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = SealingKey.generate()
        self._parts: dict[int, int] = {}
        self.remove()

    def keep_by_block(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of any blocks; after ``prefix`` their names begin with the block's number."""
        blocks: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            blocks.setdefault(int(name.removeprefix(prefix).partition(".")[0]), {})[name] = value
        for block, values in blocks.items():
            self.keep(block, values)

    def keep(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write some tensors of a block."""
        self._directory.mkdir(parents=True, exist_ok=True)
        part = self._parts.get(block, 0)
        seal_file(self._path(block, part), tensors, {}, self._key, f"trunk/{block}/{part}")
        self._parts[block] = part + 1

    def read(self, block: int) -> dict[str, Tensor]:
        """All tensors of a block.

        Raises:
            CheckpointError: a file was altered or is gone.
        """
        found: dict[str, Tensor] = {}
        for part in range(self._parts.get(block, 0)):
            found |= unseal_file(self._path(block, part), self._key, f"trunk/{block}/{part}").tensors
        return found

    def _path(self, block: int, part: int) -> Path:
        return self._directory / f"block-{block}-{part}.sealed"

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._directory, ignore_errors=True)
