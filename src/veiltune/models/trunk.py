"""The host's half: obfuscated linears with their LoRA factors, run segment by segment on masked states.

The modules are `transformers`' own attention and MLP with PEFT's LoRA layers; only the numbers in them are masked, and the
LoRA layers compute in fewer passes (`models.fused_lora`). The host knows the architecture, never a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.config import LoraConfig, TrainConfig
from veiltune.errors import ProtocolError
from veiltune.models.adapters import adapted_linears, factor_parameters, inject_adapters, place_factors
from veiltune.models.families import find_family
from veiltune.models.family import Family, Operation, Placement
from veiltune.models.fused_lora import fuse_lora
from veiltune.models.precision import round_between_operations
from veiltune.models.skeleton import assign_parameter, blocks_of, empty_model, keep_modules, require_complete
from veiltune.transport.messages import SegmentBackward, SegmentForward


class AdaptedTrunk:
    """Part of a model that is filled from messages: parameters in a secret basis, PEFT's LoRA layers around its linears.

    Args:
        model: on the meta device, LoRA layers injected.
        family: its family.
        adapted: paths of the linears with LoRA layers.
        device: where to compute.
        rounded: imitate bfloat16 (see `models.precision`).
    """

    def __init__(
        self, model: nn.Module, family: Family, adapted: list[str], device: torch.device, *, rounded: bool
    ) -> None:
        self.model = model
        self.family = family
        self.adapted = adapted
        self.device = device
        self.rounded = rounded

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters, by the names of the model before LoRA was put in."""
        adapted = set(self.adapted)
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            place = f"{path}.base_layer.{leaf}" if path in adapted else name
            assign_parameter(self.model, place, value.to(self.device))

    def load_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Take LoRA factors in the basis of their linears."""
        place_factors(self.model, {name: value.to(self.device) for name, value in factors.items()})

    def ready(self) -> None:
        """Check that every parameter has come, and settle the precision."""
        require_complete(self.model)
        self.model.eval()  # what PEFT put in would still be training, and a pass changes modes only where they differ
        if self.rounded:
            round_between_operations(self.model)  # at the leaf modules, which fused layers would skip
            return
        self.fuse()

    def fuse(self) -> None:
        """Have LoRA layers compute in fewer passes."""
        for block in self.held_blocks():
            for segment in self.family.segments:
                fuse_lora(block, (segment.inputs, (segment.output,)))

    def held_blocks(self) -> list[nn.Module]:
        """The blocks whose linears are here."""
        return blocks_of(self.model, self.family)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA factors, by flat name."""
        return factor_parameters(self.model, self.adapted)


