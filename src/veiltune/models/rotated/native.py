"""How the host runs its trunk: what an ordinary training job would do, the trunk being an ordinary module.

Attention is SDPA always. Compiled are single blocks, one graph for all of them, in passes without a KV cache: with one, lengths
differ at every token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import nn

from veiltune.errors import ConfigError

Backend = Literal["inductor", "aot_eager"]


@final
@dataclass(frozen=True)
class Native:
    """How the module is run.

    Attributes:
        checkpointing: keep only what enters blocks, and compute them again in the backward.
        compiler: the backend of ``torch.compile``, or ``None``.
    """

    checkpointing: bool = False
    compiler: Backend | None = None


def require_compiler(backend: Backend, device: torch.device) -> None:
    """Refuse before a model is loaded what would fail in its first pass.

    Raises:
        ConfigError: inductor has nothing here to build its kernels with.
    """
    if backend != "inductor":
        return
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "veil.compile needs triton for a GPU, which is not installed", hint="install triton, or leave it out"
            )
        return
    from torch._inductor import config, exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        looked = ", ".join(str(name) for name in config.cpp.cxx if name)
        raise ConfigError(
            f"veil.compile needs a C++ compiler for a CPU, and none of {looked} is here",
            hint="install one, name it in CXX, set veil.compile_backend = 'aot_eager', or leave veil.compile out",
        ) from None


def apply_native(model: Any, blocks: Sequence[nn.Module], native: Native) -> None:
    """Make the blocks of a trunk run so. No path of a module or parameter changes.

    Args:
        model: the trunk's causal language model.
        blocks: the trunk's blocks.
        native: how.
    """
    if native.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # the states may need no gradient
    if native.compiler is not None:
        for block in blocks:
            block.compile(backend=native.compiler)


@contextmanager
def uncompiled(*, when: bool) -> Generator[None]:
    """Within, compiled blocks run as they are, if ``when``."""
    if not when:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
