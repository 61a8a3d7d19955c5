"""Unsealing: from a container back to plain files, for the recipient who wants them so."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from veiltune.errors import ConfigError, nearest
from veiltune.tee.container.files import already_there, cannot_write, whole_file
from veiltune.tee.container.reading import Container, open_container
from veiltune.tee.container.wrapping import Opener
from veiltune.tee.container.writing import Progress


def unseal(
    path: Path,
    key: Opener,
    target: Path,
    progress: Progress | None = None,
    *,
    purpose: str = "model",
    only: Collection[str] | None = None,
) -> tuple[str, ...]:
    """Turn a container back into the files it was made of, to the byte. Returns their names.

    Args:
        path: the container.
        key: of one of its recipients, or the data key itself.
        target: a directory for a model, a file for a file; appears whole or not at all, readable by its owner alone.
        progress: told of plain bytes done and in all.
        purpose: as it was sealed for.
        only: names of files; all by default.

    Raises:
        CheckpointError: it does not open (see `open_container`), something in it was altered, or the disk is full.
        ConfigError: the target is taken.
    """
    if target.exists():
        raise already_there(target)
    with open_container(path, key, purpose=purpose) as container:
        names = tuple(container.files) if only is None else tuple(only)
        for name in names:
            if name not in container.files:
                raise ConfigError(f"{path} has no file {name!r}", hint=nearest(name, container.files))
        counted = _Counter(sum(container.files[name] for name in names), progress)
        if not container.directory:
            _write(container, names[0], target, counted)
            return names
        _write_directory(container, names, target, counted)
    return names


class _Counter:
    """Counts bytes for a progress."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._done = 0
        self._progress = progress

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _write_directory(container: Container, names: tuple[str, ...], target: Path, counted: _Counter) -> None:
    try:
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))  # mode 700
    except OSError as error:
        raise cannot_write(target, error) from None
    try:
        for name in names:
            _write(container, name, partial / name, counted)
        partial.rename(target)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(container: Container, name: str, path: Path, counted: _Counter) -> None:
    with whole_file(path, replace=False) as file:
        for chunk in container.chunks(name):
            file.write(chunk)
            counted.add(len(chunk))
