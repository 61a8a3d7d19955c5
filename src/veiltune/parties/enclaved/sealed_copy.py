"""Weights that the enclave has sealed on its own disk already: then a key comes from the provider, and no weights.

The disk is the cloud's. The provider's ``sealed:`` model lies there as a copy of the same container, to the byte. In each
session the provider wraps the container's data key for the key that the enclave's fresh evidence binds, and for this
configuration; tensors are then opened one by one, in memory, as they are divided. What was wrapped opens in no other session,
enclave or copy.

*Reference*: HPKE (RFC 9180); ``info`` is described in `tee.container.wrapping`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from veiltune.config import Config
from veiltune.errors import ModelError
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.families import find_family
from veiltune.models.sealed import PURPOSE, SealedCheckpoint
from veiltune.parties.party import Party
from veiltune.parties.weights import read_group, received_shards, shards
from veiltune.tee.container.keys import Recipient, RecipientKey
from veiltune.tee.container.reading import open_container, read_identity
from veiltune.tee.container.ring import SEALED
from veiltune.transport.messages import ModelKey, SealedCopy


def hand_over_key(party: Party, trainer: str, checkpoint: Checkpoint, enclave: Recipient) -> bool:
    """The provider's side: hear what the enclave has, and if it is a copy of ours, give it the key. False: it has none.

    Raises:
        ModelError: it has a container that is not this model's.
    """
    link, source = party.links[trainer], checkpoint.source
    identity = link.recv_as(SealedCopy).identity
    if not identity:
        return False
    if not isinstance(checkpoint, SealedCheckpoint):
        raise ModelError(
            f"the {trainer} has a sealed model to open, and {source!r} is not sealed",
            hint="set the provider's model to the container that lies there, or unset enclave.sealed_model there",
        )
    if identity != checkpoint.container.identity:
        raise ModelError(
            f"the {trainer}'s sealed model is another container than {source!r}",
            hint="copy that very file there; a model that is sealed again is another container",
        )
    link.send(ModelKey(checkpoint.container.wrap(enclave, purpose=_purpose(party.config))))
    party.report("key_handed_over", {"recipient": enclave.fingerprint})
    return True


def weights(party: Party, key: RecipientKey, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """The enclave's side: all weights, shard by shard, from its sealed copy if it has one, else from the provider.

    Args:
        party: the enclave.
        key: opens what is wrapped for whom the provider saw proved.
        dtype: what sealed tensors are cast to; ``None``: as they are stored.

    Raises:
        CheckpointError: the copy is missing or altered, or what the provider sent does not open it.
        ModelError: what is sealed is no model, or holds values that are not finite.
    """
    link, path = party.links["provider"], party.config.enclave.sealed_model
    link.send(SealedCopy(b"" if path is None else read_identity(path)))
    if path is None:
        yield from received_shards(link)
        return
    wrapped = link.recv_as(ModelKey).wrapped
    checkpoint = _open(path, key, wrapped, _purpose(party.config), dtype)
    num_blocks = checkpoint.config.num_hidden_layers
    for block, group in shards(checkpoint, find_family(checkpoint.config)):
        yield read_group(checkpoint, group)
        party.report("provisioned", {"block": block, "num_blocks": num_blocks})


def _open(path: Path, key: RecipientKey, wrapped: bytes, purpose: str, dtype: torch.dtype | None) -> SealedCheckpoint:
    container = open_container(path, key, purpose=purpose, wrapped=wrapped)
    return SealedCheckpoint(f"{SEALED}{path}", path, dtype, container=container)


def _purpose(config: Config) -> str:
    """What the wrapped key is for."""
    return f"{PURPOSE} of {config.fingerprint()}"
