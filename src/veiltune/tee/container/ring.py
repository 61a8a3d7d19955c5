"""The keys that a party opens containers with: files named by the environment variable ``VEILTUNE_KEYS``.

It is a recipient's private key (``ROLE.recipient.key``), or a directory of some. So the key that opens a model is each
party's own, and no part of the configuration that the others see.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Final

from veiltune.errors import CheckpointError, ConfigError, DataError
from veiltune.secrets import Secret
from veiltune.tee.container.keys import RecipientKey, load_recipient_key
from veiltune.tee.container.reading import Container, open_container

KEYS: Final = "VEILTUNE_KEYS"
SEALED: Final = "sealed:"
"""Begins the source of a model or of data that is a sealed container."""
_ENDING: Final = ".recipient.key"


def own_keys() -> list[RecipientKey]:
    """This party's keys.

    Raises:
        ConfigError: none is named, or one of them is refused.
    """
    place = Path(os.environ.get(KEYS, "")).expanduser()
    paths = sorted(place.glob(f"*{_ENDING}")) if place.is_dir() else [place]
    if KEYS not in os.environ or not paths:
        found = f"{str(place)!r} holds no *{_ENDING}" if KEYS in os.environ else f"{KEYS} is not set"
        raise ConfigError(
            f"no key to open a sealed file with: {found}",
            hint=f"set {KEYS} to the recipient's private key, or to a directory of such keys",
        )
    return [load_recipient_key(path) for path in paths]


def open_sealed(source: str, *, purpose: str) -> Container:
    """The container that a source ``sealed:PATH`` names, opened with the first of this party's keys that does.

    Raises:
        ConfigError: there is no key.
        CheckpointError: missing, not a container, altered, or none of the keys opens it.
    """
    path = Path(source.removeprefix(SEALED)).expanduser()
    failures: list[CheckpointError] = []
    for key in own_keys():
        try:
            return open_container(path, key, purpose=purpose)
        except CheckpointError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    raise CheckpointError(
        f"none of {len(failures)} keys opens {str(path)!r}; the first: {failures[0].message}", hint=failures[0].hint
    )


class SealedFile(Secret):
    """The one file of a container, decrypted in memory, and read as a `Path` is. Use `open_sealed_file`."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self._content = content

    @property
    def suffix(self) -> str:
        """The ending of the file's own name."""
        return Path(self.name).suffix

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> Any:
        """As `Path.open`, for reading."""
        stream = io.BytesIO(self._content)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding=encoding, newline=newline)

    def _describe(self) -> str:
        return f"SealedFile {self.name}"


def open_sealed_file(source: str, *, purpose: str) -> SealedFile:
    """The file in the container that a source ``sealed:PATH`` names.

    Raises:
        ConfigError: there is no key.
        CheckpointError: see `open_sealed`.
        DataError: it holds a directory.
    """
    with open_sealed(source, purpose=purpose) as container:
        if container.directory:
            raise DataError(f"{source!r} holds {len(container.files)} files", hint="seal a single file of data")
        (name,) = container.files
        return SealedFile(name, container.read(name))
