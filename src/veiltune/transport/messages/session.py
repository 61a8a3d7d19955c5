"""Control, attestation and provisioning: what sets a session up and ends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from veiltune.transport.messages.base import JsonObject, Message


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """A party tells the supervisor of progress: an event's name and plain figures, never data."""

    event: str
    fields: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartyDone(Message):
    """A party has ended well; ``fields`` holds its share of the result record."""

    fields: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartyFailed(Message):
    """A party has stopped because of an error."""

    error: str
    message: str
    hint: str | None
    exit_code: int


@dataclass(frozen=True, slots=True)
class Interrupt(Message):
    """The supervisor asks the owner to save a checkpoint at the next step's end and stop."""


@dataclass(frozen=True, slots=True)
class Goodbye(Message):
    """The sender is done with this link; the receiver may end."""


@dataclass(frozen=True, slots=True)
class Acknowledged(Message):
    """The last request was carried out."""


@dataclass(frozen=True, slots=True)
class EvidenceRequest(Message):
    """Asks the enclave to prove what it is, over a fresh nonce of 32 bytes."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Evidence(Message):
    """The enclave's proof: evidence (simulated evidence says so in itself), and the runtime data that it is for."""

    evidence: bytes
    runtime: bytes


@dataclass(frozen=True, slots=True)
class ModelCard(Message):
    """What the provider makes public of its model: the architecture's configuration and the weights' fingerprint."""

    config: JsonObject
    fingerprint: str
    num_parameters: int


@dataclass(frozen=True, slots=True)
class TokenizerFiles(Message):
    """The tokenizer's files as bytes, by file name."""

    files: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class SealedCopy(Message):
    """Which container the enclave has of the provider's weights: its public identity; empty for none."""

    identity: bytes


@dataclass(frozen=True, slots=True)
class ModelKey(Message):
    """The data key of that container, HPKE-wrapped for the enclave that was attested: no other can open it."""

    wrapped: bytes


@dataclass(frozen=True, slots=True)
class WeightShard(Message):
    """Plain weights of one block (or of what stands outside the blocks), by parameter name. ``last`` ends the stream."""

    tensors: dict[str, Tensor]
    last: bool
