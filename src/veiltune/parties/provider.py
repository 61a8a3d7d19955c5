"""The model provider: streams its weights, block by block, to whoever may hold them; never the whole model at once."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

from veiltune.models.checkpoint import Checkpoint
from veiltune.models.families import find_family
from veiltune.models.skeleton import DTYPES
from veiltune.models.sources import check_memory, resolve_config, resolve_model
from veiltune.parties.enclaved.release import provider_waits, receive_adapter
from veiltune.parties.enclaved.sealed_copy import hand_over_key
from veiltune.parties.party import Party
from veiltune.parties.preflight import check_ancestors
from veiltune.parties.weights import stream_weights
from veiltune.transport.messages import Goodbye, ModelCard, TokenizerFiles

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
_DROPOUT = re.compile(r"(dropout|_pdrop|layerdrop)$")


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

    An enclave that has a sealed copy of the weights gets the key to it, and no weights.

    Raises:
        ModelError: the source cannot be used, holds values that are not finite, does not fit this machine's memory, or
            descends from a public model (see `preflight`); or the enclave's sealed copy is not of it.
        PeerLostError: the enclave is gone before the provider has the adapter that was agreed on.
    """
    checkpoint = open_checkpoint(party)
    if attested:
        checks = check_ancestors(party.config.provider, checkpoint, party.report)
        party.figures["public_ancestors"] = {check.ancestor: check.verdict for check in checks}
    enclave = party.require_enclave(trainer) if attested else None
    card = model_card(checkpoint, probe=party.job.verb == "probe")
    party.links["owner"].send(card)
    party.links["owner"].send(TokenizerFiles(tokenizer_files(checkpoint)))
    party.links[trainer].send(card)
    if enclave is None or not hand_over_key(party, trainer, checkpoint, enclave.recipient):
        num_blocks = checkpoint.config.num_hidden_layers
        for block in stream_weights(party.links[trainer], checkpoint, find_family(checkpoint.config)):
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
