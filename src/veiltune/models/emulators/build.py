"""Building an emulator, on the provider's side: block by block, kept on disk, so that it is built once.

Layout under the provider's directory::

    emulators/KEY/card.json                 the card
    emulators/KEY/block-SLOT.safetensors    the tensors of one kept block
    emulators/KEY.distilling/               states of a distillation under way

KEY is the emulator's fingerprint, shortened.

*Reveals*, to the owner: every number of the emulator. A layer-drop emulator is that part of the trunk in the clear; compressed
blocks are an approximation of it whose distance the card states.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.checkpoints import StateStore
from veiltune.errors import CheckpointError, ConfigError, ModelError, ProtocolError
from veiltune.models.cache import build_once, require_free_disk
from veiltune.models.emulators.blocks import emulator_blocks
from veiltune.models.emulators.card import Emulator, EmulatorCard, block_linears, check_tensors, trunk_shapes
from veiltune.models.emulators.distil import Distillation, Progress, distil
from veiltune.models.emulators.linears import dequantise, factorise, is_smaller, quantise, relative_error
from veiltune.models.emulators.options import EmulatorOptions
from veiltune.models.families import find_family
from veiltune.models.family import Family

Reader = Callable[[Sequence[str]], Mapping[str, Tensor]]
_FORMAT = 1  # part of the fingerprint: raise it when the same options give other tensors


@dataclass(frozen=True)
class TrunkSource:
    """The trunk that an emulator is made of.

    Attributes:
        config: the whole model's `transformers` configuration.
        trunk: the trunk's slots.
        read: gives parameters by their names in the plain model. It is asked for one block at a time.
        fingerprint: of the model's weights in the dtype they are read in.
    """

    config: Any
    trunk: range
    read: Reader
    fingerprint: str


def emulator_fingerprint(source: TrunkSource, options: EmulatorOptions) -> str:
    """SHA-256 (hexadecimal) of what an emulator depends on: model, cut, and the options that matter to it."""
    trunk = source.trunk
    agreed = [_FORMAT, source.fingerprint, [trunk.start, trunk.stop], options.kept(trunk), options.decisive()]
    return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()


def build_emulator(
    source: TrunkSource,
    options: EmulatorOptions,
    *,
    distillation: Distillation | None = None,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> Emulator:
    """The emulator of a trunk; read from ``directory`` if it was built before.

    Args:
        source: the trunk.
        options: what to build.
        distillation: teacher and batches, for the kind ``distilled``.
        directory: the provider's own, for finished emulators and a distillation's states; ``None`` keeps nothing.
        progress: told of distillation steps and compressed blocks.

    Raises:
        ConfigError: the trunk has too few blocks, or a distillation is wanted and none is given.
        ModelError: what is read is not the architecture's, or not finite; or the disk is full.
        CheckpointError: what lies in ``directory`` is damaged.
        TrainingError: distillation diverged.
    """
    fingerprint = emulator_fingerprint(source, options)
    if directory is None:
        return _built(source, options, distillation, None, progress)
    target = directory / "emulators" / fingerprint[:24]
    states = target.with_name(f"{target.name}.distilling")

    def build(scratch: Path) -> None:
        _write(_built(source, options, distillation, StateStore(states, fingerprint), progress), scratch)

    emulator = _read(build_once(target, build), source.config, fingerprint)
    shutil.rmtree(states, ignore_errors=True)
    return emulator


def _built(
    source: TrunkSource,
    options: EmulatorOptions,
    distillation: Distillation | None,
    store: StateStore | None,
    progress: Progress | None,
) -> Emulator:
    """Read, distil, compress and describe."""
    kept = options.kept(source.trunk)
    shapes = trunk_shapes(source.config, kept)
    losses: tuple[float, float] | None = None

    def read(slot: int) -> dict[str, Tensor]:
        return _read_block(source, shapes[slot])

    if options.kind == "distilled":
        trained, losses = _distilled(
            source, options, {slot: read(slot) for slot in kept}, distillation, store, progress
        )
        read = trained.pop
    compressor = _Compressor(options, find_family(source.config))
    tensors: dict[str, Tensor] = {}
    of_block = (1, 1)
    for done, slot in enumerate(kept, start=1):
        block = read(slot)
        of_block = (_numbers(block), _num_bytes(block))  # the same for all blocks of an architecture
        tensors |= compressor.block(slot, block)
        if progress is not None and options.compressor != "none":
            progress("compress", done, len(kept), None)
    return Emulator(_card(source, options, compressor, tensors, of_block, losses), tensors)


def _card(
    source: TrunkSource,
    options: EmulatorOptions,
    compressor: _Compressor,
    tensors: Mapping[str, Tensor],
    of_block: tuple[int, int],
    losses: tuple[float, float] | None,
) -> EmulatorCard:
    """The card of what was built; ``of_block`` is the number of parameters and of bytes of one plain block."""
    is_quantised = options.compressor == "quantised"
    return EmulatorCard(
        kind=options.kind,
        compression=options.compressor,
        trunk=(source.trunk.start, source.trunk.stop),
        kept=options.kept(source.trunk),
        ranks=compressor.ranks,
        bits=options.bits if is_quantised else 0,
        group=options.group if is_quantised else 0,
        errors=compressor.errors,
        parameter_share=compressor.num_parameters / (of_block[0] * len(source.trunk)),
        byte_share=_num_bytes(tensors) / (of_block[1] * len(source.trunk)),
        distil_loss=losses,
        fingerprint=emulator_fingerprint(source, options),
    )


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _read_block(source: TrunkSource, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parameters of one block, checked."""
    given = source.read(list(shapes))
    for name, shape in shapes.items():
        if name not in given:
            raise ModelError(
                f"the trunk lacks the tensor {name!r}", hint="the checkpoint is incomplete; fetch it again"
            )
        if tuple(given[name].shape) != shape:
            raise ModelError(
                f"tensor {name!r} has shape {tuple(given[name].shape)}, the architecture wants {shape}",
                hint="check the checkpoint's config.json",
            )
        if not bool(torch.isfinite(given[name]).all()):
            raise ModelError(f"tensor {name!r} holds values that are not finite", hint="fetch the checkpoint again")
    return {name: given[name].detach() for name in shapes}


