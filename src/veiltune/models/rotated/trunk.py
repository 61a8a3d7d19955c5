"""The host's trunk: an ordinary `transformers` module in the rotated basis, with PEFT's LoRA layers around its linears.

It is the half that `models.cut` builds, with other norms. Attention, KV cache, rotary embedding and masks are `transformers`'
own. The host knows the architecture, never a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.config import LoraConfig
from veiltune.errors import ProtocolError
from veiltune.models.adapters import adapted_linears, inject_adapters
from veiltune.models.cut import Cut, Trunk, trunk_model
from veiltune.models.families import find_family
from veiltune.models.rotated.folding import trunk_norms
from veiltune.models.rotated.native import Native, apply_native, uncompiled
from veiltune.models.rotated.norms import GainNorm, SandwichNorm, StreamNorm, epsilon, is_rms_norm
from veiltune.models.skeleton import blocks_of
from veiltune.models.trunk import AdaptedTrunk
from veiltune.transport.messages import VeiledBackward, VeiledForward


def rotated_model(config: Any, cut: Cut) -> nn.Module:
    """A `trunk_model` with the norms of the rotated basis, on the meta device.

    Norms' tensors have other names than in the plain model: ``constant`` of a LayerNorm with bias, ``gain`` of a norm on a
    branch's output or on Q and K, else none.
    """
    family = find_family(config)
    model = trunk_model(config, cut)
    for index in cut.trunk:
        block = blocks_of(model, family)[index]
        for path, kind in trunk_norms(block, family.segments):
            norm: Any = block.get_submodule(path)
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, _norm_for(norm, kind, int(config.hidden_size)))
    return model


def _norm_for(norm: Any, kind: str, dim: int) -> nn.Module:
    eps = epsilon(norm)
    if kind == "sandwich":
        return SandwichNorm(dim, eps)
    if kind == "qk":
        return GainNorm(int(norm.weight.shape[0]), eps)
    return StreamNorm(dim, eps, has_constant=not is_rms_norm(norm) and norm.bias is not None)


class RotatedTrunk(AdaptedTrunk):
    """A rotated trunk with its factors, and the graphs of the forwards whose backward is still to come.

    Args:
        config: the architecture (`transformers`).
        cut: which blocks are the trunk.
        lora: the adapter's shape.
        device: where to compute.
        rounded: imitate bfloat16 (see `models.precision`).
        native: how the module is run; ``None``: as it is.
    """

    def __init__(
        self,
        config: Any,
        cut: Cut,
        lora: LoraConfig,
        device: torch.device,
        *,
        rounded: bool,
        native: Native | None = None,
    ) -> None:
        family = find_family(config)
        linears = adapted_linears(family, cut.num_layers, lora, cut.trunk)
        adapted = [linear.path for linear in linears]
        super().__init__(rotated_model(config, cut), family, adapted, device, rounded=rounded)
        self._writers = {linear.path for linear in linears if linear.side == "output"}
        if linears:
            model: Any = self.model
            model._tied_weights_keys = None  # PEFT would look for the embedding, which is not here
            inject_adapters(self.model, lora, family, cut.num_layers, paths=adapted)
        self.trunk = Trunk(self.model, config, cut)
        self.native = native or Native()
        self._caches: dict[int, Any] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def held_blocks(self) -> list[nn.Module]:
        """See `AdaptedTrunk.held_blocks`."""
        blocks = super().held_blocks()
        return [blocks[index] for index in self.trunk.cut.trunk]

    def ready(self) -> None:
        """See `AdaptedTrunk.ready`; then the module is run as asked for."""
        super().ready()
        apply_native(self.model, self.held_blocks(), self.native)

    def fuse(self) -> None:
        """See `AdaptedTrunk.fuse`; a compiler fuses better by itself, and does not see through ours."""
        if self.native.compiler is None:
            super().fuse()

    def forward(self, request: VeiledForward) -> Tensor:
        """Run the trunk, keeping the graph if a backward is to follow."""
        entry = request.hidden.to(self.device)
        mask, positions = request.attention_mask, request.position_ids
        with torch.set_grad_enabled(request.keep), uncompiled(when=request.cache_id > 0):
            entry.requires_grad_(request.keep and request.input_gradient)
            output = self.trunk.forward(
                entry,
                None if mask is None else mask.to(self.device),
                None if positions is None else positions.to(self.device),
                self._cache(request.cache_id),
                training=request.training,
            )
        if request.keep:
            self._kept[request.ticket] = (entry, output)
        return output.detach()

    def _cache(self, cache_id: int) -> Any:
        if cache_id == 0:
            return None
        if cache_id not in self._caches:
            self._caches[cache_id] = self.trunk.new_cache()
        return self._caches[cache_id]

    def backward(self, request: VeiledBackward) -> Tensor | None:
        """Gradient of a kept forward's input, if it wants one; the factors' gradients accumulate here."""
        if request.ticket not in self._kept:
            raise ProtocolError(f"no kept forward {request.ticket}")
        entry, output = self._kept.pop(request.ticket)
        gradient = request.gradient.to(self.device)
        if gradient.shape != output.shape:
            raise ProtocolError(f"a gradient of {tuple(gradient.shape)} for an output of {tuple(output.shape)}")
        if output.requires_grad:
            output.backward(gradient)
        return entry.grad

    def forget(self, cache_id: int) -> None:
        """Free one cache, or (0) every kept graph."""
        if cache_id:
            self._caches.pop(cache_id, None)
        else:
            self._kept.clear()

    def stay_centred(self, factors: Mapping[str, nn.Parameter] | None = None) -> None:
        """After a step on ``factors`` (``None``: those here): take out of the writers' what they have along the constant channel.

        No plain adapter could say it: in LayerNorm families a state has no mean. Nothing to do in others.
        """
        constant = self._constant()
        if constant is None:
            return
        with torch.no_grad():
            for path, parameter in (self.parameters if factors is None else factors).items():
                if path.endswith("lora_B") and path.rpartition(".")[0] in self._writers:
                    unit = (constant / constant.norm()).to(parameter)
                    parameter.sub_(torch.outer(unit, unit @ parameter))

    def _constant(self) -> Tensor | None:
        found = (m.constant for m in self.model.modules() if isinstance(m, StreamNorm) and m.constant is not None)
        return next((value for value in found if bool(value.any())), None)
