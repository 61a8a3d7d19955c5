"""Why one end of a secure channel turns the other away: the bytes that say so, and the words that both ends show.

What a peer says in the clear may come from anybody, so it is one byte of a fixed table and never text of the peer's own.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from veiltune.errors import ProtocolError

IN_THE_MIDDLE: Final = "somebody may stand between the parties: compare the keys by another way than this network"
SAME_CONFIG: Final = (
    "all parties of a session need these alike: design and its options, model, dtype, cut, lora, train.method, "
    "train.optimizer, train.weight_decay, enclave.allow_simulated, peers"
)
SAME_VERSION: Final = "run the same version of Veiltune at both ends"


class Refusal(IntEnum):
    """Why one end turns the other away, as the byte that tells it so."""

    NONE = 0
    STRANGER = 1
    WRONG_ROLE = 2
    OUT_OF_DATE = 3
    MALFORMED = 4
    OTHER_PARTY = 5
    OTHER_CONFIG = 6


_SAID: Final[Mapping[int, tuple[str, str]]] = {
    Refusal.STRANGER: ("does not know the key of this {role}, {pin}", "put it into [[peers]] of its configuration"),
    Refusal.WRONG_ROLE: (
        "does not let the key {pin} act as {role}",
        "give the key this role in [[peers]] of its configuration",
    ),
    Refusal.OUT_OF_DATE: (
        "finds the dates of this {role}'s certificate wrong",
        "set the clocks, or renew it: `veiltune keygen --renew`",
    ),
    Refusal.MALFORMED: ("cannot read this {role}'s certificate", SAME_VERSION),
    Refusal.OTHER_PARTY: ("is not the party that this {role} looks for", "check the address in session.connect"),
    Refusal.OTHER_CONFIG: (
        "has another configuration than this {role}",
        SAME_CONFIG,
    ),
}
"""What a peer's refusal means, in words that follow "the peer"."""


class RefusedPeerError(ProtocolError):
    """This end turns the other away.

    Attributes:
        refusal: what the other end is told.
    """

    def __init__(self, refusal: Refusal, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.refusal = refusal


def require_none(refusal: int, role: str, pin: str) -> None:
    """Go on only if the other end did not turn this one away.

    Args:
        refusal: the byte that it sent.
        role: this party.
        pin: its key.

    Raises:
        ProtocolError: it did, and why.
    """
    if refusal != Refusal.NONE:
        words, hint = _SAID.get(refusal, (f"refuses this {{role}} for the unknown reason {refusal}", SAME_VERSION))
        raise ProtocolError(f"the peer {words.format(role=role, pin=pin)}", hint=hint)


def tls_failure(error: ssl.SSLError) -> ProtocolError:
    """OpenSSL's error in our words."""
    reason = error.reason or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError):
        return ProtocolError("the peer announced one certificate and used another", hint=IN_THE_MIDDLE)
    hints = {"UNSUPPORTED_PROTOCOL": "it offers TLS 1.2 or less; the channel is TLS 1.3 alone"}
    return ProtocolError(f"TLS with the peer failed: {reason}", hint=hints.get(reason, IN_THE_MIDDLE))
