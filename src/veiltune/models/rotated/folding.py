"""Folding: a trunk's plain tensors, as they come, into those of the rotated trunk that the host runs.

One tensor at a time, in float64, then in the dtype it came in. A block's norms come before its linears, as their gains and biases
go into what reads them (`parties.provider.shards` sends them so).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.errors import ModelError
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.family import Linear, Segment
from veiltune.models.rotated.inner import Geometry, InnerMaps, draw_inner_maps, no_inner_maps
from veiltune.models.rotated.maps import InnerMap, LinearMap
from veiltune.models.rotated.norms import is_rms_norm
from veiltune.models.rotated.rotation import Reads, Stream, Writes
from veiltune.models.skeleton import blocks_of, empty_model
from veiltune.privacy.orthogonal import Key
from veiltune.secrets import MasterSecret

MAX_GROWTH = 1e4
"""How much a norm's fold may enlarge the rounding errors of adapters that are brought back from the rotated basis."""


@dataclass
class _Norm:
    """What has come of one norm of a block."""

    wanted: set[str]
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return self.values.keys() == self.wanted


class Folding:
    """The secret change of basis of one trunk, and the plain norms' part of it once they have come.

    Args:
        config: a `transformers` configuration.
        cut: which blocks are the trunk.
        key: R, of the stream.
        secret: what the maps inside blocks are drawn from.
        inner: whether there are such maps; without them Q, K, V and MLP states are the plain model's.
        must_invert: adapters will have to come back from the host's basis, so a fold that cannot be undone is refused.
    """

    def __init__(
        self, config: Any, cut: Cut, key: Key, secret: MasterSecret, *, inner: bool, must_invert: bool = False
    ) -> None:
        self.family = find_family(config)
        self.cut = cut
        self._must_invert = must_invert
        template: Any = blocks_of(empty_model(config), self.family)[cut.trunk.start]
        self._parameters = {name: tuple(value.shape) for name, value in template.named_parameters()}
        is_centred = not is_rms_norm(template.get_submodule(self.family.attention.norm))
        self.stream = Stream(key, is_centred=is_centred)
        self.writes = Writes(self.stream)
        self._norms: dict[str, _Norm] = {}
        self._reads: dict[str, Reads] = {}
        self._draw = partial(self._drawn, config, secret, inner=inner)
        self._inner: dict[int, InnerMaps] = {}
        linears = [linear for linear in self.family.linears(cut.num_layers) if linear.block in cut.trunk]
        self.linears = {linear.path: linear for linear in linears}

    def _maps_inside(self, block: int) -> InnerMaps:
        """Those of one block, drawn when they are first wanted."""
        if block not in self._inner:
            self._inner[block] = self._draw(block)
        return self._inner[block]

    def release(self, block: int) -> None:
        """Free what is kept of one block. Its maps would be drawn again; what came of its norms would have to come again."""
        self._inner.pop(block, None)
        for kept in (self._norms, self._reads):
            for path in [path for path in kept if path.startswith(f"{self.family.blocks}.{block}.")]:
                del kept[path]

    def _drawn(self, config: Any, secret: MasterSecret, block: int, *, inner: bool) -> InnerMaps:
        if not inner:
            return no_inner_maps(self.family)
        rows, columns = self._parameters[f"{self.family.mlp.output}.weight"]
        geometry = Geometry.of(
            config,
            self.family,
            units=rows if self.family.weights_in_out else columns,
            has_qk_norm=any(f"{path}.weight" in self._parameters for path in self.family.attention.exposed),
        )
        return draw_inner_maps(self.family, geometry, secret, block)

    def local_path(self, linear: Linear) -> str:
        """A linear's path inside its block."""
        return linear.path.removeprefix(f"{self.family.blocks}.{linear.block}.")

    def _segment(self, linear: Linear) -> Segment:
        path = self.local_path(linear)
        return next(segment for segment in self.family.segments if path in (*segment.inputs, segment.output))

    def maps(self, linear: Linear) -> tuple[LinearMap, LinearMap]:
        """The maps of a linear's input side and output side.

        Raises:
            ModelError: the norm it reads has not come whole.
        """
        path, inner = self.local_path(linear), self._maps_inside(linear.block)
        if linear.side == "output":
            return inner.inputs[path], self.writes
        return self._reader(f"{self.family.blocks}.{linear.block}.{self._segment(linear).norm}"), inner.outputs[path]

    def _reader(self, norm: str) -> Reads:
        if norm not in self._reads:
            state = self._norm(norm)
            if not state.is_whole:
                raise ModelError(
                    f"norm {norm!r} has not come before the linears that read it", hint="the checkpoint is incomplete"
                )
            self._reads[norm] = self._make_reader(norm, state)
        return self._reads[norm]

    def _norm(self, path: str) -> _Norm:
        if path not in self._norms:
            local = path.removeprefix(f"{self.family.blocks}.").partition(".")[2]
            wanted = {leaf for leaf in ("weight", "bias") if f"{local}.{leaf}" in self._parameters}
            self._norms[path] = _Norm(wanted)
        return self._norms[path]

    def _make_reader(self, path: str, norm: _Norm) -> Reads:
        dim = self.stream.key.dim
        gain = norm.values["weight"] + self._offset if norm.wanted else torch.ones(dim, dtype=torch.float64)
        bias = norm.values.get("bias")
        reader = Reads(self.stream, gain, bias if bias is not None and bool(bias.any()) else None)
        if self._must_invert and (growth := reader.error_growth()) > MAX_GROWTH:
            raise ModelError(
                f"the fold of {path!r} enlarges errors {growth:.1e} times: an adapter trained in the host's basis could not "
                "be brought back",
                hint="set veil.optimizer_at = 'enclave'",
            )
        return reader

    @property
    def _offset(self) -> float:
        return 0.0 if self.stream.is_centred else self.family.gain_offset

    def fold(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Plain tensors of the trunk to the host's, by the names in either; norms have other tensors there, or none.

        Raises:
            ModelError: a tensor that the fold knows no place for, or norms that come too late.
        """
        folded: dict[str, Tensor] = {}
        for name, value in sorted(tensors.items(), key=lambda item: self._is_of_linear(item[0])):
            path, _, leaf = name.rpartition(".")
            made = self._fold_linear(path, leaf, value) if path in self.linears else self._fold_norm(path, leaf, value)
            folded |= {made_name: tensor.to(value.dtype).contiguous() for made_name, tensor in made.items()}
        return folded

    def _is_of_linear(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.linears

    def _fold_linear(self, path: str, leaf: str, value: Tensor) -> dict[str, Tensor]:
        input_map, output_map = self.maps(self.linears[path])
        if leaf == "bias":
            return {f"{path}.bias": output_map.apply(value.to("cpu", torch.float64)[None])[0]}
        columns = value.T if self.family.weights_in_out else value
        rows = output_map.apply(input_map.apply(columns.to("cpu", torch.float64)).T)
        return {f"{path}.weight": rows if self.family.weights_in_out else rows.T}

    def _fold_norm(self, path: str, leaf: str, value: Tensor) -> dict[str, Tensor]:
        block, _, local = path.removeprefix(f"{self.family.blocks}.").partition(".")
        exact = value.to("cpu", torch.float64)
        if any(local == segment.post_norm for segment in self.family.segments):
            return {f"{path}.gain": self.stream.sandwich(exact + self._offset)}
        if local in self.family.attention.exposed:
            factor = self._maps_inside(int(block)).qk_gains.get(local)
            gain = exact + self._offset
            return {f"{path}.gain": gain if factor is None else gain * factor}
        if all(local != segment.norm for segment in self.family.segments):
            raise ModelError(f"no fold is known for {path}.{leaf}", hint="this family is not described completely")
        self._norm(path).values[leaf] = exact
        if leaf != "bias":
            return {}
        constant = self.stream.constant()
        return {f"{path}.constant": constant if bool(exact.any()) else torch.zeros_like(constant)}

    def settle(self, dtypes: set[torch.dtype], device: torch.device) -> None:
        """Make the copies of the key that states and factors need, then free the original."""
        for dtype in dtypes:
            self.stream.key.settle(dtype, device)

    def inner_output(self, linear: Linear) -> InnerMap | None:
        """The inner map on the output of an input-side linear, for tests; ``None`` for others."""
        return self._maps_inside(linear.block).outputs.get(self.local_path(linear))


def trunk_norms(block: nn.Module, segments: tuple[Segment, ...]) -> list[tuple[str, str]]:
    """Paths of a block's norms with what each is: ``stream``, ``sandwich`` or ``qk``."""
    found: list[tuple[str, str]] = []
    for segment in segments:
        found.append((segment.norm, "stream"))
        if segment.post_norm is not None:
            found.append((segment.post_norm, "sandwich"))
        found += [(path, "qk") for path in segment.exposed]
    names = {name for name, _ in block.named_modules()}
    return [(path, kind) for path, kind in found if path in names]
