"""Spot checks of `obfuscatune` where the host runs whole segments: what is drawn is computed again, in the host's basis.

A whole segment is no product, so no image of a weight can tell whether its answer is right. Instead the masked weights are kept
on the enclave's disk, sealed, and a drawn segment is computed again by the host's own module of that block (`models.trunk`). The
host is sent nothing for it, so it cannot behave well only where it is looked at.

*Detects.* In segments that are drawn for a step, any falsified output, input gradient or factor gradient, before the step's
gradients are used. In evaluation outputs, each drawn by itself, before they are used; in generations those of MLPs likewise, and
those of drawn attentions at the end, when the tokens were shown. *Does not detect.* Changes below the tolerance; answers that are
late or missing.

*Bound.* `privacy.bounds.error_bound` of one segment's two products, at the width and κ of the worse of its keys: for outputs
relative to each row's norm, for gradients to their largest entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from veiltune.config import LoraConfig
from veiltune.models.adapters import Keys
from veiltune.models.families import find_family
from veiltune.models.family import Operation
from veiltune.models.remote import Context
from veiltune.models.trunk import HostTrunk
from veiltune.parties.enclaved.checks import Sampler
from veiltune.parties.enclaved.sealed_trunk import SealedTrunk
from veiltune.parties.enclaved.verdicts import Allowed, require_close, require_close_rows
from veiltune.privacy.bounds import error_bound, product_bound
from veiltune.secrets import Secret
from veiltune.transport.messages import SegmentBackward, SegmentForward

_PRODUCTS = 2
"""One behind the other in a segment: its inputs' and its output's."""


@dataclass(repr=False)
class _Crossing:
    """One answer that will be held against what is computed here."""

    asked: SegmentForward
    context: Context | None
    output: Tensor
    gradients: tuple[Tensor | None, ...] | None = None
    entry: Tensor | None = None


@final
class SegmentReruns(Secret):
    """Implements `models.remote.Witness`.

    Args:
        model_config: the architecture.
        lora: the adapter's shape.
        device: where to compute.
        directory: for the sealed trunk.
        keys: for their κ.
        sampler: which segments are checked.
    """

    def __init__(
        self,
        model_config: Any,
        lora: LoraConfig,
        device: torch.device,
        directory: Path,
        keys: Keys,
        sampler: Sampler,
    ) -> None:
        family = find_family(model_config)
        self._config, self._lora, self._device = model_config, lora, device
        self._blocks = family.blocks
        self._operations = family.operations(int(model_config.num_hidden_layers), "compact")
        self._trunk = SealedTrunk(directory)
        self._keys = keys
        self._sampler = sampler
        self._width = int(model_config.hidden_size)
        self._factors: Mapping[str, Tensor] = {}
        self._contexts: dict[int, Context] = {}
        self._drawn: dict[int, list[_Crossing]] = {}
        self._waiting: dict[int, _Crossing] = {}
        self._cached: dict[int, dict[int, list[_Crossing]]] = {}

    # --- what is kept of the weights and factors --------------------------------------------------------------------------

    def learn(self, masked: Mapping[str, Tensor]) -> None:
        """Keep tensors that are on their way to the host."""
        self._width = max([self._width, *(size for value in masked.values() for size in value.shape)])
        with self._sampler.aside():
            self._trunk.keep_by_block(f"{self._blocks}.", masked)

    def pushed(self, factors: Mapping[str, Tensor]) -> None:
        """The host has these factors now, and a step begins: draw the segments that will be checked."""
        self.forget()
        self._factors = factors
        self._drawn = self._draw()

    def _draw(self) -> dict[int, list[_Crossing]]:
        return {operation.index: [] for operation in self._operations if self._sampler.chosen()}

    def close(self) -> None:
        """The session is over."""
        self._trunk.remove()

    # --- answers -----------------------------------------------------------------------------------------------------------

    def announced(self, context_id: int, context: Context) -> None:
        """See `Witness.announced`."""
        self._contexts[context_id] = context

    def answered(self, asked: SegmentForward, outputs: tuple[Tensor, ...]) -> None:
        """See `Witness.answered`. What no backward follows is checked at once, but for a KV cache's passes."""
        output = outputs[0] if len(outputs) == 1 else torch.empty(0)
        made = _Crossing(asked, self._contexts.get(asked.context_id), output)
        if asked.cache_id:
            if asked.cache_id not in self._cached:
                self._cached[asked.cache_id] = self._draw()
            if asked.segment in self._cached[asked.cache_id]:
                self._cached[asked.cache_id][asked.segment].append(made)
        elif not asked.keep:
            if self._sampler.chosen():
                self._check(asked.segment, [made])
        elif asked.segment in self._drawn:
            self._drawn[asked.segment].append(made)
            self._waiting[asked.ticket] = made

    def answered_backward(self, ticket: int, gradients: tuple[Tensor | None, ...], gradient: Tensor | None) -> None:
        """See `Witness.answered_backward`."""
        if (made := self._waiting.pop(ticket, None)) is not None:
            made.gradients, made.entry = gradients, gradient

    def answered_factors(self, gradients: Mapping[str, Tensor]) -> None:
        """The gradients of the factors of all passes since the last push, in the host's basis."""
        for segment, crossings in self._drawn.items():
            if crossings:
                found = self._check(segment, crossings)
                with self._sampler.check(len(found)):
                    for name, value in found.items():
                        require_close(f"gradient of {name}", gradients.get(name), value, self._allowed(segment))

    def finished(self, cache_id: int) -> None:
        """See `Witness.finished`: the drawn attentions of a generation, all its passes."""
        for segment, crossings in self._cached.pop(cache_id, {}).items():
            if crossings:
                self._check(segment, crossings)

    def forget(self) -> None:
        """See `Witness.forget`."""
        self._waiting.clear()
        self._contexts.clear()

    # --- once more ---------------------------------------------------------------------------------------------------------

    def _check(self, segment: int, crossings: Sequence[_Crossing]) -> dict[str, Tensor]:
        """Compute crossings of one segment again and compare; returns the gradients of its factors, summed."""
        operation, allowed = self._operations[segment], self._allowed(segment)
        named = f"{self._blocks}.{operation.block}, {operation.segment.name}"
        with self._sampler.aside():
            trunk = self._host_of(operation.block)
        for made in crossings:
            with self._sampler.check(1 if made.gradients is None else 2):
                right = _again(trunk, made)
                require_close_rows(f"output of {named}", *_finite(made.output, right), allowed)
                if made.gradients is None:
                    continue
                entry = trunk.backward(SegmentBackward(made.asked.ticket, made.gradients))
                if entry is not None:
                    require_close(f"input gradient of {named}", made.entry, entry, allowed)
        return self._gradients(trunk, operation)

    def _host_of(self, block: int) -> HostTrunk:
        trunk = HostTrunk(self._config, "compact", self._lora, self._device, rounded=False, only=block)
        trunk.load(self._trunk.read(block))
        mine = f"{self._blocks}.{block}."
        trunk.load_factors({name: value for name, value in self._factors.items() if name.startswith(mine)})
        trunk.ready()
        return trunk

    def _gradients(self, trunk: HostTrunk, operation: Operation) -> dict[str, Tensor]:
        paths = (*operation.segment.inputs, operation.segment.output)
        mine = tuple(f"{self._blocks}.{operation.block}.{path}.lora_" for path in paths)
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in trunk.parameters.items()
            if name.startswith(mine)
        }

    def _allowed(self, segment: int) -> Allowed:
        operation = self._operations[segment]
        labels = (operation.key_in, operation.key_out)
        worst = max(self._keys[label].condition_number for label in labels if label is not None)

        def allowed(quantity: str, value: Tensor) -> float:
            product = product_bound(self._width, worst, torch.finfo(value.dtype).eps)
            return error_bound(quantity, product, products=_PRODUCTS)

        return allowed


def _again(trunk: HostTrunk, made: _Crossing) -> Tensor:
    asked = made.asked
    if made.context is not None:
        trunk.set_context(asked.context_id, *made.context)
    hidden = asked.hidden.detach().clone()
    (output,) = trunk.forward(dataclasses.replace(asked, keep=made.gradients is not None, hidden=hidden))
    return output


def _finite(got: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Without the rows of padding, of which attention may make what is no number."""
    if got.shape != right.shape:
        return got, right
    rows = right.isfinite().all(dim=-1)
    return got[rows.to(got.device)], right[rows]
