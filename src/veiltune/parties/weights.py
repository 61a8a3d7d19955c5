"""A model's weights on their way to whoever may hold them: read in shards, sent, and received; never the whole model at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from veiltune.errors import ModelError
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.family import Family
from veiltune.models.skeleton import assign_parameter, empty_model, require_complete
from veiltune.transport.channel import Channel
from veiltune.transport.messages import Acknowledged, WeightShard

SHARD_BYTES = 32 << 20
_IGNORED = re.compile(r"\.(attn|self_attn)\.(bias|masked_bias|rotary_emb\.inv_freq)$|rotary_emb\.inv_freq$")
"""Buffers that older checkpoints store and models make for themselves."""


def canonical_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Stored name of each parameter of the causal language model, by the model's own name.

    Hub checkpoints of some families (GPT-2, OPT) leave out the base model's prefix.

    Raises:
        ModelError: a stored tensor has no place in the architecture.
    """
    model: Any = empty_model(checkpoint.config)
    expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names: dict[str, str] = {}
    for stored in checkpoint.tensor_names():
        for candidate in (stored, f"{model.base_model_prefix}.{stored}"):
            if candidate in expected:
                names[candidate] = stored
                break
        else:
            if not _IGNORED.search(stored):
                raise ModelError(
                    f"unexpected tensor {stored!r} in {checkpoint.source!r}",
                    hint="its config.json names another architecture",
                )
    return names


def shards(checkpoint: Checkpoint, family: Family) -> Iterator[tuple[int, dict[str, str]]]:
    """What is sent together, ``(block, {name: stored name})``: tensors up to `SHARD_BYTES`, or one larger tensor.

    What stands outside the blocks comes first, as block 0; then block by block, weights that share a key side by side.
    """
    num_layers = checkpoint.config.num_hidden_layers
    place = {linear.path: number for number, linear in enumerate(family.linears(num_layers))}
    pattern = re.compile(re.escape(family.blocks) + r"\.(\d+)\.")

    def order(name: str) -> tuple[int, int]:
        found = pattern.match(name)
        return (0 if found is None else int(found.group(1)) + 1, place.get(name.rpartition(".")[0], -1))

    names = canonical_names(checkpoint)
    group: dict[str, str] = {}
    block = num_bytes = 0
    for name in sorted(names, key=order):
        size = checkpoint.index[names[name]].num_bytes
        if group and (order(name)[0] != block or num_bytes + size > SHARD_BYTES):
            yield block, group
            group = {}
            num_bytes = 0
        group[name], block, num_bytes = names[name], order(name)[0], num_bytes + size
    yield block, group


def read_group(checkpoint: Checkpoint, group: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of ``{name: stored name}``, by name.

    Raises:
        ModelError: one of them is not finite.
    """
    names = {stored: name for name, stored in group.items()}
    tensors = {names[stored]: value for stored, value in checkpoint.tensors(names)}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ModelError(
                f"tensor {name!r} of {checkpoint.source!r} is not finite", hint="the checkpoint is damaged"
            )
    return tensors


def stream_weights(
    link: Channel, checkpoint: Checkpoint, family: Family, *, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[int]:
    """Send the tensors whose names are ``wanted``, a shard at a time; yields the block each shard was of."""
    for block, group in shards(checkpoint, family):
        chosen = {name: stored for name, stored in group.items() if wanted(name)}
        if chosen:
            link.send(WeightShard(read_group(checkpoint, chosen), last=False))
            link.recv_as(Acknowledged)
            yield block
    link.send(WeightShard({}, last=True))
    link.recv_as(Acknowledged)


def received_shards(link: Channel) -> Iterator[dict[str, Tensor]]:
    """The other end of `stream_weights`: shard by shard; the next is asked for once one is done with."""
    while True:
        shard = link.recv_as(WeightShard)
        yield shard.tensors
        link.send(Acknowledged())
        if shard.last:
            return


def receive_weights(link: Channel, model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Fill an empty model with what `stream_weights` sends, and tie what its configuration ties.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    for tensors in received_shards(link):
        for name, value in tensors.items():
            assign_parameter(model, name, value.to(device, dtype))
    model.tie_weights()
    require_complete(model)
    model.to(device)
