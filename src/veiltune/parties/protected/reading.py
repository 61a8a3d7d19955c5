"""A protected checkpoint's tensors as the host takes them: mapped from the disk, not read into memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from veiltune.errors import CheckpointError
from veiltune.parties.protected.manifest import AGAIN, Manifest, check_shard


def map_tensors(directory: Path, manifest: Manifest, *, verify: bool = True) -> dict[str, Tensor]:
    """Every tensor of a protected checkpoint, by the names of the host's trunk.

    They are views of the mapped files: pages come as they are used, and processes of one machine share them.

    Args:
        directory: of the protected checkpoint.
        manifest: its own.
        verify: compare every shard with its digest first, which reads all of it once.

    Raises:
        CheckpointError: a shard is missing, or not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for shard in manifest.shards:
        if verify:
            check_shard(directory, shard)
        try:
            tensors |= load_file(directory / shard.file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"shard {shard.file!r} cannot be read: {type(error).__name__}", hint=AGAIN) from None
    return tensors
