"""Spot checks of `obfuscatune` where the host returns products: those, its gradients of inputs, and of LoRA factors.

While masked weights pass through the enclave it keeps, of each linear, the image of one secret set of vectors on either side
(`privacy.freivalds`): 4·(in + out) numbers. An answer that is checked is checked in all its rows. The host sees nothing of it, as
no message is added; so it cannot behave well only where it is looked at.

*Detects.* Any falsified answer beyond rounding's tolerance: outputs and input gradients of linears, in training, evaluation and
generation, and factor gradients. *Does not detect.* Changes below the tolerance; answers that are late or missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.config import Config
from veiltune.designs.obfuscatune.options import ObfuscaTuneOptions
from veiltune.models.family import Family, Linear, Operation
from veiltune.models.remote import Context
from veiltune.parties.enclaved.checks import (
    ATTENTION_DROPOUTS,
    Sampler,
    refuse_bfloat16,
    refuse_dropout,
    refuse_foreign_optimizer,
)
from veiltune.parties.enclaved.verdicts import require_right
from veiltune.privacy.freivalds import VECTORS, FactorProjections, Image, Lora, excess
from veiltune.secrets import Secret
from veiltune.transport.messages import SegmentForward


def refuse_spot_checks(options: ObfuscaTuneOptions, config: Config, model_config: Any, *, trains: bool) -> None:
    """Refuse what could not be checked soundly.

    Raises:
        ConfigError: spot checks are asked for together with something that they do not cover.
    """
    if options.spot_checks == 0:
        return
    checked = f"obfuscatune.spot_checks = {options.spot_checks:g}"
    refuse_foreign_optimizer(checked, "obfuscatune", options.optimizer_at)
    refuse_bfloat16(checked, config)
    if trains:  # under "paper" the enclave draws what the model drops
        names = ATTENTION_DROPOUTS if options.placement == "compact" else ()
        refuse_dropout(checked, config, model_config, names)


@final
class SpotChecks(Secret):
    """Implements `models.remote.Witness`.

    Args:
        family: whose linears they are.
        num_layers: blocks.
        scaling: s of LoRA.
        sampler: which answers are checked.
    """

    def __init__(self, family: Family, num_layers: int, scaling: float, sampler: Sampler) -> None:
        self._family = family
        self._operations = family.operations(num_layers, "paper")
        self._linears = {linear.path: linear for linear in family.linears(num_layers)}
        self._scaling = scaling
        self._sampler = sampler
        self._forward: dict[str, Image] = {}
        self._backward: dict[str, Image] = {}
        self._biases: dict[str, Tensor] = {}
        self._factors: Mapping[str, Tensor] = {}
        self._projections: dict[str, FactorProjections] = {}
        self._kept: dict[int, tuple[SegmentForward, Tensor | None]] = {}

    # --- what is kept of the weights and factors --------------------------------------------------------------------------

    def learn(self, masked: Mapping[str, Tensor]) -> None:
        """Keep the images of masked weights that are on their way to the host, and the biases that it adds."""
        for name, value in masked.items():
            path, _, leaf = name.rpartition(".")
            linear = self._linears[path]
            if leaf == "weight":
                self._learn_weight(linear, value if self._family.weights_in_out else value.T)
            else:
                self._learn_bias(linear, value)

    def _learn_weight(self, linear: Linear, weight: Float[Tensor, "in out"]) -> None:
        fan_in, fan_out = weight.shape
        with self._sampler.aside():
            vectors = self._vectors(f"{linear.path}/forward", fan_out)
            self._forward[linear.path] = Image(weight, vectors, self._biases.pop(linear.path, None))
            self._backward[linear.path] = Image(weight.T, self._vectors(self._shared(linear), fan_in))

    def _learn_bias(self, linear: Linear, bias: Float[Tensor, " out"]) -> None:
        """It may come before the weight or after."""
        if linear.path in self._forward:
            self._forward[linear.path].add_bias(bias)
        else:
            self._biases[linear.path] = bias

    def _shared(self, linear: Linear) -> str:
        """Linears that read one input add up to one gradient, so they share its vectors."""
        return f"{linear.key}/backward" if linear.side == "input" else f"{linear.path}/backward"

    def _vectors(self, label: str, size: int) -> Tensor:
        return self._sampler.secret.normal(f"freivalds/{label}", (size, VECTORS))

    def pushed(self, factors: Mapping[str, Tensor]) -> None:
        """The host has these factors now, and a step begins: draw whose gradients will be checked."""
        self.forget()
        self._factors = factors
        self._projections = {}
        with self._sampler.aside():
            for path in (name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")):
                if self._sampler.chosen():
                    self._projections[path] = self._projection(path)

    def _projection(self, path: str) -> FactorProjections:
        """Fresh vectors: as no weight meets them, nothing need be prepared."""
        seed = int(torch.randint(2**62, (), generator=self._sampler.generator))
        generator = torch.Generator().manual_seed(seed)
        fan_in, fan_out = self._factors[f"{path}.lora_A"].shape[1], self._factors[f"{path}.lora_B"].shape[0]
        v, w = (torch.randn(size, VECTORS, generator=generator, dtype=torch.float64) for size in (fan_out, fan_in))
        return FactorProjections(v, w)

    def _lora(self, path: str) -> Lora | None:
        down = self._factors.get(f"{path}.lora_A")
        return None if down is None else Lora(down, self._factors[f"{path}.lora_B"], self._scaling)

    # --- answers -----------------------------------------------------------------------------------------------------------

    def _paths(self, operation: Operation) -> list[str]:
        block = f"{self._family.blocks}.{operation.block}"
        names = operation.segment.inputs if operation.part == "inputs" else (operation.segment.output,)
        return [f"{block}.{name}" for name in names]

    def answered(self, asked: SegmentForward, outputs: tuple[Tensor, ...]) -> None:
        """See `Witness.answered`."""
        paths = self._paths(self._operations[asked.segment])
        shapes = [(*asked.hidden.shape[:-1], len(self._forward[path].vectors)) for path in paths]
        what = f"answer {asked.ticket} ({paths[0]})"
        if [(tuple(output.shape), output.dtype) for output in outputs] != [(s, asked.hidden.dtype) for s in shapes]:
            require_right(f"shape of {what}", float("inf"))
        for path, output in zip(paths, outputs, strict=True):
            if self._sampler.chosen():
                with self._sampler.check():
                    require_right(
                        f"output of {path}", excess(asked.hidden, output, [(self._forward[path], self._lora(path))])
                    )
        if asked.keep:
            needed = any(path in self._projections for path in paths)
            self._kept[asked.ticket] = (asked, asked.hidden if needed else None)

    def answered_backward(self, ticket: int, gradients: tuple[Tensor | None, ...], gradient: Tensor | None) -> None:
        """See `Witness.answered_backward`."""
        asked, hidden = self._kept.pop(ticket)
        paths = self._paths(self._operations[asked.segment])
        given = [(path, value) for path, value in zip(paths, gradients, strict=True) if value is not None]
        if asked.input_gradient and given:
            self._check_gradient(asked, given, gradient)
        for path, value in given:
            if hidden is not None and path in self._projections:
                with self._sampler.aside():
                    self._projections[path].add(hidden, value)

    def _check_gradient(self, asked: SegmentForward, given: list[tuple[str, Tensor]], gradient: Tensor | None) -> None:
        what = f"input gradient of {given[0][0]}"
        if gradient is None or gradient.shape != asked.hidden.shape or gradient.dtype != asked.hidden.dtype:
            require_right(f"shape of the {what}", float("inf"))
        elif self._sampler.chosen():
            with self._sampler.check():
                loras = [self._lora(path) for path, _ in given]
                parts = [
                    (self._backward[path], None if lora is None else lora.turned())
                    for (path, _), lora in zip(given, loras, strict=True)
                ]
                require_right(what, excess(torch.cat([value for _, value in given], dim=-1), gradient, parts))

    def answered_factors(self, gradients: Mapping[str, Tensor]) -> None:
        """The gradients of the factors of all passes since the last push, in the host's basis."""
        for path, projection in self._projections.items():
            lora = self._lora(path)
            found: Any = [gradients.get(f"{path}.lora_{side}") for side in "AB"]
            if lora is None or [getattr(g, "shape", None) for g in found] != [lora.down.shape, lora.up.shape]:
                require_right(f"shape of the factor gradients of {path}", float("inf"))
            else:
                with self._sampler.check(2):
                    require_right(f"factor gradients of {path}", projection.excess(lora, *found))

    def forget(self) -> None:
        """See `Witness.forget`."""
        self._kept.clear()

    def announced(self, context_id: int, context: Context) -> None:
        """See `Witness.announced`. No product depends on it."""

    def finished(self, cache_id: int) -> None:
        """See `Witness.finished`. Every answer was checked, or was not, when it came."""
