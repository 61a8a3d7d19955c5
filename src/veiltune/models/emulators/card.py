"""What an emulator is, on the wire and on disk: a card in JSON, and the tensors it promises.

A tensor is named after the plain model's: ``PATH.weight`` and ``PATH.bias`` as they are there, or in the place of a weight
``PATH.down`` and ``PATH.up`` (low rank), or ``PATH.packed`` and ``PATH.scales`` (quantised).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from veiltune.config import Section
from veiltune.errors import ProtocolError
from veiltune.models.emulators.linears import packed_shape, scales_shape
from veiltune.models.emulators.options import Compression, Kind
from veiltune.models.families import find_family
from veiltune.models.family import Family
from veiltune.models.skeleton import empty_model

_HINT = "the provider must build the emulator anew"


class EmulatorCard(Section):
    """A description of an emulator, and of what it reveals of the trunk.

    Attributes:
        kind: how it was made.
        compression: what was done to the linears of the kept blocks.
        trunk: the trunk's first slot, and the one after its last.
        kept: slots that hold a block; in the others states pass through.
        ranks: by path, the rank of each linear that became two factors.
        bits: of a quantised weight; 0 unless quantised.
        group: quantised weights that share a scale; 0 unless quantised.
        errors: by path, each compressed linear's relative error in the Frobenius norm; 0 for one that was left as it was.
        parameter_share: numbers of the emulator over the trunk's (a quantised weight is one number, a scale none).
        byte_share: bytes of the emulator over the trunk's, scales included.
        distil_loss: the first and the last step's loss, if it was distilled.
        fingerprint: of the model, the cut and the options it was made from (hexadecimal); empty if unknown.
    """

    kind: Kind
    compression: Compression = "none"
    trunk: tuple[int, int]
    kept: tuple[int, ...] = Field(min_length=1)
    ranks: dict[str, int] = Field(default_factory=dict)
    bits: int = 0
    group: int = Field(default=0, ge=0)
    errors: dict[str, float] = Field(default_factory=dict)
    parameter_share: float = Field(ge=0)
    byte_share: float = Field(ge=0)
    distil_loss: tuple[float, float] | None = None
    fingerprint: str = ""

    @model_validator(mode="after")
    def _check(self) -> EmulatorCard:
        slots = range(*self.trunk)
        if self.trunk[0] < 0:
            raise ValueError(f"trunk starts at {self.trunk[0]}")
        for slot in self.kept:
            if slot not in slots:
                raise ValueError(f"kept block {slot} is outside the trunk {self.trunk[0]} to {self.trunk[1] - 1}")
        if list(self.kept) != sorted(set(self.kept)):
            raise ValueError(f"kept blocks {list(self.kept)} are not in ascending order")
        if self.compression == "quantised" and (self.bits not in {4, 8} or self.group < 1):
            raise ValueError(f"quantised with {self.bits} bits and groups of {self.group}")
        if self.ranks and self.compression != "lowrank":
            raise ValueError(f"ranks are given, but the compression is {self.compression!r}")
        return self

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EmulatorCard:
        """The card from JSON values that came from elsewhere.

        Raises:
            ProtocolError: they are no card; the message names the first field at fault.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise ProtocolError(
                f"malformed emulator card: {where}: {first['msg']} (got {first['input']!r:.80})", hint=_HINT
            ) from None


@dataclass(frozen=True)
class Emulator:
    """A built emulator: the card and the tensors to send, by name."""

    card: EmulatorCard
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


class TensorSpec(NamedTuple):
    """The shape a tensor must have, and its dtype: ``None`` for the model's own floating type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def block_linears(family: Family, slot: int) -> tuple[str, ...]:
    """Full paths of the linears of one block."""
    paths = [path for segment in family.segments for path in (*segment.inputs, segment.output)]
    return tuple(f"{family.blocks}.{slot}.{path}" for path in paths)


def trunk_shapes(config: Any, slots: range | tuple[int, ...]) -> dict[int, dict[str, tuple[int, ...]]]:
    """By slot, name and shape of every parameter of its block in the plain model. Allocates nothing."""
    model, blocks = empty_model(config), find_family(config).blocks
    return {
        slot: {
            f"{blocks}.{slot}.{name}": tuple(value.shape)
            for name, value in model.get_submodule(f"{blocks}.{slot}").named_parameters()
        }
        for slot in slots
    }


def fan(shape: tuple[int, ...], family: Family) -> tuple[int, int]:
    """(out, in) of a linear whose weight is stored with this shape."""
    rows, columns = shape
    return (columns, rows) if family.weights_in_out else (rows, columns)


def promised_tensors(config: Any, card: EmulatorCard) -> dict[str, TensorSpec]:
    """What tensors an emulator with this card consists of.

    Raises:
        ProtocolError: the card does not fit the architecture.
    """
    family = find_family(config)
    if card.trunk[1] > config.num_hidden_layers:
        raise ProtocolError(
            f"emulator card: the trunk ends at {card.trunk[1]}, the model has {config.num_hidden_layers} blocks",
            hint=_HINT,
        )
    promised: dict[str, TensorSpec] = {}
    for slot, shapes in trunk_shapes(config, card.kept).items():
        linears = set(block_linears(family, slot))
        for name, shape in shapes.items():
            path, _, leaf = name.rpartition(".")
            if path in linears and leaf == "weight":
                promised |= _promised_weight(card, path, shape, family)
            else:
                promised[name] = TensorSpec(shape, None)
    for path in card.ranks:
        if f"{path}.down" not in promised:
            raise ProtocolError(f"emulator card: no linear {path!r} in a kept block", hint=_HINT)
    return promised


def _promised_weight(
    card: EmulatorCard, path: str, shape: tuple[int, ...], family: Family
) -> Iterator[tuple[str, TensorSpec]]:
    rows, columns = fan(shape, family)
    if card.compression == "quantised":
        yield f"{path}.packed", TensorSpec(packed_shape(rows, columns, card.bits), torch.uint8)
        yield f"{path}.scales", TensorSpec(scales_shape(rows, columns, card.group), torch.float32)
    elif (rank := card.ranks.get(path)) is not None:
        if not 1 <= rank <= min(rows, columns):
            raise ProtocolError(f"emulator card: rank {rank} of {path!r}, a {rows} by {columns} linear", hint=_HINT)
        yield f"{path}.down", TensorSpec((rank, columns), None)
        yield f"{path}.up", TensorSpec((rows, rank), None)
    else:
        yield f"{path}.weight", TensorSpec(shape, None)


def check_tensors(config: Any, card: EmulatorCard, tensors: Mapping[str, Tensor]) -> None:
    """Compare tensors that came from elsewhere with what the card promises.

    Raises:
        ProtocolError: one is missing, unexpected, of another shape or dtype, or holds a value that is not finite.
    """
    promised = promised_tensors(config, card)
    for name in sorted(promised.keys() ^ tensors.keys()):
        fault = "lacks the" if name in promised else "has an unexpected"
        raise ProtocolError(f"the emulator {fault} tensor {name!r}", hint=_HINT)
    for name, (shape, dtype) in promised.items():
        value = tensors[name]
        if tuple(value.shape) != shape:
            raise ProtocolError(
                f"emulator tensor {name!r} has shape {tuple(value.shape)}, {shape} was promised", hint=_HINT
            )
        if value.dtype != dtype if dtype is not None else not value.is_floating_point():
            raise ProtocolError(f"emulator tensor {name!r} is {value.dtype}", hint=_HINT)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ProtocolError(f"emulator tensor {name!r} holds values that are not finite", hint=_HINT)