def _distilled(
    source: TrunkSource,
    options: EmulatorOptions,
    kept: dict[int, dict[str, Tensor]],
    distillation: Distillation | None,
    store: StateStore | None,
    progress: Progress | None,
) -> tuple[dict[int, dict[str, Tensor]], tuple[float, float]]:
    """The kept blocks after distillation, in the dtypes they had, and the first and the last loss."""
    if distillation is None:
        raise ConfigError(
            "an emulator of kind 'distilled' needs a teacher, and none was given", hint="choose the kind 'layerdrop'"
        )
    trunk = (source.trunk.start, source.trunk.stop)
    card = EmulatorCard(kind="layerdrop", trunk=trunk, kept=tuple(kept), parameter_share=0, byte_share=0)
    dtypes = {name: value.dtype for values in kept.values() for name, value in values.items()}
    copies = {  # never the trunk's own, which may be in use; training in half precision would lose small steps
        name: value.to(value.dtype if value.dtype == torch.float64 else torch.float32, copy=True)
        for values in kept.values()
        for name, value in values.items()
    }
    blocks = emulator_blocks(source.config, source.trunk, card, copies)
    losses = distil(blocks, distillation, options, store=store, progress=progress)
    prefix = find_family(source.config).blocks
    trained = {
        slot: {
            (full := f"{prefix}.{slot}.{name}"): value.detach().to(dtypes[full])
            for name, value in blocks[slot].named_parameters()
        }
        for slot in kept
    }
    return trained, losses


class _Compressor:
    """Compresses blocks, and notes what became of their linears."""

    def __init__(self, options: EmulatorOptions, family: Family) -> None:
        self.options = options
        self.family = family
        self.ranks: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self.num_parameters = 0

    def block(self, slot: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to send for one block."""
        wanted = set(block_linears(self.family, slot)) if self.options.compressor != "none" else set()
        made: dict[str, Tensor] = {}
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            if path in wanted and leaf == "weight":
                made |= self._weight(path, value)
            else:
                made[name] = value
                self.num_parameters += value.numel()
        return made

    def _weight(self, path: str, stored: Tensor) -> dict[str, Tensor]:
        weight = stored.T if self.family.weights_in_out else stored
        if self.options.compressor == "quantised":
            return self._quantised(path, weight)
        rank = self.options.rank_of(min(weight.shape))
        if not is_smaller(rank, *weight.shape):
            self.errors[path] = 0.0
            self.num_parameters += weight.numel()
            return {f"{path}.weight": stored}
        down, up = factorise(weight, rank)
        self.ranks[path] = rank
        self.errors[path] = relative_error(weight, up @ down)
        self.num_parameters += down.numel() + up.numel()
        return {f"{path}.down": down, f"{path}.up": up}

    def _quantised(self, path: str, weight: Tensor) -> dict[str, Tensor]:
        bits, group = self.options.bits, self.options.group
        packed, scales = quantise(weight, bits, group)
        columns = weight.shape[1]
        rounded = dequantise(packed, scales, columns=columns, bits=bits, group=group, dtype=torch.float32)
        self.errors[path] = relative_error(weight, rounded)
        self.num_parameters += weight.numel()
        return {f"{path}.packed": packed, f"{path}.scales": scales}


def _write(emulator: Emulator, directory: Path) -> None:
    """Write the card, and one file for each kept block."""
    from safetensors.torch import save_file

    require_free_disk(directory, _num_bytes(emulator.tensors), "the emulator")
    for slot, names in _by_block(emulator).items():
        values = {name: emulator.tensors[name].detach().cpu().contiguous().clone() for name in names}
        save_file(values, directory / f"block-{slot}.safetensors")
    (directory / "card.json").write_text(json.dumps(emulator.card.to_json()), encoding="utf-8")


def _by_block(emulator: Emulator) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {slot: [] for slot in emulator.card.kept}
    for name in emulator.tensors:
        groups[next(int(part) for part in name.split(".") if part.isdecimal())].append(name)
    return groups


def _read(directory: Path, config: Any, fingerprint: str) -> Emulator:
    """The emulator that `_write` left, checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    hint = "delete that directory; the emulator will be built anew"
    try:
        card = EmulatorCard.from_json(json.loads((directory / "card.json").read_text(encoding="utf-8")))
        tensors: dict[str, Tensor] = {}
        for slot in card.kept:
            tensors |= load_file(directory / f"block-{slot}.safetensors")
        check_tensors(config, card, tensors)
    except (OSError, ValueError, TypeError, SafetensorError, ProtocolError) as error:
        raise CheckpointError(f"the emulator in {str(directory)!r} is damaged: {error}", hint=hint) from None
    if card.fingerprint != fingerprint:
        raise CheckpointError(f"the emulator in {str(directory)!r} was made from something else", hint=hint)
    return Emulator(card, tensors)
