"""Canaries of `veil`: steps of the session itself, drawn in secret, that the enclave computes again before their result is used.

A canary must look like any other pass, and its right answer must be known under today's adapter. A row that comes twice does not
do: rotated, it still equals its twin, so the host need only compare rows to be honest with both. A probe whose answer was noted
before training does not either: the adapter moves. So the canaries are real passes. The enclave keeps the rotated trunk on its
disk, sealed, and draws which steps it holds on to; the host is sent nothing that tells. Such a step's passes are computed again,
block by block (`models.rotated.rerun`), before its gradients are used.

*Detects.* In a drawn step, any falsified output, input gradient or factor gradient beyond the tolerance, however well the host
chooses. In evaluation passes outputs, each drawn by itself. *Does not detect.* What is wrong in passes with a KV cache
(generation); changes below the tolerance; answers that are late or missing.

*Bound.* The tolerance is `privacy.bounds.error_bound` of the trunk's depth and width at κ = 1: for outputs relative to the norm
of each row, for gradients to their largest entry. It takes the network's own sensitivity to be of order one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from veiltune.config import Config
from veiltune.designs.veil.options import VeilOptions
from veiltune.errors import ConfigError
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.rotated.rerun import Rerun
from veiltune.parties.enclaved.checks import Sampler, require_right
from veiltune.privacy.bounds import error_bound, product_bound
from veiltune.secrets import Secret
from veiltune.tee.sealing import SealingKey, seal_file, unseal_file
from veiltune.transport.messages import VeiledForward

_DROPOUTS = ("attention_dropout", "attn_pdrop", "activation_dropout")


def refuse_canaries(options: VeilOptions, config: Config, model_config: Any, *, trains: bool) -> None:
    """Refuse what could not be computed again.

    Raises:
        ConfigError: canaries are asked for together with something that they do not cover.
    """
    if options.canaries == 0:
        return
    checked = f"veil.canaries = {options.canaries:g}"
    if options.optimizer_at != "enclave":
        raise ConfigError(
            f"{checked} cannot compute with factors that only the host knows", hint="set veil.optimizer_at = 'enclave'"
        )
    if config.dtype == "bfloat16":
        raise ConfigError(
            f"{checked}: over a whole trunk the rounding of dtype = 'bfloat16' hides any change",
            hint="set dtype = 'float32' or 'float64'",
        )
    names = (*_DROPOUTS, find_family(model_config).residual_dropout or "")
    found = {"lora.dropout": config.lora.dropout}
    found |= {f"{name} of the model": float(getattr(model_config, name, None) or 0) for name in names}
    for what, probability in found.items():
        if trains and 0 < probability < 1:
            raise ConfigError(
                f"{checked} cannot foretell what the host drops: {what} = {probability}", hint="set it to 0"
            )


@final
class SealedTrunk(Secret):
    """The rotated trunk on the enclave's own disk, block by block, under a key that only this session has.

    Args:
        directory: emptied.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = SealingKey.generate()
        self._parts: dict[int, int] = {}
        self.remove()

    def keep(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write some tensors of a block."""
        self._directory.mkdir(parents=True, exist_ok=True)
        part = self._parts.get(block, 0)
        seal_file(self._path(block, part), tensors, {}, self._key, f"trunk/{block}/{part}")
        self._parts[block] = part + 1

    def read(self, block: int) -> dict[str, Tensor]:
        """All tensors of a block.

        Raises:
            CheckpointError: a file was altered or is gone.
        """
        found: dict[str, Tensor] = {}
        for part in range(self._parts.get(block, 0)):
            found |= unseal_file(self._path(block, part), self._key, f"trunk/{block}/{part}").tensors
        return found

    def _path(self, block: int, part: int) -> Path:
        return self._directory / f"block-{block}-{part}.sealed"

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._directory, ignore_errors=True)


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

    # --- what is kept of the weights and factors --------------------------------------------------------------------------

    def learn(self, folded: Mapping[str, Tensor]) -> None:
        """Keep tensors that are on their way to the host, or on its disk."""
        blocks: dict[int, dict[str, Tensor]] = {}
        for name, value in folded.items():
            blocks.setdefault(int(name.removeprefix(self._prefix).partition(".")[0]), {})[name] = value
            self._width = max(self._width, *value.shape)
        with self._sampler.aside():
            for block, tensors in blocks.items():
                self._trunk.keep(block, tensors)

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
        """See `PassWitness.answered`. What no backward follows is checked at once."""
        if asked.cache_id or not (self._drawn if asked.keep else self._sampler.chosen()):
            return
        made = _Pass(asked, output)
        if asked.keep:
            self._passes[asked.ticket] = made
        else:
            with self._sampler.check():
                self._check_output(made)

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
                states = self._check_output(made)
            if made.gradient is None:
                continue
            with self._sampler.aside():
                replayed = self._rerun.backward(made.request, states, made.gradient, self._factors)
                if replayed.entry is not None:
                    what = f"gradient of the trunk's input in pass {made.request.ticket}"
                    keep = made.request.attention_mask
                    self._compare_gradient(what, _at(made.entry, keep), _at(replayed.entry, keep))
                for name, value in replayed.factors.items():
                    sums[name] += value
        for name, value in sums.items():
            self._compare_gradient(f"gradient of {name}", gradients.get(name), value)

    def _bound(self, quantity: str, value: Tensor) -> float:
        eps = torch.finfo(value.dtype).eps
        return error_bound(quantity, product_bound(self._width, 1.0, eps), products=self._products)

    def _check_output(self, made: _Pass) -> list[Tensor]:
        """Compare a pass's output, row by row; returns the states on the way."""
        states = self._rerun.forward(made.request, self._factors)
        what = f"output of the trunk in pass {made.request.ticket}"
        keep = made.request.attention_mask
        got, right = _at(made.output, keep), _at(states[-1], keep)
        if got is None or right is None or got.shape != right.shape:
            require_right(f"shape of the {what}", float("inf"))
        else:
            allowed = self._bound("logits", right) * right.norm(dim=-1)
            require_right(what, _largest((got.to(right) - right).norm(dim=-1), allowed))
        return states

    def _compare_gradient(self, what: str, got: Tensor | None, right: Tensor | None) -> None:
        if got is None or right is None or got.shape != right.shape:
            require_right(f"shape of the {what}", float("inf"))
        elif right.numel():
            allowed = self._bound("gradients", right) * right.abs().max()
            require_right(what, _largest((got.to(right) - right).abs(), allowed))


def _at(states: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """The rows (tokens, d) of real tokens; what is computed for padding is nobody's business."""
    if states is None or keep is None or states.shape[:2] != keep.shape:
        return states
    return states[keep.to(states.device)]


def _largest(error: Tensor, allowed: Tensor) -> float:
    """The largest error in units of what is allowed; NaN counts as ∞, 0 of 0 as 0."""
    ratio = error / (allowed + torch.finfo(error.dtype).tiny)
    return float(torch.where(ratio.isfinite(), ratio, torch.inf).max())
