"""The model provider: streams its weights, block by block, to whoever may hold them; never the whole model at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch

from veiltune.errors import ModelError
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.families import find_family
from veiltune.models.family import Family
from veiltune.models.skeleton import DTYPES, empty_model
from veiltune.models.sources import check_memory, resolve_config, resolve_model
from veiltune.parties.party import Party
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


def provide(party: Party, trainer: str, *, attested: bool) -> None:
    """Run the provider: check the enclave, hand the tokenizer to the owner, stream the weights to ``trainer``.

    Raises:
        ModelError: the source cannot be used, holds values that are not finite, or does not fit this machine's memory.
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
    checkpoint = resolve_model(config.model, dtype=DTYPES[config.dtype] if party.job.native else None)
    family = find_family(checkpoint.config)
    if attested:
        party.require_enclave(trainer)
    values = _public_config(checkpoint)
    if party.job.verb == "probe":  # two designs draw different dropouts, so a comparison has none
        values.update({name: 0.0 for name, value in values.items() if _DROPOUT.search(name) and value})
    card = ModelCard(values, checkpoint.fingerprint, checkpoint.num_parameters)
    files = {
        name: torch.frombuffer(bytearray((checkpoint.directory / name).read_bytes()), dtype=torch.uint8)
        for name in TOKENIZER_FILES
        if (checkpoint.directory / name).is_file()
    }
    party.links["owner"].send(card)
    party.links["owner"].send(TokenizerFiles(files))
    party.links[trainer].send(card)
    _stream(party, checkpoint, family, trainer)
    party.links["owner"].recv_as(Goodbye)


def _public_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8"))


def _stream(party: Party, checkpoint: Checkpoint, family: Family, trainer: str) -> None:
    link = party.links[trainer]
    num_layers = checkpoint.config.num_hidden_layers
    for block, group in shards(checkpoint, family):
        names = {stored: name for name, stored in group.items()}
        tensors = {names[stored]: value for stored, value in checkpoint.tensors(names)}
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise ModelError(
                    f"tensor {name!r} of {party.config.model!r} is not finite", hint="the checkpoint is damaged"
                )
        link.send(WeightShard(tensors, last=False))
        del tensors
        link.recv_as(Acknowledged)
        party.report("provisioned", {"block": block, "num_blocks": num_layers})
    link.send(WeightShard({}, last=True))
    link.recv_as(Acknowledged)
