"""A model in a sealed container (``sealed:PATH``), read as a folder is, with no plain weights on any disk.

One tensor is decrypted when it is asked for, in memory. Configuration and tokenizer are written to a private temporary
directory for as long as `transformers` reads them: they are no secret, for the provider hands both to the owner.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.errors import ModelError
from veiltune.models.checkpoint import INDEX, Checkpoint, TensorInfo, shard_names
from veiltune.models.skeleton import empty_model
from veiltune.tee.container.reading import Container
from veiltune.tee.container.ring import SEALED, open_sealed

PURPOSE = "model"
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class SealedCheckpoint(Checkpoint):
    """A checkpoint whose files are in an open container; ``directory`` is the container's place, and no folder.

    Attributes:
        container: open for as long as something holds it.
    """

    container: Container = field(kw_only=True)

    @cached_property
    def index(self) -> dict[str, TensorInfo]:
        """See `Checkpoint.index`: from the sealed index alone, no tensor is opened."""
        return {
            name: TensorInfo(entry.shape, entry.dtype, entry.num_bytes, self.directory)
            for shard in self._shards
            for name, entry in self.container.tensors_of(shard).items()
        }

    @cached_property
    def _shards(self) -> list[str]:
        index = _json_object(self.read_file(INDEX), self.source) if self.has_file(INDEX) else None
        names = shard_names(index, self.source)
        for name in names:
            if not self.has_file(name):
                raise ModelError(f"{self.source!r} lacks {name}", hint="seal the whole model again")
        return names

    def has_file(self, name: str) -> bool:
        """Whether the container holds a file of that name."""
        return name in self.container.files

    def read_file(self, name: str) -> bytes:
        """A small file of the container."""
        return self.container.read(name)

    @contextmanager
    def small_files(self) -> Generator[Path, None, None]:
        """See `Checkpoint.small_files`. Files of weights are left out."""
        with tempfile.TemporaryDirectory(prefix="veiltune-") as made:  # mode 700
            for name in self.container.files:
                if not name.endswith(".safetensors"):
                    (Path(made) / name).write_bytes(self.read_file(name))
            yield Path(made)

    def shard_digests(self) -> list[tuple[str, str]]:
        """See `Checkpoint.shard_digests`: of the plain files, so that sealing a model leaves its fingerprint what it was."""
        return [(name, self._digest(name)) for name in self._shards]

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in self.container.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def stored(self, name: str) -> Tensor:
        """See `Checkpoint.stored`.

        Raises:
            CheckpointError: it was altered.
        """
        return self.container.tensor(name)

    def _load_whole(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        from transformers import GenerationConfig

        kind: Any = type(empty_model(self.config))  # the "auto" class wants a folder
        tensors = {name: self.stored(name) for name in self.index}
        model, report = kind.from_pretrained(None, config=self.config, state_dict=tensors, **options)
        if self.has_file(_GENERATION):
            with self.small_files() as directory:
                model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        return model, report


def open_sealed_checkpoint(
    source: str, *, dtype: torch.dtype | None = None, cache_dir: Path | None = None
) -> SealedCheckpoint:
    """The checkpoint in a container, after a look at what is there.

    Args:
        source: ``sealed:PATH``.
        dtype: see `Checkpoint`.
        cache_dir: see `Checkpoint`.

    Raises:
        ModelError: what is sealed there is no model.
        ConfigError: this party has no key.
        CheckpointError: the container does not open.
    """
    path = Path(source.removeprefix(SEALED)).expanduser()
    checkpoint = SealedCheckpoint(source, path, dtype, cache_dir, container=open_sealed(source, purpose=PURPOSE))
    if not checkpoint.container.directory or not checkpoint.has_file("config.json"):
        raise ModelError(f"{source!r} holds no model", hint="seal a folder with config.json and safetensors")
    if "model_type" not in _json_object(checkpoint.read_file("config.json"), source):
        raise ModelError(
            f"config.json of {source!r} names no model_type", hint="seal a folder saved by save_pretrained"
        )
    if not checkpoint.index:
        raise ModelError(f"{source!r} holds no tensors", hint="seal the whole model again")
    return checkpoint


def _json_object(content: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ModelError(f"{source!r} holds JSON that is no object", hint="fetch the model and seal it again")
    return value
