"""What is sealed: a model's directory or a single file, and how it is cut into entries before it is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, NamedTuple

from veiltune.errors import DataError, ModelError
from veiltune.tee.container.layout import FileEntry, Index, TensorEntry, is_plain_name, num_chunks
from veiltune.tee.sealing import CHUNK_BYTES

MODEL_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""What is taken of a model's directory; no pickles, no code, no sub-directories."""
_MAX_HEADER_BYTES: Final = 32 << 20  # so that an index of it stays below its own limit


class Plan(NamedTuple):
    """What will be sealed.

    Attributes:
        index: files and tensors.
        paths: where each of the index's files is.
        left_out: names of a directory that are no part of it.
    """

    index: Index
    paths: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.num_bytes for file in self.index.files)


def plan_source(source: Path) -> Plan:
    """Look at a directory or a file, reading no more than the headers of safetensors.

    Raises:
        ModelError: a directory without safetensors, or one of them is damaged, or two have a tensor of one name.
        DataError: there is no such file, or it cannot be read.
    """
    try:
        if source.is_dir():
            found = {path.name: path for path in sorted(source.iterdir())}
            paths = {name: path for name, path in found.items() if path.is_file() and _is_model_file(name)}
        elif source.is_file():
            found = paths = {source.name: source}
        else:
            raise DataError(f"there is no file or directory {str(source)!r}", hint="give a model's directory or a file")
        if source.is_dir() and not any(name.endswith(".safetensors") for name in paths):
            raise ModelError(f"{str(source)!r} has no safetensors", hint="a model's directory needs model*.safetensors")
        files = tuple(_describe(path) for path in paths.values())
    except OSError as error:
        raise cannot_read(source, error) from None
    _refuse_twice(files)
    return Plan(
        Index(directory=source.is_dir(), files=files), paths, tuple(name for name in found if name not in paths)
    )


def read_entries(path: Path, sizes: list[int]) -> Iterator[Iterator[bytes]]:
    """The plain chunks of each entry of a file, whose sizes are known; each must be read to its end.

    Raises:
        DataError: it cannot be read, or has another size by now.
    """
    try:
        with path.open("rb") as file:
            for size in sizes:
                yield _chunks(path, file, size)
            if file.read(1):
                raise _changed(path)
    except OSError as error:
        raise cannot_read(path, error) from None


def cannot_read(path: Path, error: OSError) -> DataError:
    """The error for what is there but cannot be read."""
    return DataError(f"cannot read {str(path)!r}: {error.strerror}", hint="check the file and its permissions")


def _chunks(path: Path, file: Any, size: int) -> Iterator[bytes]:
    for number in range(num_chunks(size)):
        wanted = min(CHUNK_BYTES, size - number * CHUNK_BYTES)
        try:
            chunk = file.read(wanted)
        except OSError as error:
            raise cannot_read(path, error) from None
        if len(chunk) < wanted:
            raise _changed(path)
        yield chunk


def _changed(path: Path) -> DataError:
    return DataError(f"{str(path)!r} changed while it was being sealed", hint="seal it when nobody writes to it")


def _is_model_file(name: str) -> bool:
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def _describe(path: Path) -> FileEntry:
    if not is_plain_name(path.name):
        raise DataError(f"the name {path.name!a} cannot be kept", hint="rename the file")
    size = path.stat().st_size
    if not path.name.endswith(".safetensors"):
        return FileEntry(name=path.name, head_bytes=size)
    try:
        head, tensors = _read_header(path, size)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{str(path)!r} is not a whole safetensors file", hint="fetch the model again") from None
    return FileEntry(name=path.name, head_bytes=head, tensors=tensors)


def _read_header(path: Path, size: int) -> tuple[int, tuple[TensorEntry, ...]]:
    """Where the tensors begin, and which they are, in the order of their bytes, which must fill the file.

    Raises:
        ValueError: something is not as safetensors has it (or struct.error, KeyError, TypeError, AttributeError).
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size, _MAX_HEADER_BYTES):
            raise ValueError("header too long")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 0
    tensors: list[TensorEntry] = []
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = said["data_offsets"]
        if begin != end:
            raise ValueError("a gap, or tensors that overlap")
        tensors.append(TensorEntry(name=name, dtype=said["dtype"], shape=said["shape"], num_bytes=stop - begin))
        end = stop
    if 8 + length + end != size:
        raise ValueError("cut, or too long")
    return 8 + length, tuple(tensors)


def _refuse_twice(files: tuple[FileEntry, ...]) -> None:
    """Raise ModelError if a tensor's name stands in two files, or cannot be printed."""
    of: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if not tensor.name.isprintable():
                raise ModelError(f"{file.name} has a tensor {tensor.name!a}", hint="do not use this checkpoint")
            if tensor.name in of:
                raise ModelError(
                    f"tensor {tensor.name!r} is in {of[tensor.name]} and in {file.name}",
                    hint="move the file that is no part of the model to another directory",
                )
            of[tensor.name] = file.name
