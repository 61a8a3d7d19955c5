"""A model at rest: a folder with ``config.json`` and safetensors, read tensor by tensor, never as a whole unless asked.

Only safetensors are read. Older ``.bin`` and ``.pt`` files hold pickles, which run code when they are loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veiltune.errors import ModelError
from veiltune.models.cache import cache_root, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_VOLATILE_CONFIG_KEYS = {"_name_or_path", "_model_name_or_path", "transformers_version"}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor; ``dtype`` is the header's own name (``F32``, ``BF16``)."""

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    shard: Path


@dataclass(frozen=True)
class Checkpoint:
    """A model folder and how to read it.

    Args:
        source: what the user wrote.
        directory: the folder with ``config.json``, safetensors and (usually) a tokenizer.
        dtype: floating tensors are cast to it when read; ``None`` leaves them as stored.
        cache_dir: root of the cache that remembers file digests.

    Tied weights stand in the files once; :meth:`tensor_names` lists what the files hold.
    """

    source: str
    directory: Path
    dtype: torch.dtype | None = None
    cache_dir: Path | None = field(default=None, repr=False, compare=False)

    @cached_property
    def config(self) -> Any:
        """The `transformers` configuration. Code that comes with a checkpoint is never run.

        Raises:
            ModelError: `transformers` does not know the architecture.
        """
        from transformers import AutoConfig

        try:
            with self.small_files() as directory:
                return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except (ValueError, KeyError, OSError) as error:
            model_type = json.loads(self.read_file("config.json")).get("model_type")
            raise ModelError(
                f"the configuration of {self.source!r} (model_type {model_type!r}) is no use: {_first_line(error)}",
                hint="only architectures that transformers itself ships are supported",
            ) from None

    @cached_property
    def index(self) -> dict[str, TensorInfo]:
        """Every stored tensor's shape, dtype, size and shard, from the headers alone, in the order of the files."""
        return {
            name: info
            for shard in shard_paths(self.directory, self.source)
            for name, info in _read_header(shard).items()
        }

    def has_file(self, name: str) -> bool:
        """Whether the folder holds a file of that name."""
        return (self.directory / name).is_file()

    def read_file(self, name: str) -> bytes:
        """A small file of the folder: the configuration, or one of the tokenizer's."""
        return (self.directory / name).read_bytes()

    @contextmanager
    def small_files(self) -> Generator[Path, None, None]:
        """A directory for a while, in which everything but the weights stands in plain files, for libraries that want some."""
        yield self.directory

    def shard_digests(self) -> list[tuple[str, str]]:
        """Name and sha256 (hexadecimal) of each file of weights."""
        root = cache_root(self.cache_dir)
        return [(path.name, file_sha256(path, root)) for path in shard_paths(self.directory, self.source)]

    def stored(self, name: str) -> Tensor:
        """One tensor of :attr:`index`, as it is stored."""
        from safetensors import safe_open

        with safe_open(self.index[name].shard, framework="pt") as shard:
            return shard.get_tensor(name)

    def tensor_names(self) -> list[str]:
        """Names of the stored tensors, in the order of the files."""
        return list(self.index)

    @property
    def num_parameters(self) -> int:
        """Number of stored values, tied ones once."""
        return sum(math.prod(info.shape) for info in self.index.values())

    @property
    def num_bytes(self) -> int:
        """Size of the stored values in bytes, as stored."""
        return sum(info.num_bytes for info in self.index.values())

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Read tensors one at a time, in the order of ``names`` (all by default), cast to :attr:`dtype`.

        Each is a copy: the shard's mapping is closed before the tensor is handed out, so resident memory holds one
        tensor and not the pages of everything read so far.

        Raises:
            ModelError: the checkpoint has no tensor of that name.
        """
        for name in self.index if names is None else names:
            if name not in self.index:
                raise ModelError(
                    f"{self.source!r} has no tensor {name!r}", hint="the checkpoint is incomplete; fetch it again"
                )
            stored = self.stored(name)
            wanted = self.dtype if self.dtype is not None and stored.is_floating_point() else stored.dtype
            value = stored.to(wanted, copy=True)
            del stored
            yield name, value

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (hexadecimal) of what the model is: configuration, tensor names, shapes, dtypes and contents.

        It does not depend on where the folder lies nor on the `transformers` version that wrote it.
        """
        values = json.loads(self.read_file("config.json"))
        content = {
            "config": {key: value for key, value in values.items() if key not in _VOLATILE_CONFIG_KEYS},
            "tensors": [[name, info.dtype, list(info.shape)] for name, info in self.index.items()],
            "files": self.shard_digests(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load_tokenizer(self) -> Any:
        """The tokenizer of the folder, see `load_tokenizer`."""
        with self.small_files() as directory:
            return load_tokenizer(directory, self.source)

    def load_plain(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole model in memory, in ``dtype`` (else :attr:`dtype`, else float32), with torch's attention kernel.

        Raises:
            ModelError: the files do not fit the configuration.
        """
        wanted = dtype or self.dtype or torch.float32
        try:
            with quiet_transformers():
                model, report = self._load_whole(dtype=wanted, attn_implementation="sdpa", output_loading_info=True)
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise ModelError(
                f"{self.source!r} cannot be loaded: {_first_line(error)}", hint="check its config.json"
            ) from None
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would fill them with noise and go on
            raise ModelError(
                f"{self.source!r} lacks the tensor {missing[0]!r}", hint="the checkpoint is incomplete; fetch it again"
            )
        return model.eval()

    def _load_whole(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The model and `transformers`' report of what was missing."""
        from transformers import AutoModelForCausalLM

        local = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
        return AutoModelForCausalLM.from_pretrained(self.directory, **local, **options)


def load_tokenizer(directory: Path, source: str) -> Any:
    """The tokenizer of a model folder; it always has an end and a padding token. ``source`` is what errors call it.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would build an empty tokenizer from the configuration's class and say nothing
        raise ModelError(
            f"{source!r} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}",
            hint="put the model's tokenizer.json and tokenizer_config.json beside its config.json",
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(
            f"the tokenizer of {source!r} cannot be loaded: {_first_line(error)}", hint="fetch the model again"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source!r} has no end-of-sequence token",
            hint="set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_checkpoint(
    source: str, directory: Path, *, dtype: torch.dtype | None = None, cache_dir: Path | None = None
) -> Checkpoint:
    """The checkpoint in ``directory``, after a look at what is there.

    Raises:
        ModelError: no folder, no usable ``config.json``, or no safetensors.
    """
    if not directory.is_dir():
        raise ModelError(f"{source!r} is not a directory", hint="give a folder with config.json and safetensors")
    config = _read_json(directory / "config.json", source)
    if "model_type" not in config:
        raise ModelError(
            f"config.json of {source!r} names no model_type", hint="give a folder saved by save_pretrained"
        )
    shard_paths(directory, source)
    return Checkpoint(source=source, directory=directory, dtype=dtype, cache_dir=cache_dir)


def shard_paths(directory: Path, source: str) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one.

    Raises:
        ModelError: there is none, one is missing, or the index points outside the folder.
    """
    index = _read_json(directory / INDEX, source) if (directory / INDEX).is_file() else None
    names = shard_names(index, source)
    for name in names:
        if not (directory / name).is_file():
            _refuse_without(name, directory, source)
    return [directory / name for name in names]


def shard_names(index: dict[str, Any] | None, source: str) -> list[str]:
    """Names of a folder's safetensors files, by what its index (`INDEX`) says, if it has one.

    Raises:
        ModelError: the index names none, or points outside the folder.
    """
    if index is None:
        return [_SINGLE]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{INDEX} of {source!r} has no weight_map", hint="the checkpoint is damaged; fetch it again")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise ModelError(
                f"{INDEX} of {source!r} points to {name!r}, outside the folder", hint="do not use this checkpoint"
            )
    return names


@contextmanager
def quiet_transformers() -> Generator[None, None, None]:
    """Keep `transformers`' progress bars and warnings off the terminal for a while."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _refuse_without(name: str, directory: Path, source: str) -> None:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles and not list(directory.glob("*.safetensors")):
        raise ModelError(
            f"{source!r} holds its weights as a pickle ({pickles[0]}), which runs code when loaded",
            hint="convert it to safetensors on a machine you can spare: model.save_pretrained(FOLDER)",
        )
    raise ModelError(f"{source!r} lacks {name}", hint="a model folder needs config.json and model*.safetensors")


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{source!r} has no {path.name}", hint="a model folder needs config.json and safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path.name} of {source!r} cannot be read: {_first_line(error)}", hint="fetch the model again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} of {source!r} is no JSON object", hint="fetch the model again")
    return value


def _read_header(shard: Path) -> dict[str, TensorInfo]:
    """A safetensors header: eight bytes of length (little-endian), then JSON."""
    damaged = f"{shard.name} is not a whole safetensors file"
    hint = "the file is damaged; fetch the checkpoint again"
    try:
        with shard.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ModelError(damaged, hint=hint)
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        infos = {
            name: TensorInfo(tuple(e["shape"]), str(e["dtype"]), e["data_offsets"][1] - e["data_offsets"][0], shard)
            for name, e in entries
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(damaged, hint=hint) from None
    if 8 + length + sum(info.num_bytes for info in infos.values()) != shard.stat().st_size:
        raise ModelError(damaged, hint=hint)
    return infos


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
