"""Veiltune's own cache: where derived files live, how one is built exactly once, and remembered file digests.

Layout under the root (``$VEILTUNE_CACHE``, else ``~/.cache/veiltune``)::

    gguf/KEY/       safetensors converted from a GGUF file
    random/KEY/     generated checkpoints
    packages/KEY/   files of distributions that were fetched, never installed
    tasks/          task files and data tables written for lm-evaluation-harness
    digests/        sha256 of large files, keyed by path, size and modification time

The root is readable by its owner only: it holds model weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from veiltune.errors import ModelError


def cache_root(cache_dir: Path | None = None) -> Path:
    """The cache's root, created if absent: ``cache_dir``, else ``$VEILTUNE_CACHE``, else ``~/.cache/veiltune``.

    Raises:
        ModelError: it cannot be created.
    """
    root = cache_dir or Path(os.environ.get("VEILTUNE_CACHE") or Path.home() / ".cache" / "veiltune")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"the cache directory {str(root)!r} cannot be created: {error.strerror}",
            hint="set VEILTUNE_CACHE to a directory you may write to",
        ) from None
    return root


def cache_key(*parts: object) -> str:
    """A file name for what ``parts`` (JSON values) determine: 24 hexadecimal digits of their sha256."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Make the directory ``target`` by ``build(empty_directory)`` unless it is there, and return it.

    Atomic: ``build`` fills a sibling that is renamed at the end, so a half-built directory is never seen. Processes
        that want
    the same target wait for the one that builds it.
    """
    if target.is_dir():
        return target
    from filelock import FileLock

    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(target.parent / f"{target.name}.lock"):
        if target.is_dir():
            return target
        for stale in target.parent.glob(f".building-{target.name}-*"):  # left by a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".building-{target.name}-", dir=target.parent))
        try:
            build(scratch)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return target


def require_free_disk(directory: Path, num_bytes: int, purpose: str) -> None:
    """Raise ModelError if the file system of ``directory`` has less than ``num_bytes`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ModelError(
            f"{purpose} needs {num_bytes / 1e9:.1f} GB on disk, {free / 1e9:.1f} GB are free",
            hint="free some space, or set VEILTUNE_CACHE to a larger disk",
        )


def file_sha256(path: Path, root: Path) -> str:
    """The sha256 of a file (hexadecimal), remembered under ``root`` until its size or modification time changes."""
    status = path.stat()
    stamp = {"path": str(path.resolve()), "size": status.st_size, "modified": status.st_mtime_ns}
    memory = root / "digests" / f"{cache_key(stamp['path'])}.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: compute it again
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    _write_quietly(memory, json.dumps({"stamp": stamp, "sha256": digest}))
    return digest


def _write_quietly(path: Path, text: str) -> None:
    """Write a memo atomically; a cache that cannot be written costs time, not correctness."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
            stream.write(text)
        Path(stream.name).replace(path)
    except OSError:
        return
