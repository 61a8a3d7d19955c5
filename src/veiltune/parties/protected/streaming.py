"""From a checkpoint to a protected one, tensor by tensor: no more than one tensor's arithmetic is in memory at a time.

One file a block, each of which appears whole and is then entered in the manifest; so what was interrupted goes on after the last
whole block, under the same key. What is in the key's file is all that going on needs.

*Bound.* Resident memory is a constant (the interpreter, the stream's key) and a few float64 copies of the largest tensor.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from veiltune.errors import CheckpointError, ConfigError, ModelError
from veiltune.models.accounting import stored_parameters
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.families import find_family
from veiltune.models.skeleton import DTYPES, empty_model
from veiltune.parties.protected.key import ProtectionKey, open_key
from veiltune.parties.protected.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    check_shard,
    describe_shard,
    read_manifest,
)
from veiltune.parties.protected.shard_file import DTYPES as STORED_DTYPES
from veiltune.parties.protected.shard_file import Layout, layout_bytes, write_shard
from veiltune.parties.weights import canonical_names, read_group, shards
from veiltune.secrets import MasterSecret

Report = Callable[[str, dict[str, Any]], None]


class Protector(Protocol):
    """What a design does to a host's tensors, as far as streaming knows it."""

    def layout(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Every tensor the host is to hold, by its name: the plain tensor that it is made of, and its shape."""
        ...

    def protect(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A plain tensor of the trunk as the host may have it: under its own name, another, or not at all."""
        ...

    def done(self, block: int) -> None:
        """No more tensors of this block will come."""
        ...


@dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
        design: name of the design.
        options: what its host's tensors depend on.
        make: the design's way, given the master secret.
        dtype: cast tensors to it first, a name of `models.skeleton.DTYPES`; ``None``: each as it is stored.
    """

    design: str
    options: dict[str, Any]
    make: Callable[[MasterSecret], Protector]
    dtype: str | None = None


def protect(
    checkpoint: Checkpoint,
    plan: Plan,
    directory: Path,
    key_path: Path,
    *,
    overwrite: bool = False,
    report: Report = lambda _event, _fields: None,
) -> Manifest:
    """Write the protected checkpoint into ``directory`` and its key into ``key_path``, or go on with what is there.

    Args:
        checkpoint: the provider's.
        plan: under which design, and how.
        directory: of the host; new, empty, or of an unfinished protection of the same.
        key_path: of the enclave; outside ``directory``.
        overwrite: begin anew with a fresh key, whatever protected checkpoint is there.
        report: told of progress, in events as `display.Display` takes them.

    Raises:
        ModelError: a tensor that is missing, unexpected, of another shape or kind, or not finite; or the model is quantised.
        CheckpointError: the directory holds something else, its key is not there, or the disk is full.
        ConfigError: the key would lie where the host can read it.
    """
    from filelock import FileLock, Timeout

    if key_path.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(
            f"the key {str(key_path)!r} would lie in the host's directory", hint="give a --key outside --to"
        )
    checkpoint = dataclasses.replace(checkpoint, dtype=None if plan.dtype is None else DTYPES[plan.dtype])
    check_source(checkpoint)
    key_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(f"{key_path}.lock", timeout=0):
            if overwrite:
                _clear(directory, key_path)
            begun, key = _begin(checkpoint, plan, directory, key_path)
            return _Run(checkpoint, plan.make(key.master), directory, report).finish(begun, key, key_path)
    except Timeout:
        raise CheckpointError(
            f"another process is writing {str(directory)!r}", hint="wait for it, or give another --to"
        ) from None


def check_source(checkpoint: Checkpoint) -> None:
    """See from the headers that every tensor is there, none besides, and each as the architecture wants it.

    Raises:
        ModelError: see `protect`.
    """
    if "quantization_config" in checkpoint.config.to_dict():
        raise ModelError(f"{checkpoint.source!r} is quantised", hint="protect the model in its full precision")
    names = canonical_names(checkpoint)
    for name, parameter in stored_parameters(empty_model(checkpoint.config)):
        if name not in names:
            raise ModelError(
                f"{checkpoint.source!r} lacks {name!r}", hint="the checkpoint is incomplete; fetch it again"
            )
        info = checkpoint.index[names[name]]
        if info.shape != tuple(parameter.shape):
            raise ModelError(
                f"tensor {name!r} has shape {info.shape}, the architecture wants {tuple(parameter.shape)}",
                hint="check the checkpoint's config.json",
            )
        if info.dtype not in STORED_DTYPES:
            raise ModelError(
                f"tensor {name!r} is stored as {info.dtype}", hint=f"only {', '.join(STORED_DTYPES)} can be protected"
            )


def _clear(directory: Path, key_path: Path) -> None:
    """Remove an earlier protected checkpoint, and nothing else."""
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / MANIFEST).is_file():
            raise CheckpointError(
                f"{str(directory)!r} is no protected checkpoint, so it will not be overwritten",
                hint="give another --to",
            )
        shutil.rmtree(directory)
    key_path.unlink(missing_ok=True)


def _begin(checkpoint: Checkpoint, plan: Plan, directory: Path, key_path: Path) -> tuple[Manifest, ProtectionKey]:
    """The manifest and the key to go on with; both fresh where there is nothing yet.

    The key is written first: a manifest without a key could not be gone on with.
    """
    config = json.loads(checkpoint.read_file("config.json"))
    fresh = Manifest(
        design=plan.design,
        options=plan.options,
        identity=secrets.token_hex(16),
        fingerprint=checkpoint.fingerprint,
        dtype=plan.dtype,
        config=config,
    )
    if (directory / MANIFEST).exists():
        return _resume(fresh, directory, key_path)
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"the directory {str(directory)!r} is not empty", hint="give another --to")
    if key_path.exists():
        raise CheckpointError(
            f"there is a key {str(key_path)!r} already, perhaps another checkpoint's", hint="give another --key"
        )
    key = ProtectionKey(MasterSecret.generate(), fresh.fingerprint, fresh.identity)
    key.save(key_path)
    directory.mkdir(parents=True, exist_ok=True)
    fresh.write(directory)
    return fresh, key


def _resume(fresh: Manifest, directory: Path, key_path: Path) -> tuple[Manifest, ProtectionKey]:
    begun = read_manifest(directory, partial=True)
    for what in ("fingerprint", "design", "options", "dtype"):
        if getattr(begun, what) != getattr(fresh, what):
            raise CheckpointError(
                f"{str(directory)!r} was begun with {what} {getattr(begun, what)!r}, not {getattr(fresh, what)!r}",
                hint="give another --to, or --overwrite",
            )
    key = open_key(key_path)
    key.require_manifest(begun)
    return begun, key


class _Run:
    """One run over the blocks."""

    def __init__(self, checkpoint: Checkpoint, protector: Protector, directory: Path, report: Report) -> None:
        self.checkpoint = checkpoint
        self.protector = protector
        self.directory = directory
        self.report = report
        made_of: dict[str, dict[str, tuple[int, ...]]] = {}
        for host_name, (plain_name, shape) in protector.layout().items():
            made_of.setdefault(plain_name, {})[host_name] = shape
        self._made_of = made_of
        self._blocks: dict[int, dict[str, str]] = {}
        for block, group in shards(checkpoint, find_family(checkpoint.config)):
            self._blocks.setdefault(block, {}).update(group)
        self._is_trunk = {block: any(name in made_of for name in group) for block, group in self._blocks.items()}

    def finish(self, begun: Manifest, key: ProtectionKey, key_path: Path) -> Manifest:
        """Make what is missing, then complete key and manifest, in this order."""
        found = {shard.file: shard for shard in begun.shards}
        self._check_rest()
        layouts = {block: self._layout(group) for block, group in self._blocks.items() if self._is_trunk[block]}
        self._require_room(sum(layout_bytes(each) for block, each in layouts.items() if _file(block) not in found))
        done: list[Shard] = []
        for number, (block, layout) in enumerate(layouts.items(), start=1):
            file = _file(block)
            if not self._is_whole(found.get(file)):
                write_shard(self.directory / file, layout, self._tensors(block))
                found[file] = describe_shard(self.directory / file)
                begun.with_shards((*done, *_others(found, done))).write(self.directory)
            self.protector.done(block - 1)
            done.append(found[file])
            self.report("protected", {"block": number, "num_blocks": len(layouts)})
        complete = begun.with_shards(tuple(done), complete=True)
        key.manifest = complete.digest()
        key.save(key_path)
        complete.write(self.directory)
        return complete

    def _check_rest(self) -> None:
        """What stays in the enclave is no part of the output, but it has to be fit for use."""
        for block, group in self._blocks.items():
            if not self._is_trunk[block]:
                for name, stored in group.items():
                    read_group(self.checkpoint, {name: stored})

    def _layout(self, group: Mapping[str, str]) -> Layout:
        def dtype(stored: str) -> torch.dtype:
            return self.checkpoint.dtype or STORED_DTYPES[self.checkpoint.index[stored].dtype]

        return {
            host_name: (dtype(stored), shape)
            for name, stored in group.items()
            for host_name, shape in self._made_of.get(name, {}).items()
        }

    def _tensors(self, block: int) -> Iterator[tuple[str, Tensor]]:
        for name, stored in self._blocks[block].items():
            value = read_group(self.checkpoint, {name: stored})[name]
            yield from self.protector.protect(name, value).items()

    def _is_whole(self, shard: Shard | None) -> bool:
        if shard is None:
            return False
        try:
            check_shard(self.directory, shard)
        except CheckpointError:
            return False
        return True

    def _require_room(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < num_bytes:
            raise CheckpointError(
                f"{str(self.directory)!r} needs {num_bytes / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free",
                hint="make room; then the same command goes on where it stopped",
            )


def _file(block: int) -> str:
    return f"block-{block:05d}.safetensors"


def _others(found: Mapping[str, Shard], done: list[Shard]) -> list[Shard]:
    """Shards in the manifest that this run has not come to yet: they stay there."""
    return [shard for shard in found.values() if shard not in done]
