"""The manifest of a protected checkpoint: what it was made of, its shards, and whether it is whole.

``manifest.json`` is written anew after every shard, whole or not at all, with ``"complete": false``; and once more, last of all,
with ``true``. It holds nothing that depends on when or where it was made, so a resumed one ends with the same bytes.

*Reveals.* All of it is public: architecture, fingerprint of the source, which blocks are the trunk, digests of what the host has.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from pydantic import Field, ValidationError

from veiltune.config import Section
from veiltune.errors import CheckpointError
from veiltune.results import write_json
from veiltune.tee.container.files import cannot_write as refused

MANIFEST: Final = "manifest.json"
VERSION: Final = 1
AGAIN: Final = "make it again: veiltune protect … --overwrite"


class Shard(Section):
    """One file of a protected checkpoint.

    Attributes:
        file: its name.
        sha256: of its bytes, hexadecimal.
        num_bytes: its size.
    """

    file: str = Field(pattern=r"^[\w-]+\.safetensors$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: int = Field(gt=0)


class Manifest(Section):
    """See the module.

    Attributes:
        version: of this format.
        design: whose host it is for.
        options: of the design, as far as the tensors depend on them.
        identity: 32 hexadecimal digits drawn when it was begun: which key is its own. Public.
        fingerprint: of the source checkpoint, see `Checkpoint.fingerprint`.
        dtype: every tensor was cast to it before it was protected; ``None``: each is as it was stored.
        config: the source's ``config.json``.
        shards: what has been written.
        complete: nothing is missing.
    """

    version: int = VERSION
    design: str
    options: dict[str, Any]
    identity: str
    fingerprint: str
    dtype: str | None
    config: dict[str, Any]
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def with_shards(self, shards: tuple[Shard, ...], *, complete: bool = False) -> Manifest:
        """The same with other shards."""
        return self.model_copy(update={"shards": shards, "complete": complete})

    def digest(self) -> str:
        """The sha256 (hexadecimal) of what it says."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Put it in its place, whole or not at all.

        Raises:
            CheckpointError: the disk is full, or refuses.
        """
        try:
            write_json(directory / MANIFEST, self.model_dump(mode="json"))
        except OSError as error:
            raise cannot_write(directory / MANIFEST, error) from None


def read_manifest(directory: Path, *, partial: bool = False) -> Manifest:
    """The manifest of a protected checkpoint.

    Args:
        directory: of the protected checkpoint.
        partial: take one that was not completed.

    Raises:
        CheckpointError: there is none, it is damaged, of another version, or of a checkpoint that was not completed.
    """
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(directory)!r} is no protected checkpoint: it has no {MANIFEST}", hint="make one: veiltune protect"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {type(error).__name__}", hint=AGAIN) from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != VERSION:
        raise CheckpointError(f"{str(path)!r} has version {version!r}, not {VERSION}", hint=AGAIN)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{str(path)!r} is damaged at {where!r}", hint=AGAIN) from None
    if not (manifest.complete or partial):
        raise CheckpointError(
            f"the protected checkpoint {str(directory)!r} is half-written: {len(manifest.shards)} shards are there",
            hint="run the same veiltune protect again, which goes on where it stopped",
        )
    return manifest


def check_shard(directory: Path, shard: Shard) -> None:
    """Compare a shard with what the manifest says of it.

    Raises:
        CheckpointError: it is missing, or not what was written.
    """
    path = directory / shard.file
    try:
        size = path.stat().st_size
        found = _sha256(path) if size == shard.num_bytes else None
    except OSError as error:
        raise CheckpointError(f"shard {str(path)!r} cannot be read: {error.strerror}", hint=AGAIN) from None
    if found != shard.sha256:
        raise CheckpointError(
            f"shard {str(path)!r} is not what was written: it was altered or cut",
            hint="use an intact copy, or " + AGAIN,
        )


def describe_shard(path: Path) -> Shard:
    """What the manifest has to say of a file that was just written."""
    return Shard(file=path.name, sha256=_sha256(path), num_bytes=path.stat().st_size)


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """The error for a disk that is full, or refuses; what is there already need not be made again."""
    return refused(path, error, hint="make room; then the same command goes on where it stopped")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
