"""What the owner would return to the provider without protection: gradients of the plain model on the true labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veiltune.evaluation.truth import TruePass
from veiltune.models.families import find_family
from veiltune.models.skeleton import blocks_of
from veiltune.privacy.quantisation import WireCodec
from veiltune.transport.messages import Message, TrunkBackward, TrunkOutput


class PlainReturns:
    """The trunk's outputs of the plain model, and the gradients there of the mean loss, for passes that are asked for.

    A ticket names the last forward of it that went before, for sessions count anew.

    Args:
        model: the plain causal language model.
        top_layers: its blocks above the upper cut.
        passes: the true texts, by the number of the message that begins their pass.
        targets: rows that are asked for, by that number; ``None``: all.
    """

    def __init__(
        self, model: Any, top_layers: int, passes: Mapping[int, TruePass], targets: Mapping[int, Sequence[int]] | None
    ) -> None:
        self._model = model
        self._passes = passes
        self._targets = targets
        self._numbers: dict[int, int] = {}
        self._made: tuple[int, Tensor, Tensor] | None = None
        blocks = blocks_of(model, find_family(model.config))
        self._block = blocks[len(blocks) - top_layers - 1]

    def begun(self, number: int, ticket: int) -> None:
        """A forward crossed under this ticket."""
        self._numbers[ticket] = number

    def answered(self, message: TrunkOutput | TrunkBackward, codec: WireCodec) -> Message:
        """The message with the plain model's output or gradient of its pass."""
        number = self._numbers.get(message.ticket)
        if number is None or (self._targets is not None and number not in self._targets):
            return message
        if self._made is None or self._made[0] != number:
            self._made = (number, *self._computed(self._passes[number]))
        _, output, gradient = self._made
        if isinstance(message, TrunkOutput):
            return dataclasses.replace(message, hidden=codec.encode(output))
        return dataclasses.replace(message, gradient=codec.encode(gradient))

    def _computed(self, true: TruePass) -> tuple[Float[Tensor, "batch seq d"], Float[Tensor, "batch seq d"]]:
        """Output of the block below the upper cut, and the gradient there of the mean cross-entropy."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            kept.append(states.detach().requires_grad_())
            return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

        handle = self._block.register_forward_hook(keep)
        try:
            with torch.enable_grad():
                logits = self._model(input_ids=true.ids, attention_mask=true.mask, use_cache=False).logits
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), true.labels[:, 1:].flatten())
                (gradient,) = torch.autograd.grad(loss, kept[0])
        finally:
            handle.remove()
        return kept[0].detach(), gradient
