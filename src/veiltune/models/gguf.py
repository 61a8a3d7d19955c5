"""GGUF files, converted once to a folder of safetensors.

`transformers` reads the format and dequantises it; a quantised file's values are what they are after that, not the
original model's. The folder is cached under the file's sha256 and the versions of what converted it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from veiltune.errors import ModelError
from veiltune.models.cache import build_once, cache_key, cache_root, file_sha256, require_free_disk
from veiltune.models.checkpoint import quiet_transformers
from veiltune.models.memory import require_memory

_FORMAT = 1  # part of the cache key: raise it when this module changes what it writes


def convert_gguf(path: Path, *, cache_dir: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The folder of float32 safetensors, configuration and tokenizer (chat template kept) that stands for a GGUF file.

    The first time, the model is held twice in float32 for a moment; that is checked before anything is loaded.

    Raises:
        ModelError: no GGUF file, an architecture `transformers` cannot convert, or too little memory or disk.
    """
    _require_magic(path)

    def build(scratch: Path) -> None:
        num_bytes = 4 * _num_values(path)
        require_memory(2 * num_bytes, f"converting {path.name}")
        require_free_disk(scratch, num_bytes, f"converting {path.name}")
        if progress:
            progress(f"converting {path.name} to safetensors (once)")
        _convert(path, scratch)

    return build_once(_target(path, cache_dir), build)


def gguf_config(path: Path, *, cache_dir: Path | None = None) -> Any:
    """The `transformers` configuration of a GGUF file, from its header alone if it was not converted yet.

    Raises:
        ModelError: no GGUF file, or an architecture `transformers` cannot convert.
    """
    from transformers import AutoConfig

    _require_magic(path)
    done = _target(path, cache_dir)
    try:
        with quiet_transformers():
            if done.is_dir():
                return AutoConfig.from_pretrained(done, trust_remote_code=False, local_files_only=True)
            options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
            return AutoConfig.from_pretrained(path.parent, **options)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the header of {path.name} is no use: {first}", hint="fetch the file again") from None


def _target(path: Path, cache_dir: Path | None) -> Path:
    root = cache_root(cache_dir)
    return root / "gguf" / cache_key(_FORMAT, file_sha256(path, root), version("transformers"), version("gguf"))


def _require_magic(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error.strerror}", hint="check the path") from None
    if magic != b"GGUF":
        raise ModelError(f"{str(path)!r} is no GGUF file (it begins with {magic!r})", hint="fetch the file again")


def _num_values(path: Path) -> int:
    from gguf import GGUFReader

    try:
        return sum(math.prod(int(size) for size in tensor.shape) for tensor in GGUFReader(path).tensors)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise ModelError(f"{path.name} is a damaged GGUF file: {error}", hint="fetch the file again") from None


def _convert(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        # The reader draws its own bar, which no setting of transformers turns off.
        with quiet_transformers(), mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", _no_bar):
            model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, **options)
            # transformers refuses to save what it dequantised as long as it believes it quantised.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.hf_quantizer = None
            model.is_quantized = False
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{path.name} cannot be converted: {first}",
            hint="transformers converts Llama, Mistral, Qwen2/3 and GPT-2 files, among others",
        ) from None


def _no_bar(iterable: Any, **_: Any) -> Any:
    return iterable
