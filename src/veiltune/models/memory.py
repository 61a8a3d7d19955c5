"""How much memory a model will need, asked before it is loaded.

An estimate for admission, not a measurement: it is meant to be right within about a third and to refuse what is
hopeless.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from veiltune.errors import ModelError
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.random_weights import parameter_shapes

_RUNTIME_BYTES = 400_000_000  # interpreter, torch and transformers before any weight
# Widths kept for backward per token and block, fitted to peaks of SmolLM2-135M, GPT-2 small and OPT-1.3B with LoRA.
_KEPT_HIDDEN, _KEPT_WIDE = 16, 6
_LOGIT_COPIES = 3  # the logits, their log-softmax and their gradient, in float32
_NOT_ADAPTED = ("embed", "wte", "wpe", "lm_head")
_CGROUP = Path("/sys/fs/cgroup")


def estimate_memory(model: Checkpoint | Any, dtype: torch.dtype, batch: int, length: int, lora_rank: int) -> int:
    """Peak bytes of a process that holds the whole model and, if ``lora_rank`` > 0, trains adapters on every linear.

    Args:
        model: a checkpoint or a `transformers` configuration.
        dtype: of weights and activations.
        batch: sequences per step.
        length: tokens per sequence.
        lora_rank: rank of the adapters; 0 for a forward pass without gradients.

    The sum of: weights; adapters with gradient and two AdamW moments in float32; activations kept for the backward
    pass (of one block if there is none); the logits; the interpreter.
    """
    config = model.config if isinstance(model, Checkpoint) else model
    num_parameters, num_linear_widths = _count(config)
    if isinstance(model, Checkpoint):
        num_parameters = model.num_parameters
    tokens = batch * length
    kept = _KEPT_HIDDEN * config.hidden_size + _KEPT_WIDE * _wide(config)
    blocks = config.num_hidden_layers if lora_rank else 1
    adapters = 16 * lora_rank * num_linear_widths
    logits = _LOGIT_COPIES * 4 * tokens * config.vocab_size
    return (
        num_parameters * dtype.itemsize + adapters + tokens * blocks * kept * dtype.itemsize + logits + _RUNTIME_BYTES
    )


def check_memory(
    model: Checkpoint | Any,
    dtype: torch.dtype,
    batch: int,
    length: int,
    lora_rank: int,
    *,
    available: int | None = None,
    source: str | None = None,
) -> int:
    """:func:`estimate_memory`, refused if the machine cannot hold it; the estimate in bytes otherwise.

    ``available`` replaces what the machine says (bytes); ``source`` is what the user calls a bare configuration.

    Raises:
        ModelError: the estimate exceeds the memory available.
    """
    need = estimate_memory(model, dtype, batch, length, lora_rank)
    name = source or (model.source if isinstance(model, Checkpoint) else model.model_type)
    require_memory(need, f"model {name!r} with batch {batch} x {length} tokens", available=available)
    return need


def require_memory(num_bytes: int, purpose: str, *, available: int | None = None) -> None:
    """Raise ModelError if fewer than ``num_bytes`` bytes of memory are available."""
    free = available_memory() if available is None else available
    if num_bytes > free:
        raise ModelError(
            f"{purpose} needs about {num_bytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available",
            hint="take a smaller model, batch or length, or a machine with more memory",
        )


def available_memory() -> int:
    """Bytes this process could still allocate: what the system has, or what the container's limit leaves if less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines()).get(
            "inactive_file", "0"
        )
    except (OSError, ValueError):  # no such limit ("max"), or no such file
        return free
    return max(0, min(free, limit - used + int(cached)))


def _count(config: Any) -> tuple[int, int]:
    """Number of parameters (tied ones once), and the sum of inputs + outputs over all linears but the head."""
    shapes = parameter_shapes(config)
    adapted = [
        shape for name, shape in shapes.items() if len(shape) == 2 and not any(part in name for part in _NOT_ADAPTED)
    ]
    return sum(math.prod(shape) for shape in shapes.values()), sum(sum(shape) for shape in adapted)


def _wide(config: Any) -> int:
    """Width of the feed-forward layer."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * int(config.hidden_size)
