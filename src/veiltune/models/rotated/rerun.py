"""The host's pass once more, one block at a time: what an enclave too small for the trunk can hold the host's answers against.

The blocks' tensors are those that the host was sent, in its basis, so the modules are the host's own (`RotatedTrunk` of one
block).
Held at a time: one block, one block's graph, and the states that entered the blocks.

*Exactness.* The same operations in the same order as the host's on one rank; on other kernels up to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.config import LoraConfig
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.rotated.trunk import RotatedTrunk
from veiltune.transport.messages import VeiledBackward, VeiledForward

ReadBlock = Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True, repr=False)
class Replayed:
    """What one block's backward gives: the gradient of its input, if there is one to be had, and those of its factors."""

    entry: Tensor | None
    factors: Mapping[str, Tensor]


@final
class Rerun:
    """A trunk that is read block by block.

    Args:
        config: the architecture (`transformers`).
        cut: which blocks are the trunk.
        lora: the adapter's shape.
        device: where to compute.
        read: the rotated tensors of one block.
    """

    def __init__(self, config: Any, cut: Cut, lora: LoraConfig, device: torch.device, read: ReadBlock) -> None:
        self._config = config
        self._cut = cut
        self._lora = lora
        self._device = device
        self._read = read
        self._blocks = find_family(config).blocks

    def _trunk(self, block: int, factors: Mapping[str, Tensor]) -> RotatedTrunk:
        cut = Cut(block, self._cut.num_layers - block - 1, self._cut.num_layers)
        trunk = RotatedTrunk(self._config, cut, self._lora, self._device, rounded=False)
        trunk.load(self._read(block))
        mine = f"{self._blocks}.{block}."
        trunk.load_factors({name: value for name, value in factors.items() if name.startswith(mine)})
        trunk.ready()
        return trunk

    def forward(
        self, requests: Sequence[VeiledForward], factors: Mapping[str, Tensor]
    ) -> list[list[Float[Tensor, "batch seq d"]]]:
        """Of each pass the states that enter each block, then the trunk's output.

        Args:
            requests: a pass without a KV cache, or all passes of one, in their order.
            factors: the trunk's LoRA factors, in the host's basis.
        """
        states = [[request.hidden] for request in requests]
        for block in self._cut.trunk:
            trunk = self._trunk(block, factors)
            for request, found in zip(requests, states, strict=True):
                asked = dataclasses.replace(request, keep=False, input_gradient=False, hidden=found[-1])
                found.append(trunk.forward(asked))
        return states

    def backward(
        self,
        request: VeiledForward,
        states: list[Float[Tensor, "batch seq d"]],
        gradient: Float[Tensor, "batch seq d"],
        factors: Mapping[str, Tensor],
    ) -> Replayed:
        """The gradients of the factors, and of the trunk's input if the request wants it.

        Args:
            request: as for `forward`.
            states: what that returned for it.
            gradient: of the trunk's output.
            factors: as for `forward`.
        """
        found: dict[str, Tensor] = {}
        current: Tensor | None = gradient
        for block, entry in reversed(list(zip(self._cut.trunk, states, strict=False))):
            wanted = request.input_gradient or block != self._cut.trunk.start
            trunk = self._trunk(block, factors)
            trunk.forward(dataclasses.replace(request, keep=True, input_gradient=wanted, hidden=entry.detach().clone()))
            assert current is not None  # noqa: S101 - every block but the first wants its input's gradient
            current = trunk.backward(VeiledBackward(request.ticket, current))
            for name, parameter in trunk.parameters.items():
                found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return Replayed(current if request.input_gradient else None, found)
