"""LoRA factors: made, put into modules, moved between the plain and the obfuscated basis, and exported in PEFT's format.

Factors travel as a flat mapping ``{"<linear>.lora_A": (rank, in), "<linear>.lora_B": (out, rank)}``, PEFT's orientation.

*Reference.* Hu et al. 2021 (LoRA); the coordinates are ObfuscaTune's.

*Symbols.* In row-vector convention ΔW = A·B with A = lora_Aᵀ and B = lora_Bᵀ, R the key of the side.

- Input side: A* = R⁻¹·A, B* = B.
- Output side: A* = A, B* = B·R.

*Reveals.* The host sees B of the input side and A of the output side in the plain basis, never both of a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.config import LoraConfig
from veiltune.errors import ConfigError, nearest
from veiltune.models.family import Family, Linear
from veiltune.privacy.orthogonal import Key
from veiltune.secrets import MasterSecret

ADAPTER = "default"
Keys = Mapping[str, Key]
RowMap = Callable[[Key, Tensor], Tensor]


def adapted_linears(
    family: Family, num_layers: int, lora: LoraConfig, layers: Collection[int] | None = None
) -> list[Linear]:
    """The linears that get an adapter: those the targets name, in the given blocks (``None``: in all).

    Raises:
        ConfigError: a target names no linear of this family.
    """
    every = list(family.linears(num_layers))
    known = {linear.path.rpartition(".")[2] for linear in every}
    targets = known if lora.targets == "all" else set(lora.targets)
    for target in sorted(targets - known):
        raise ConfigError(f"lora.targets: {family.name} has no linear {target!r}", hint=nearest(target, known))
    return [
        linear
        for linear in every
        if linear.path.rpartition(".")[2] in targets and (layers is None or linear.block in layers)
    ]


def peft_config(
    lora: LoraConfig, family: Family, num_layers: int, base: str | None = None, *, paths: Collection[str] | None = None
) -> Any:
    """The `peft.LoraConfig` that means the same; ``paths`` are the adapted linears (``None``: in every block)."""
    import peft

    every = [linear.path for linear in family.linears(num_layers)]
    if paths is None:
        paths = [linear.path for linear in adapted_linears(family, num_layers, lora)]
    names = {path.split(f"{family.blocks}.", 1)[1].split(".", 1)[1] for path in paths}
    if sum(path.split(f"{family.blocks}.", 1)[1].split(".", 1)[1] in names for path in every) != len(paths):
        names = set(paths)  # not in every block: each by its whole path
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyrefly: ignore[bad-argument-type]
        lora_dropout=lora.dropout,
        target_modules=sorted(names),
        fan_in_fan_out=family.weights_in_out,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def inject_adapters(
    model: nn.Module, lora: LoraConfig, family: Family, num_layers: int, *, paths: Collection[str] | None = None
) -> None:
    """Wrap the adapted linears of ``model`` in PEFT's LoRA layers, factors still on the meta device."""
    import peft

    config = peft_config(lora, family, num_layers, paths=paths)
    peft.inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of factors for a model of ``dtype``: never half, as in PEFT, since optimisers' small steps would vanish."""
    return dtype if dtype == torch.float64 else torch.float32


