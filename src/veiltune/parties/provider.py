"""The model provider: streams its weights, block by block, to whoever may hold them; never the whole model at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from veiltune.errors import ModelError
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.families import find_family
from veiltune.models.family import Family
from veiltune.models.skeleton import DTYPES, assign_parameter, empty_model, require_complete
from veiltune.models.sources import check_memory, resolve_config, resolve_model
from veiltune.parties.enclaved.release import provider_waits, receive_adapter
from veiltune.parties.party import Party
from veiltune.parties.preflight import check_ancestors
from veiltune.transport.channel import Channel
from veiltune.transport.messages import Acknowledged, Goodbye, ModelCard, TokenizerFiles, WeightShard

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
)
SHARD_BYTES = 32 << 20
_IGNORED = re.compile(r"\.(attn|self_attn)\.(bias|masked_bias|rotary_emb\.inv_freq)$|rotary_emb\.inv_freq$")
"""Buffers that older checkpoints store and models make for themselves."""
_DROPOUT = re.compile(r"(dropout|_pdrop|layerdrop)$")


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


def open_checkpoint(party: Party) -> Checkpoint:
    """The provider's model, once it is known to fit this machine.

    Raises:
        ModelError: the source cannot be used, or does not fit this machine's memory.
    """
    config = party.config
    if not party.job.native:  # before anything large is fetched, generated or read
        check_memory(
            resolve_config(config.model),
            torch.float32,
            batch=config.train.batch_size,
            length=config.data.max_length,
            lora_rank=config.lora.rank,
            source=config.model,
        )
    return resolve_model(config.model, dtype=DTYPES[config.dtype] if party.job.native else None)


def provide(party: Party, trainer: str, *, attested: bool) -> None:
    """Run the provider: look for public ancestors, check the enclave, hand over tokenizer (owner) and weights (``trainer``).

    Raises:
        ModelError: the source cannot be used, holds values that are not finite, does not fit this machine's memory, or
            descends from a public model (see `preflight`).
        PeerLostError: the enclave is gone before the provider has the adapter that was agreed on.
    """
    checkpoint = open_checkpoint(party)
    family = find_family(checkpoint.config)
    if attested:
        checks = check_ancestors(party.config.provider, checkpoint, party.report)
        party.figures["public_ancestors"] = {check.ancestor: check.verdict for check in checks}
        party.require_enclave(trainer)
    card = model_card(checkpoint, probe=party.job.verb == "probe")
    party.links["owner"].send(card)
    party.links["owner"].send(TokenizerFiles(tokenizer_files(checkpoint)))
    party.links[trainer].send(card)
    num_blocks = checkpoint.config.num_hidden_layers
    for block in stream_weights(party.links[trainer], checkpoint, family):
        party.report("provisioned", {"block": block, "num_blocks": num_blocks})
    if attested and provider_waits(party):
        receive_adapter(party, trainer, checkpoint.config)
    party.links["owner"].recv_as(Goodbye)


def model_card(checkpoint: Checkpoint, *, probe: bool = False) -> ModelCard:
    """What the provider makes public. For a probe dropouts are 0: two designs draw different ones, so a comparison has none."""
    values: dict[str, Any] = json.loads(checkpoint.read_file("config.json"))
    if probe:
        values.update({name: 0.0 for name, value in values.items() if _DROPOUT.search(name) and value})
    return ModelCard(values, checkpoint.fingerprint, checkpoint.num_parameters)


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tokenizer's files as bytes, by name."""
    return {
        name: torch.frombuffer(bytearray(checkpoint.read_file(name)), dtype=torch.uint8)
        for name in TOKENIZER_FILES
        if checkpoint.has_file(name)
    }


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


def receive_weights(link: Channel, model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """The other end of `stream_weights`: fill an empty model, and tie what its configuration ties.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    while True:
        shard = link.recv_as(WeightShard)
        for name, value in shard.tensors.items():
            assign_parameter(model, name, value.to(device, dtype))
        link.send(Acknowledged())
        if shard.last:
            break
    model.tie_weights()
    require_complete(model)
    model.to(device)
