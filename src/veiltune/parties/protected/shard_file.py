"""A safetensors file written tensor by tensor, in whatever order they come: the library's own writer wants all at once.

The format: eight bytes of the header's length (little-endian), a JSON header with each tensor's dtype, shape and place, then the
tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from veiltune.errors import CheckpointError
from veiltune.parties.protected.manifest import cannot_write

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of every tensor of a file, by name."""


def layout_bytes(layout: Layout) -> int:
    """Size of the tensors of a file."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def write_shard(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write ``tensors``, one at a time, into ``path``; it appears whole or not at all, a file there before is replaced.

    Raises:
        CheckpointError: the disk is full or refuses; a tensor is not as the layout says, or did not come.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        _write(partial, layout, tensors)
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    places: dict[str, int] = {}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        places[name], end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for name, value in tensors:
            if name not in places or layout[name] != (value.dtype, tuple(value.shape)):
                raise CheckpointError(f"tensor {name!r} is {value.dtype} {tuple(value.shape)}, not as laid out")
            file.seek(begin + places.pop(name))
            file.write(value.contiguous().view(torch.uint8).reshape(-1).numpy().data)
        if places:
            raise CheckpointError(f"tensor {next(iter(places))!r} did not come")
        file.flush()
        os.fsync(file.fileno())
