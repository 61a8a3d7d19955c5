"""What is trained of a model that lies in the clear where it is trained: LoRA factors, or the blocks' own parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from veiltune.config import LoraConfig
from veiltune.models.adapters import (
    adapted_linears,
    factor_dtype,
    factor_parameters,
    initial_factors,
    inject_adapters,
    place_factors,
)
from veiltune.models.family import Family

Method = Literal["lora", "full"]
LAYERS_FILE = "layers.safetensors"


def make_trainable(
    model: nn.Module,
    family: Family,
    layers: Collection[int],
    lora: LoraConfig,
    method: Method,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, nn.Parameter]:
    """Freeze the model but for what is trained of its blocks ``layers``, and return that, by name.

    With ``lora``, PEFT's layers are put around the adapted linears and filled with first factors; with ``full``, the blocks'
    parameters are trained as they are. Embeddings, final norm and head stay frozen under both.

    Raises:
        ConfigError: ``lora.targets`` names no linear of this family.
    """
    model.requires_grad_(requires_grad=False)
    if method == "full":
        return _own_parameters(model, family, layers)
    num_layers = len(list(model.get_submodule(family.blocks).children()))
    linears = adapted_linears(family, num_layers, lora, layers)
    if not linears:
        return {}
    paths = [linear.path for linear in linears]
    shapes = {path: family.fan(model.get_parameter(f"{path}.weight")) for path in paths}
    inject_adapters(model, lora, family, num_layers, paths=paths)
    factors = initial_factors(shapes, lora, factor_dtype(dtype))
    place_factors(model, {name: value.to(device) for name, value in factors.items()})
    return factor_parameters(model, paths)


def _own_parameters(model: nn.Module, family: Family, layers: Collection[int]) -> dict[str, nn.Parameter]:
    prefixes = tuple(f"{family.blocks}.{layer}." for layer in layers)
    found = {name: value for name, value in model.named_parameters() if name.startswith(prefixes)}
    for value in found.values():
        value.requires_grad = True
    return found


def save_layers(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write trained parameters by the plain model's names, whole or not at all: for ``load_state_dict(strict=False)``."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{LAYERS_FILE}.partial"
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(values, partial, metadata={"format": "pt"})
    partial.replace(directory / LAYERS_FILE)
