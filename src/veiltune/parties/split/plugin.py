"""Plug-in: the provider puts what an owner trained into its full model (offsite-tuning, arXiv 2302.04870)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.config import Config
from veiltune.errors import ProtocolError
from veiltune.models.adapters import adapted_linears, save_adapter
from veiltune.models.checkpoint import Checkpoint, quiet_transformers
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.transport.messages import PlugIn

log = logging.getLogger(__name__)


def plug_in(directory: Path, checkpoint: Checkpoint, config: Config, returned: PlugIn) -> None:
    """Merge returned factors, or returned parameters, into the full model and write it to ``directory``.

    Raises:
        ProtocolError: a tensor has no place in the model, another shape, or is not finite.
    """
    for name, value in returned.tensors.items():
        if not torch.isfinite(value).all():
            raise ProtocolError(f"the returned tensor {name!r} is not finite", hint="the tuning diverged; tune again")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        model: Any = checkpoint.load_plain(torch.float32)
        cut = Cut.of(checkpoint.config, config.cut.bottom_layers, config.cut.top_layers)
        if returned.method == "full":
            _replace(model, cut, returned.tensors)
        elif returned.tensors:
            model = _merged(model, cut, config, returned.tensors, directory.with_name("plug-in.adapter"))
        model.save_pretrained(partial)
        checkpoint.load_tokenizer().save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    log.info("plugged in %d tensors", len(returned.tensors))


def _replace(model: Any, cut: Cut, tensors: Mapping[str, Tensor]) -> None:
    prefixes = tuple(f"{find_family(model.config).blocks}.{layer}." for layer in cut.owner_layers)
    own = {name: value for name, value in model.named_parameters() if name.startswith(prefixes)}
    with torch.no_grad():
        for name, value in tensors.items():
            if name not in own or own[name].shape != value.shape:
                raise ProtocolError(
                    f"the returned tensor {name!r} of shape {tuple(value.shape)} has no place in the model"
                )
            own[name].copy_(value)


def _merged(model: Any, cut: Cut, config: Config, factors: Mapping[str, Tensor], directory: Path) -> Any:
    from peft import PeftModel

    family = find_family(model.config)
    shapes: dict[str, tuple[int, int]] = {}
    for linear in adapted_linears(family, cut.num_layers, config.lora, cut.owner_layers):
        fan_in, fan_out = family.fan(model.get_submodule(linear.path).weight)
        shapes |= {
            f"{linear.path}.lora_A": (config.lora.rank, fan_in),
            f"{linear.path}.lora_B": (fan_out, config.lora.rank),
        }
    for name, value in factors.items():
        if tuple(value.shape) != shapes.get(name):
            raise ProtocolError(
                f"the returned tensor {name!r} of shape {tuple(value.shape)} is no LoRA factor of the owner's layers"
            )
    save_adapter(directory, factors, config.lora, family, cut.num_layers, config.model)
    merged = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    shutil.rmtree(directory)
    return merged
