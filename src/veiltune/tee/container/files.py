"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from veiltune.errors import CheckpointError, ConfigError
from veiltune.tee.sealing import sync_directory


@contextmanager
def whole_file(path: Path, *, replace: bool) -> Generator[BinaryIO, None, None]:
    """A file to write, mode 600, which takes its place at ``path`` when the block ends well, and goes when it does not.

    Only after kill -9 or a power cut may something remain: ``.NAME.….partial`` beside the place, never ``path`` itself.

    Args:
        path: where it will be.
        replace: take the place of a file that is there.

    Raises:
        CheckpointError: the disk is full, or refuses (any OSError of the block counts as that).
        ConfigError: a file is there, and ``replace`` is false.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
        sync_directory(path.parent)
    except FileExistsError:
        raise already_there(path) from None
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def already_there(path: Path) -> ConfigError:
    """The error for a place that is taken."""
    return ConfigError(f"{str(path)!r} is there already", hint="choose another place, or remove it first")


def cannot_write(path: Path, error: OSError, hint: str = "make room, or choose another place") -> CheckpointError:
    """The error for a disk that is full, or refuses."""
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return CheckpointError(f"cannot write {str(path)!r}: {reason}", hint=hint)
