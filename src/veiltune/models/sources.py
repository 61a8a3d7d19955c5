"""From what a user writes to a model folder: the six forms of a model source.

======================================  ============================================================================
``OWNER/NAME`` (``@REVISION``)          a model on the hub, fetched once into the hub's own cache
a path to a directory                   a folder with ``config.json`` and safetensors
a path to a ``.gguf`` file              converted once to safetensors
``package:DIST`` (``==VERSION``,        the one GGUF file or model folder inside an installed distribution, or one in
``/INNER/PATH`` optional)               Veiltune's package cache; the distribution is not imported
``random:FAMILY[:l,h,heads,vocab]``     random weights, generated once; also ``random:PRESET`` (``gpt2-xl`` …)
``sealed:PATH``                         a container from ``veiltune seal``, opened tensor by tensor with a key that
                                        ``VEILTUNE_KEYS`` names
======================================  ============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from veiltune.errors import ModelError
from veiltune.models.checkpoint import Checkpoint, open_checkpoint
from veiltune.models.gguf import convert_gguf, gguf_config
from veiltune.models.memory import available_memory, check_memory, estimate_memory
from veiltune.models.packages import PackageFiles, fetch_package, find_package
from veiltune.models.presets import random_config
from veiltune.models.random_weights import random_checkpoint
from veiltune.models.sealed import open_sealed_checkpoint

__all__ = [
    "ACCEPTED_FORMS",
    "Checkpoint",
    "available_memory",
    "check_memory",
    "estimate_memory",
    "fetch_package",
    "random_config",
    "resolve_config",
    "resolve_model",
]

ACCEPTED_FORMS = (
    "a hub id, a local directory, a GGUF file, package:DISTRIBUTION, random:FAMILY[:layers,hidden,heads,vocab] or "
    "sealed:PATH"
)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]


def resolve_model(
    source: str,
    *,
    dtype: torch.dtype | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """The checkpoint a source stands for, fetched, converted or generated first if need be. No weights are loaded.

    Args:
        source: one of :data:`ACCEPTED_FORMS`.
        dtype: what the checkpoint's tensors are read as; random weights are also stored in it (float32 if ``None``).
        cache_dir: root of Veiltune's cache (default ``$VEILTUNE_CACHE``, else ``~/.cache/veiltune``).
        progress: called with a line of text before anything slow.

    Raises:
        ModelError: the source has no known form, or what it names is absent, unreachable, damaged or unsafe.
        CheckpointError: a sealed model does not open.
    """
    kind, _, rest = source.partition(":")
    if kind == "sealed":
        return open_sealed_checkpoint(source, dtype=dtype, cache_dir=cache_dir)
    if kind == "random":
        directory = random_checkpoint(rest, dtype=dtype or torch.float32, cache_dir=cache_dir)
    elif kind == "package":
        return replace(_from_package(rest, dtype, cache_dir, progress), source=source)
    elif (path := Path(source).expanduser()).is_dir():
        directory = path
    elif path.is_file() or source.endswith(".gguf"):
        directory = _from_file(path, cache_dir, progress)
    elif _HUB_ID.fullmatch(source) and not source.startswith("."):
        directory = _from_hub(source, progress)
    else:
        raise ModelError(
            f"model {source!r} is neither a path that exists nor another known form", hint=f"give {ACCEPTED_FORMS}"
        )
    return open_checkpoint(source, directory, dtype=dtype, cache_dir=cache_dir)


def resolve_config(source: str, *, cache_dir: Path | None = None, progress: Callable[[str], None] | None = None) -> Any:
    """The `transformers` configuration of a source, without its weights: nothing is generated or converted.

    Args:
        source: one of :data:`ACCEPTED_FORMS`.
        cache_dir: root of Veiltune's cache.
        progress: called with a line of text before anything slow.

    Raises:
        ModelError: the source has no known form, or what it names is absent, unreachable or damaged.
    """
    kind, _, rest = source.partition(":")
    if kind == "random":
        return random_config(rest)
    if kind == "package":
        requirement, _, inner = rest.partition("/")
        package = find_package(requirement, cache_dir=cache_dir)
        path = package.paths[_pick_model(package, inner)]
        return gguf_config(path, cache_dir=cache_dir) if path.suffix == ".gguf" else _folder_config(source, path.parent)
    if (path := Path(source).expanduser()).is_file() and path.suffix == ".gguf":
        return gguf_config(path, cache_dir=cache_dir)
    if not path.is_dir() and not source.endswith(".gguf") and not source.startswith(".") and _HUB_ID.fullmatch(source):
        return _folder_config(source, _from_hub(source, progress, files=["config.json"]))
    return resolve_model(source, cache_dir=cache_dir, progress=progress).config  # a folder, or an error


def _folder_config(source: str, directory: Path) -> Any:
    return Checkpoint(source=source, directory=directory).config


def _from_file(path: Path, cache_dir: Path | None, progress: Callable[[str], None] | None) -> Path:
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}", hint=f"check the path, or give {ACCEPTED_FORMS}")
    if path.suffix != ".gguf":
        raise ModelError(
            f"{str(path)!r} is a file but no .gguf", hint="for safetensors, give the folder that also has config.json"
        )
    return convert_gguf(path, cache_dir=cache_dir, progress=progress)


def _from_hub(source: str, progress: Callable[[str], None] | None, *, files: Sequence[str] = tuple(_HUB_FILES)) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    if progress:
        progress(f"looking for {repository} on the hub")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {source!r} is no local path, and the hub did not give it: {first}",
            hint=f"check the name and the network (gated models want a token), or give {ACCEPTED_FORMS}",
        ) from None


def _from_package(
    spec: str, dtype: torch.dtype | None, cache_dir: Path | None, progress: Callable[[str], None] | None
) -> Checkpoint:
    requirement, _, inner = spec.partition("/")
    package = find_package(requirement, cache_dir=cache_dir)
    name = _pick_model(package, inner)
    if name.endswith(".gguf"):
        directory = convert_gguf(package.paths[name], cache_dir=cache_dir, progress=progress)
    else:
        directory = package.paths[name].parent
    return open_checkpoint(spec, directory, dtype=dtype, cache_dir=cache_dir)


def _pick_model(package: PackageFiles, inner: str) -> str:
    """Name of the GGUF file or of the model folder's ``config.json``: the package's only one, or that at ``inner``."""
    folders = {name.rpartition("/")[0] for name in package.paths if name.endswith(".safetensors")}
    models = {name: name for name in package.paths if name.endswith(".gguf")}
    models |= {folder: f"{folder}/config.json" for folder in folders if f"{folder}/config.json" in package.paths}
    if inner:
        models = {name: path for name, path in models.items() if name == inner.rstrip("/")}
    found = f"{package.name} {package.version}"
    if not models:
        where = f" at {inner!r}" if inner else ""
        raise ModelError(
            f"distribution {found} holds no GGUF file and no model folder{where}", hint="check the distribution's name"
        )
    if len(models) > 1:
        raise ModelError(
            f"distribution {found} holds {len(models)} models",
            hint=f"write package:{package.name}/PATH with one of: {', '.join(sorted(models))}",
        )
    return next(iter(models.values()))
