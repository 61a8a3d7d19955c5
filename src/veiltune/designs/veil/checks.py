"""Canaries of `veil`: steps of the session itself, drawn in secret, that the enclave computes again before their result is used.

A canary must look like any other pass, and its right answer must be known under today's adapter. A row that comes twice does not
do: rotated, it still equals its twin, so the host need only compare rows to be honest with both. A probe whose answer was noted
before training does not either: the adapter moves. So the canaries are real passes. The enclave keeps the rotated trunk on its
disk, sealed, and draws which steps it holds on to; the host is sent nothing that tells. Such a step's passes are computed again,
block by block (`models.rotated.rerun`), before its gradients are used.

*Detects.* In a drawn step, any falsified output, input gradient or factor gradient beyond the tolerance, however well the host
chooses. In evaluation passes outputs, each drawn by itself. In generations, each drawn by itself, outputs: at its end, when its
tokens were shown. *Does not detect.* Changes below the tolerance; answers that are late or missing.

*Bound.* The tolerance is `privacy.bounds.error_bound` of the trunk's depth and width at κ = 1: for outputs relative to the norm
of each row, for gradients to their largest entry. It takes the network's own sensitivity to be of order one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from veiltune.config import Config
from veiltune.designs.veil.options import VeilOptions
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.rotated.rerun import Rerun
from veiltune.parties.enclaved.checks import (
    ATTENTION_DROPOUTS,
    Sampler,
    refuse_bfloat16,
    refuse_dropout,
    refuse_foreign_optimizer,
)
from veiltune.parties.enclaved.sealed_trunk import SealedTrunk
from veiltune.parties.enclaved.verdicts import require_close, require_close_rows
from veiltune.privacy.bounds import error_bound, product_bound
from veiltune.secrets import Secret
from veiltune.transport.messages import VeiledForward


def refuse_canaries(options: VeilOptions, config: Config, model_config: Any, *, trains: bool) -> None:
    """Refuse what could not be computed again.

    Raises:
        ConfigError: canaries are asked for together with something that they do not cover.
    """
    if options.canaries == 0:
        return
    checked = f"veil.canaries = {options.canaries:g}"
    refuse_foreign_optimizer(checked, "veil", options.optimizer_at)
    refuse_bfloat16(checked, config)
    if trains:
        names = (*ATTENTION_DROPOUTS, find_family(model_config).residual_dropout or "")
        refuse_dropout(checked, config, model_config, names)


@dataclass(repr=False)
class _Pass:
    """One pass of a drawn step, as it was asked for and answered."""

    request: VeiledForward
    output: Tensor
    gradient: Tensor | None = None
    entry: Tensor | None = None


@final
class Canaries(Secret):
    """Implements `models.rotated.stub.PassWitness`.

    Args:
        model_config: the architecture.
        cut: which blocks are the trunk.
        config: of the session.
        device: the enclave's.
        directory: for the sealed trunk.
        sampler: which steps and evaluations are canaries.
    """

    def __init__(
        self, model_config: Any, cut: Cut, config: Config, device: torch.device, directory: Path, sampler: Sampler
    ) -> None:
        family = find_family(model_config)
        self._prefix = f"{family.blocks}."
        self._trunk = SealedTrunk(directory)
        self._rerun = Rerun(model_config, cut, config.lora, device, self._trunk.read)
        self._products = sum(2 if s.post_norm is None else 3 for s in family.segments) * len(cut.trunk)
        self._sampler = sampler
        self._width = int(model_config.hidden_size)
        self._factors: Mapping[str, Tensor] = {}
        self._drawn = False
        self._passes: dict[int, _Pass] = {}
        self._cached: dict[int, list[_Pass] | None] = {}

    # --- what is kept of the weights and factors --------------------------------------------------------------------------

    def learn(self, folded: Mapping[str, Tensor]) -> None:
        """Keep tensors that are on their way to the host, or on its disk."""
        self._width = max([self._width, *(size for value in folded.values() for size in value.shape)])
        with self._sampler.aside():
            self._trunk.keep_by_block(self._prefix, folded)

    def pushed(self, factors: Mapping[str, Tensor]) -> None:
        """The host has these factors now, and a step begins: draw whether it is a canary."""
        self._factors = factors
        self._passes.clear()
        self._drawn = self._sampler.chosen()

    def close(self) -> None:
        """The session is over."""
        self._trunk.remove()

    # --- answers -----------------------------------------------------------------------------------------------------------

    def answered(self, asked: VeiledForward, output: Tensor) -> None:
        """See `PassWitness.answered`. What no backward follows is checked at once, but for a KV cache's passes."""
        if asked.cache_id:
            if asked.cache_id not in self._cached:
                self._cached[asked.cache_id] = [] if self._sampler.chosen() else None
            if (passes := self._cached[asked.cache_id]) is not None:
                passes.append(_Pass(asked, output))
        elif asked.keep and self._drawn:
            self._passes[asked.ticket] = _Pass(asked, output)
        elif not asked.keep and self._sampler.chosen():
            with self._sampler.check():
                self._check_outputs([_Pass(asked, output)])

    def finished(self, cache_id: int) -> None:
        """See `PassWitness.finished`: a drawn generation is computed again as a whole."""
        if passes := self._cached.pop(cache_id, None):
            with self._sampler.check():
                self._check_outputs(passes)

    def answered_backward(self, ticket: int, gradient: Tensor, entry: Tensor | None) -> None:
        """See `PassWitness.answered_backward`."""
        if ticket in self._passes:
            self._passes[ticket].gradient, self._passes[ticket].entry = gradient, entry

    def answered_factors(self, gradients: Mapping[str, Tensor]) -> None:
        """The gradients of the factors of all passes since the last push, in the host's basis."""
        if not self._drawn:
            return
        sums = {name: torch.zeros_like(value) for name, value in self._factors.items()}
        for made in self._passes.values():
            with self._sampler.check():
                states = self._check_outputs([made])
            if made.gradient is None:
                continue
            with self._sampler.aside():
                replayed = self._rerun.backward(made.request, states, made.gradient, self._factors)
                if replayed.entry is not None:
                    what = f"gradient of the trunk's input in pass {made.request.ticket}"
                    keep = made.request.attention_mask
                    require_close(what, made.entry, replayed.entry, self._allowed, keep=keep)
                for name, value in replayed.factors.items():
                    sums[name] += value
        for name, value in sums.items():
            require_close(f"gradient of {name}", gradients.get(name), value, self._allowed)

    def _check_outputs(self, passes: Sequence[_Pass]) -> list[Tensor]:
        """Compare the outputs of one pass, or of those of one KV cache, row by row; returns the states on the last's way."""
        found = self._rerun.forward([made.request for made in passes], self._factors)
        for made, states in zip(passes, found, strict=True):
            what = f"output of the trunk in pass {made.request.ticket}"
            require_close_rows(what, made.output, states[-1], self._allowed, keep=made.request.attention_mask)
        return found[-1]

    def _allowed(self, quantity: str, value: Tensor) -> float:
        eps = torch.finfo(value.dtype).eps
        return error_bound(quantity, product_bound(self._width, 1.0, eps), products=self._products)