def initial_factors(shapes: Mapping[str, tuple[int, int]], lora: LoraConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """First factors: A uniform as in PEFT (bound 1/√in), B zero.

    With ``init_seed`` unset A is drawn from the system's randomness: a host that knew A would have ``rank`` known plaintext
    rows of each input-side key.

    Args:
        shapes: (in, out) of each adapted linear, by path.
        lora: rank and seed.
        dtype: of the factors.
    """
    secret = MasterSecret.generate() if lora.init_seed is None else MasterSecret.for_tests(lora.init_seed)
    factors: dict[str, Tensor] = {}
    for path, (fan_in, fan_out) in shapes.items():
        generator = torch.Generator().manual_seed(int.from_bytes(secret.subkey(f"lora:{path}")[:8], "little") >> 1)
        bound = 1 / math.sqrt(fan_in)
        uniform = torch.rand((lora.rank, fan_in), generator=generator, dtype=torch.float64)
        factors[f"{path}.lora_A"] = ((2 * uniform - 1) * bound).to(dtype)
        factors[f"{path}.lora_B"] = torch.zeros((fan_out, lora.rank), dtype=dtype)
    return factors


def factor_parameters(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Parameter]:
    """The factors that live in ``model``'s PEFT layers, by flat name."""
    found: dict[str, nn.Parameter] = {}
    for path in paths:
        layer: Any = model.get_submodule(path)
        found[f"{path}.lora_A"] = layer.lora_A[ADAPTER].weight
        found[f"{path}.lora_B"] = layer.lora_B[ADAPTER].weight
    return found


def place_factors(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Put factors into ``model``'s PEFT layers: copied in where one is there, else as new trainable parameters."""
    for name, value in factors.items():
        path, _, which = name.rpartition(".")
        holder: Any = getattr(model.get_submodule(path), which)[ADAPTER]
        if holder.weight.is_meta:
            holder.weight = nn.Parameter(value.detach().clone())
        else:
            with torch.no_grad():
                holder.weight.copy_(value)


def _transform(
    tensors: Mapping[str, Tensor], linears: Sequence[Linear], input_map: RowMap, output_map: RowMap, keys: Keys
) -> dict[str, Tensor]:
    """Map whichever factor of each pair meets the key; factors that meet the same key go through it together."""
    out = dict(tensors)
    groups: dict[str, list[tuple[str, Linear]]] = {}
    for linear in linears:
        name = f"{linear.path}.lora_{'A' if linear.side == 'input' else 'B'}"
        if name in tensors:
            groups.setdefault(linear.key, []).append((name, linear))
    for label, members in groups.items():
        key = keys[label]
        is_input = members[0][1].side == "input"
        rows = [tensors[name] if is_input else tensors[name].T for name, _ in members]
        mapped = (input_map if is_input else output_map)(key, torch.cat(rows)).split([len(part) for part in rows])
        for (name, _), value in zip(members, mapped, strict=True):
            out[name] = (value if is_input else value.T).contiguous()
    return out


def mask_factors(factors: Mapping[str, Tensor], linears: Sequence[Linear], keys: Keys) -> dict[str, Tensor]:
    """Plain factors to the obfuscated basis: lora_A* = lora_A·R⁻ᵀ, lora_B* = Rᵀ·lora_B."""
    return _transform(factors, linears, Key.mask_gradient, Key.mask, keys)


def unmask_factors(factors: Mapping[str, Tensor], linears: Sequence[Linear], keys: Keys) -> dict[str, Tensor]:
    """Obfuscated factors back to the plain basis: lora_A = lora_A*·Rᵀ, lora_B = R⁻ᵀ·lora_B*."""
    return _transform(factors, linears, Key.unmask_gradient, Key.unmask, keys)


def unmask_factor_gradients(
    gradients: Mapping[str, Tensor], linears: Sequence[Linear], keys: Keys
) -> dict[str, Tensor]:
    """Gradients of obfuscated factors to those of the plain ones.

    The transposes of `mask_factors`: d(lora_A) = d(lora_A*)·R⁻¹, d(lora_B) = R·d(lora_B*).
    """
    return _transform(gradients, linears, Key.unmask, Key.unmask_gradient, keys)


def save_adapter(
    directory: Path, factors: Mapping[str, Tensor], lora: LoraConfig, family: Family, num_layers: int, base: str
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT does; weights first, so a torn write shows."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.weight": value.detach().cpu().contiguous() for name, value in factors.items()}
    partial = directory / "adapter_model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(directory / "adapter_model.safetensors")
    paths = {name.rpartition(".")[0] for name in factors}
    config = peft_config(lora, family, num_layers, base, paths=paths)
    config.inference_mode = True
    config.save_pretrained(str(directory))
