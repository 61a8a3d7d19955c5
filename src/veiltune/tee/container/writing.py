"""Sealing: from plain files to a container, a chunk at a time."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from veiltune.errors import CheckpointError, ModelError
from veiltune.tee.container.files import already_there, cannot_write, whole_file
from veiltune.tee.container.keys import DataKey
from veiltune.tee.container.layout import MAX_INDEX_BYTES, EntryCipher, Prologue
from veiltune.tee.container.plain import Plan, plan_source, read_entries
from veiltune.tee.container.wrapping import Binding, Sealee, make_slots

Progress = Callable[[int, int], None]
"""Told of plain bytes done and in all."""


class Sealed(NamedTuple):
    """What became of a source.

    Attributes:
        path: the container.
        files: names of what it holds.
        left_out: names in the source's directory that are no part of it.
        num_tensors: tensors that can be opened one by one.
        plain_bytes: size of the source.
        num_bytes: size of the container.
    """

    path: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    num_tensors: int
    plain_bytes: int
    num_bytes: int


def seal(
    source: Path,
    target: Path,
    recipients: Sequence[Sealee],
    progress: Progress | None = None,
    *,
    purpose: str = "model",
    overwrite: bool = False,
) -> Sealed:
    """Seal a model's directory, or a file, under a fresh key. Memory holds a chunk, whatever the size.

    Args:
        source: a directory with safetensors (see `plain.MODEL_FILES` for what else is taken), or one file of any kind.
        target: the container, which appears there whole or not at all, readable by its owner alone.
        recipients: who can open it: public keys, or a local sealing key; 1 to 15.
        progress: told of plain bytes done and in all.
        purpose: what the key is for; whoever opens it states the same.
        overwrite: take the place of a file that is there.

    Raises:
        ModelError: the source is no model, or a damaged one.
        DataError: the source is not there, cannot be read, or changed meanwhile.
        ConfigError: no recipients, an invalid one, or the target is taken.
        CheckpointError: the disk is full, or refuses.
    """
    if target.exists() and not (overwrite and target.is_file()):
        raise already_there(target)
    plan = plan_source(source)
    key = DataKey.generate()
    head = _make_head(plan, key, list(recipients), purpose)
    num_bytes = len(head.encoded) + plan.index.stored_bytes()
    _require_room(target, num_bytes)
    with whole_file(target, replace=overwrite) as file:
        file.write(head.encoded)
        _write_entries(file, plan, key, head.prologue, progress)
    num_tensors = sum(len(each.tensors) for each in plan.index.files)
    return Sealed(target, tuple(plan.paths), plan.left_out, num_tensors, plan.num_bytes, num_bytes)


class _Head(NamedTuple):
    """All that stands before the entries, and its first part by itself."""

    encoded: bytes
    prologue: Prologue


def _make_head(plan: Plan, key: DataKey, recipients: list[Sealee], purpose: str) -> _Head:
    prologue = Prologue.fresh(key)
    index = plan.index.seal(key, prologue)
    if len(index) > MAX_INDEX_BYTES:
        raise ModelError(f"the names of all tensors take {len(index)} bytes", hint=f"at most {MAX_INDEX_BYTES}")
    prologue = dataclasses.replace(prologue, index_bytes=len(index))
    return _Head(prologue.encode() + make_slots(key, recipients, Binding(prologue, purpose)) + index, prologue)


def _write_entries(file: BinaryIO, plan: Plan, key: DataKey, prologue: Prologue, progress: Progress | None) -> None:
    done = 0
    for name, group in groupby(plan.index.entries(), key=lambda pair: pair[0].name):
        entries = [entry for _, entry in group]
        plain: Iterator[Iterator[bytes]] = read_entries(plan.paths[name], [entry.num_bytes for entry in entries])
        for number, chunks in enumerate(plain):
            cipher = EntryCipher(key, prologue, entries[number])
            for chunk, content in enumerate(chunks):
                file.write(cipher.encrypt(chunk, content))
                done += len(content)
                if progress is not None:
                    progress(done, plan.num_bytes)


def _require_room(target: Path, num_bytes: int) -> None:
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise cannot_write(target, error) from None
    if free < num_bytes:
        raise CheckpointError(
            f"{str(target)!r} needs {num_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free",
            hint="make room, or choose another place",
        )
