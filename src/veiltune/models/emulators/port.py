"""The owner's emulator behind the stub, in the trunk's place: what would be sent goes through it instead, and nothing crosses.

So what the stub does to a pass is done alike in tuning and in inference: what it notes, and which positions it leaves out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.errors import UserError
from veiltune.models.cut import Trunk
from veiltune.models.trunk_stub import TrunkContext


class EmulatorPort:
    """Implements `models.trunk_stub.TrunkPort` by an emulator in this process.

    Args:
        trunk: of `models.emulators.blocks.emulated_trunk`.
    """

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._ticket = 0

    def forward(self, hidden: Float[Tensor, "batch seq d"], context: TrunkContext) -> tuple[int, Tensor]:
        """States through the emulator, with a graph if a backward is to follow.

        Raises:
            UserError: a KV cache.
        """
        if context.cache_id:
            raise UserError(
                "the emulator keeps no KV cache", hint="generate through the trunk, or pass use_cache=False"
            )
        mask, positions = context.attention_mask, context.position_ids
        self._ticket += 1
        with torch.set_grad_enabled(context.keep):
            entry = hidden.detach().requires_grad_(context.keep)
            output = self._trunk.forward(entry, mask, positions, None, training=context.training)
        if context.keep:
            self._kept[self._ticket] = (entry, output)
        return self._ticket, output.detach()

    def backward(self, ticket: int, gradient: Tensor) -> Tensor:
        """The gradient of that forward's input, from that of its output."""
        entry, output = self._kept.pop(ticket)
        return torch.autograd.grad(output, entry, gradient)[0]

    def forget(self) -> None:
        """Free the graphs of passes that had no backward (a loss that was not finite)."""
        self._kept.clear()