class HostTrunk(AdaptedTrunk):
    """Obfuscated linears of all blocks, and the graphs of the forwards whose backward is still to come.

    Args:
        config: the architecture (`transformers`).
        placement: whole segments (``compact``) or single linears (``paper``).
        lora: the adapter's shape.
        device: where to compute.
        rounded: imitate bfloat16 (see `models.precision`).
        only: a single block that is here; ``None``: all are.
    """

    def __init__(
        self,
        config: Any,
        placement: Placement,
        lora: LoraConfig,
        device: torch.device,
        *,
        rounded: bool,
        only: int | None = None,
    ) -> None:
        family, num_layers = find_family(config), config.num_hidden_layers
        self._here = range(num_layers) if only is None else (only,)
        adapted = [linear.path for linear in adapted_linears(family, num_layers, lora, self._here)]
        super().__init__(empty_model(config), family, adapted, device, rounded=rounded)
        self.config = config
        self.operations = family.operations(num_layers, placement)
        held = {linear.path for linear in family.linears(num_layers)}
        if placement == "compact":
            held |= {path for _, path in family.exposed(num_layers)}
        here = tuple(f"{family.blocks}.{block}." for block in self._here)
        self._move_output_terms_away()
        inject_adapters(self.model, lora, family, num_layers, paths=adapted)
        keep_modules(self.model, {path for path in held if path.startswith(here)})
        self.blocks = blocks_of(self.model, self.family)
        self._contexts: dict[int, dict[str, Any]] = {}
        self._caches: dict[int, Any] = {}
        self._kept: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def held_blocks(self) -> list[nn.Module]:
        """See `AdaptedTrunk.held_blocks`."""
        return [self.blocks[index] for index in self._here]

    def _move_output_terms_away(self) -> None:
        """The enclave adds the output side's bias and applies its dropout, after unmasking."""
        for block in self._here:
            for segment in self.family.segments:
                linear: Any = self.model.get_submodule(f"{self.family.blocks}.{block}.{segment.output}")
                if self.family.weights_in_out:  # Conv1D always adds a bias
                    del linear.bias
                    linear.register_buffer("bias", torch.zeros(linear.nf, device=self.device), persistent=False)
                else:
                    linear.bias = None
                if segment.dropout is not None:
                    parent, _, leaf = segment.dropout.rpartition(".")
                    setattr(self.model.get_submodule(f"{self.family.blocks}.{block}.{parent}"), leaf, nn.Identity())

    def ready(self) -> None:
        """See `AdaptedTrunk.ready`; the zeros that stand for an output side's bias take the weights' dtype."""
        for module in self.model.modules():
            if isinstance(bias := module._buffers.get("bias"), Tensor) and isinstance(module.weight, Tensor):
                module.register_buffer("bias", bias.to(module.weight.dtype), persistent=False)
        super().ready()

    def set_context(self, context_id: int, mask: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
        """Remember what the attentions of a pass need beside hidden states."""
        values: dict[str, Any] = {"attention_mask": None if mask is None else mask.to(self.device)}
        if cos is not None and sin is not None:
            values["position_embeddings"] = (cos.to(self.device), sin.to(self.device))
        self._contexts[context_id] = values

    def forward(self, request: SegmentForward) -> tuple[Tensor, ...]:
        """Run one operation on masked input; keep its graph if a backward is to follow."""
        if not 0 <= request.segment < len(self.operations):
            raise ProtocolError(f"no operation {request.segment} in a trunk of {len(self.operations)}")
        operation = self.operations[request.segment]
        block: Any = self.blocks[operation.block]
        if block.training is not request.training:  # a walk over the modules, twice a block
            block.train(request.training)
        entry = request.hidden.to(self.device)
        with torch.set_grad_enabled(request.keep):
            entry.requires_grad_(request.keep and request.input_gradient)
            outputs = self._run(operation, block, entry, request.context_id, request.cache_id)
        if request.keep:
            self._kept[request.ticket] = (entry, outputs)
        return tuple(output.detach() for output in outputs)

    def _run(
        self, operation: Operation, block: Any, hidden: Tensor, context_id: int, cache_id: int
    ) -> tuple[Tensor, ...]:
        segment = operation.segment
        if operation.part == "inputs":
            return tuple(block.get_submodule(path)(hidden) for path in segment.inputs)
        if operation.part == "output":
            return (block.get_submodule(segment.output)(hidden),)
        if segment.name == "mlp":
            return (self.family.call_mlp(block, hidden),)
        context = self._contexts.get(context_id)
        if context is None:
            raise ProtocolError(f"no context {context_id} was announced")
        attention = block.get_submodule(segment.module)
        return (attention(hidden_states=hidden, past_key_values=self._cache(cache_id), **context)[0],)

    def _cache(self, cache_id: int) -> Any:
        if cache_id == 0:
            return None
        if cache_id not in self._caches:
            from transformers import DynamicCache

            self._caches[cache_id] = DynamicCache(config=self.config)
        return self._caches[cache_id]

    def backward(self, request: SegmentBackward) -> Tensor | None:
        """Gradient of a kept operation's input, if it wants one; the factors' gradients accumulate here."""
        if request.ticket not in self._kept:
            raise ProtocolError(f"no kept forward {request.ticket}")
        entry, outputs = self._kept.pop(request.ticket)
        pairs = [
            (output, gradient.to(self.device))
            for output, gradient in zip(outputs, request.gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return entry.grad

    def forget(self, cache_id: int) -> None:
        """Free one cache, or (0) every kept graph and context."""
        if cache_id:
            self._caches.pop(cache_id, None)
        else:
            self._kept.clear()
            self._contexts.clear()


def make_optimizer(parameters: Mapping[str, nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser the configuration names, over the LoRA factors; its learning rate is set before each step."""
    values = list(parameters.values())
    if train.optimizer == "sgd":
        return torch.optim.SGD(values, lr=train.learning_rate, weight_decay=train.weight_decay)
    return torch.optim.AdamW(values, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
