"""Models without their weights: build the modules from a configuration, drop what another party holds, fill in the rest.

A party never materialises a tensor it does not hold: parameters start on the meta device and are assigned one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.errors import ModelError
from veiltune.models.families import find_family
from veiltune.models.family import Family


def config_from_json(values: Mapping[str, Any]) -> Any:
    """A `transformers` configuration from its JSON form. Only architectures `transformers` itself ships are built.

    Raises:
        ModelError: the values name no architecture `transformers` knows.
    """
    from transformers import AutoConfig

    values = {key: value for key, value in values.items() if key not in {"auto_map", "quantization_config"}}
    model_type = str(values.pop("model_type", None))
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"cannot build a configuration for {model_type!r}: {error}", hint="check config.json"
        ) from None


def empty_model(config: Any) -> nn.Module:
    """The causal language model of a configuration with every parameter on the meta device and every buffer real."""
    from transformers import AutoModelForCausalLM

    find_family(config)
    with torch.device("meta"):  # thread-local, which accelerate's init_empty_weights is not
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for module in model.modules():
        empty = {name: value for name, value in module.named_buffers(recurse=False) if value.is_meta}
        for name, value in empty.items():
            setattr(module, name, torch.empty_like(value, device="cpu"))
        if empty:  # rotary tables: the model knows how to fill its own buffers
            model._init_weights(module)
    return model.eval()


def blocks_of(model: nn.Module, family: Family) -> list[nn.Module]:
    """The transformer blocks of a causal language model of this family."""
    return list(model.get_submodule(family.blocks).children())


def assign_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` in the place of the parameter called ``name``, without copying it. It does not require a gradient.

    Raises:
        ModelError: no such parameter, or another shape.
    """
    parent_name, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        old = parent._parameters[leaf]
    except (AttributeError, KeyError):
        raise ModelError(
            f"unexpected tensor {name!r} for this architecture", hint="check the checkpoint's config.json"
        ) from None
    if old is not None and old.shape != value.shape:
        raise ModelError(
            f"tensor {name!r} has shape {tuple(value.shape)}, the architecture wants {tuple(old.shape)}",
            hint="check the checkpoint's config.json",
        )
    parent.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def keep_modules(model: nn.Module, wanted: Collection[str]) -> None:
    """Remove every module with parameters of its own that is neither in ``wanted`` nor inside one that is."""
    for path, module in list(model.named_modules()):
        if next(module.parameters(recurse=False), None) is None:
            continue
        parts = path.split(".")
        if not any(".".join(parts[:end]) in wanted for end in range(1, len(parts) + 1)):
            setattr(model.get_submodule(".".join(parts[:-1])), parts[-1], None)


def missing_parameters(model: nn.Module) -> list[str]:
    """Names of parameters that were never assigned."""
    return [name for name, value in model.named_parameters() if value.is_meta]


def require_complete(model: nn.Module) -> None:
    """Raise ModelError if a parameter was never assigned."""
    missing = missing_parameters(model)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the checkpoint lacks {missing[0]!r}{more}", hint="the checkpoint is incomplete; fetch it again"
        )


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device if there is one, else the CPU.

    Raises:
        ModelError: an unknown or absent device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {name!r} cannot be used: {error}".splitlines()[0], hint="set device = 'auto' or 'cpu'"
        ) from None
    return device


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def compute_dtype(name: str, device: torch.device) -> tuple[torch.dtype, bool]:
    """The dtype to compute in, and whether bfloat16 is to be imitated by rounding between float32 operations.

    Matrix products in bfloat16 are tens of times slower than in float32 on most CPUs; a study of its rounding does not need
    them.
    """
    if name == "bfloat16" and device.type == "cpu":
        return torch.float32, True
    return DTYPES[name], False
