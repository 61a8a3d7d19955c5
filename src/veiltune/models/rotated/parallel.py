"""A trunk shared by several ranks: each holds some heads of every attention and some hidden units of every MLP.

A rank's modules are `transformers`' own with fewer heads and units, so attention, KV cache, PEFT's layers and their fusion run
unchanged. All that is added is one sum over ranks where a branch is written to the stream, and its mirror image on the way back.
Neither torch's parallel styles nor `transformers`' plans serve here: they know `nn.Linear` alone, not `Conv1D`, have no plan for
GPT-2 and OPT, and their hooks sit inside LoRA layers, where fused layers would skip them. FSDP would gather every weight in every
pass, and a batch of one row would be computed by every rank anew.

*Reference.* Shoeybi et al. 2019 (arXiv 1909.08053), section 3: the operators f and g, here `_Enter` and `_Leave`.

*Symbols.* Rank i of n, rows. Input side: W_i and B_i are columns i, A is whole, Y_i = X·W_i + s·(X·A)·B_i. Output side: W_i and
A_i are rows i, B is whole, Y = Σ_i X_i·W_i + s·(X_i·A_i)·B + b, with b on rank 0. A rank's gradient of a whole factor is one term
of the true one; that of a part is true.

*Exactness.* Sums of n terms in another order: up to n·eps of one rank's result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from veiltune.config import LoraConfig
from veiltune.errors import ConfigError
from veiltune.models.cut import Cut
from veiltune.models.family import Linear
from veiltune.models.rotated.native import Native
from veiltune.models.rotated.trunk import RotatedTrunk
from veiltune.transport.messages import VeiledForward

_SEED_BITS = 62


class Ranks(Protocol):
    """The ranks that compute together, as one of them sees them. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def total(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over ranks, in new memory; the same bits on each."""
        ...

    def agree(self, value: int) -> int:
        """Rank 0's value."""
        ...


class _Enter(torch.autograd.Function):
    """What every rank reads: the gradients that come back are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(gradients[0]), None


class _Leave(torch.autograd.Function):
    """What every rank writes a summand of: the sum; each summand's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:  # pyrefly: ignore[bad-override]
        return ranks.total(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@final
@dataclass(frozen=True)
class Share:
    """Which part of a tensor a rank has.

    Attributes:
        dim: the dimension that is divided; ``None``: the tensor is whole on every rank.
        groups: how many tensors lie one behind the other along it, each divided by itself (fused Q, K and V: 3).
    """

    dim: int | None
    groups: int = 1

    def of(self, value: Tensor, rank: int, size: int) -> Tensor:
        """The part of ``value`` that ``rank`` of ``size`` has; a view where it can be."""
        if self.dim is None:
            return value
        parts = [group.chunk(size, self.dim)[rank] for group in value.chunk(self.groups, self.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def placed(self, part: Tensor, rank: int, size: int) -> Tensor:
        """A tensor of the whole's shape, zero but for this part. Over ranks they sum up to the whole."""
        if self.dim is None:
            return part
        shape = [length * size if dim == self.dim else length for dim, length in enumerate(part.shape)]
        whole = part.new_zeros(shape)
        for to, group in zip(whole.chunk(self.groups, self.dim), part.chunk(self.groups, self.dim), strict=True):
            to.chunk(size, self.dim)[rank].copy_(group)
        return whole


def require_divisible(config: Any, ranks: int, units: int) -> None:
    """Heads, key-value heads and hidden units must be divisible by the number of ranks.

    Raises:
        ConfigError: one of them is not.
    """
    heads = int(config.num_attention_heads)
    counts = {
        "attention heads": heads,
        "key-value heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "hidden units of the MLP": units,
    }
    for what, count in counts.items():
        if count % ranks:
            fitting = ", ".join(str(n) for n in range(1, ranks) if all(each % n == 0 for each in counts.values()))
            raise ConfigError(
                f"veil.ranks = {ranks}: the model's {count} {what} cannot be shared out evenly",
                hint=f"smaller numbers that fit this model: {fitting}",
            )


class ParallelTrunk(RotatedTrunk):
    """One rank's share of a rotated trunk. It is given whole tensors and keeps its parts.

    Args:
        config: as for `RotatedTrunk`, like ``cut``, ``lora``, ``device`` and ``native``.
        cut: which blocks are the trunk.
        lora: the adapter's shape.
        device: where this rank computes.
        ranks: all of them.
        native: how the module is run.

    Raises:
        ConfigError: the model cannot be shared out evenly.
    """

    def __init__(
        self, config: Any, cut: Cut, lora: LoraConfig, device: torch.device, ranks: Ranks, native: Native | None = None
    ) -> None:
        super().__init__(config, cut, lora, device, rounded=False, native=native)
        self.ranks = ranks
        self._shares: dict[str, Share] = {}
        linears = [linear for linear in self.family.linears(cut.num_layers) if linear.block in cut.trunk]
        up = next(linear for linear in linears if linear.path.endswith(self.family.mlp.inputs[0]))
        weight: Any = self._base(up.path).weight
        require_divisible(config, ranks.size, self.family.fan(weight)[1])
        for linear in linears:
            self._divide(linear)
        for block in self.held_blocks():
            self._connect(block)

    def _base(self, path: str) -> Any:
        module: Any = self.model.get_submodule(path)
        return getattr(module, "base_layer", module)

    def _divide(self, linear: Linear) -> None:
        """Note what is divided how, and narrow the empty linear to what this rank will have of it."""
        is_input = linear.side == "input"
        is_fused = len(self.family.attention.inputs) == 1 and linear.path.endswith(self.family.attention.inputs[0])
        groups = 3 if is_fused else 1
        across = 0 if is_input != self.family.weights_in_out else 1
        whole, part = Share(None), Share(0 if is_input else 1, groups)
        self._shares |= {
            f"{linear.path}.weight": Share(across, groups),
            f"{linear.path}.bias": part if is_input else whole,
            f"{linear.path}.lora_A": whole if is_input else part,
            f"{linear.path}.lora_B": part if is_input else whole,
        }
        base = self._base(linear.path)
        for leaf, value in list(base.named_parameters(recurse=False)):
            narrow = self._part(f"{linear.path}.{leaf}", value.detach())
            base.register_parameter(leaf, nn.Parameter(narrow, requires_grad=False))
        fan_in, fan_out = self.family.fan(base.weight)
        names = ("nx", "nf") if self.family.weights_in_out else ("in_features", "out_features")
        for name, size in zip(names, (fan_in, fan_out), strict=True):
            setattr(base, name, size)

    def _connect(self, block: nn.Module) -> None:
        """Put the two operators around each branch, and tell the attention how many heads it has."""

        def entered(_module: nn.Module, _inputs: Any, normed: Tensor) -> Tensor:
            return _Enter.apply(normed, self.ranks)

        def left(_module: nn.Module, _inputs: Any, summand: Tensor) -> Tensor:
            return _Leave.apply(summand, self.ranks)

        for segment in self.family.segments:
            block.get_submodule(segment.norm).register_forward_hook(entered)
            block.get_submodule(segment.output).register_forward_hook(left)
        attention: Any = block.get_submodule(str(self.family.attention.module))
        for name in ("num_heads", "split_size"):  # GPT-2 and OPT keep them; others ask the states for their width
            if hasattr(attention, name):
                setattr(attention, name, getattr(attention, name) // self.ranks.size)

    def _part(self, name: str, value: Tensor) -> Tensor:
        share = self._shares.get(name)
        return value if share is None else share.of(value, self.ranks.rank, self.ranks.size)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `AdaptedTrunk.load`: of each whole tensor this rank's part, and the bias of a sum on rank 0 alone."""
        parts: dict[str, Tensor] = {}
        for name, value in tensors.items():
            share = self._shares.get(name)
            part = self._part(name, value)
            if self.ranks.rank and share is not None and share.dim is None and name.endswith(".bias"):
                part = torch.zeros_like(part)
            # A view would keep the whole tensor, or the mapped file, in memory.
            parts[name] = (
                part if share is None or share.dim is None else part.clone(memory_format=torch.contiguous_format)
            )
        super().load(parts)

    def load_factors(self, factors: Mapping[str, Tensor]) -> None:
        """See `AdaptedTrunk.load_factors`: this rank's parts of whole factors."""
        super().load_factors({name: self._part(name, value).contiguous() for name, value in factors.items()})

    def forward(self, request: VeiledForward) -> Tensor:
        """See `RotatedTrunk.forward`. Dropouts of the stream must draw alike on every rank; so those inside heads repeat."""
        if not request.training:
            return super().forward(request)
        seed = self.ranks.agree(int(torch.randint(1 << _SEED_BITS, ())))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return super().forward(request)

    def take_gradients(self) -> dict[str, Tensor]:
        """The whole factors' gradients, which are forgotten here. Every rank takes part; one sum for all of them."""
        placed: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            placed[name] = self._shares[name].placed(gradient, self.ranks.rank, self.ranks.size)
            parameter.grad = None
        if not placed:
            return {}
        summed = self.ranks.total(torch.cat([value.flatten() for value in placed.values()]))
        parts = summed.split([value.numel() for value in placed.values()])
        return {name: part.view(value.shape) for (name, value), part in zip(placed.items(), parts, strict=True)}
