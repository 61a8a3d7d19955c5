"""Who may speak to whom: the tables of a configuration that name this party's own key and its peers' keys.

::

    [identity]
    key = "provider/provider.key"       # made by `veiltune keygen`; this party's own business

    [[peers]]                           # agreed on by all: part of the configuration's fingerprint
    role = "owner"
    key = "spki-sha256:9f05…"

A key is named by the SHA-256 of its SubjectPublicKeyInfo in DER (RFC 7469 §2.4 pins keys the same way), so a renewed
certificate of the same key changes nothing. A role may have several keys, and then several parties may act in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from veiltune.errors import ConfigError

PIN_PREFIX: Final = "spki-sha256:"
ROLE_PATTERN: Final = r"^[a-z][a-z_]{0,15}$"
_PIN_DIGITS: Final = 64


class IdentityConfig(BaseModel):
    """This party's own key. Without one, parties on several machines prove themselves by the session's token alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Path | None = Field(default=None, description="file with this party's private key, from `veiltune keygen`")


class PeerConfig(BaseModel):
    """One key, and the role that its holder may act in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str = Field(pattern=ROLE_PATTERN)
    key: str = Field(description="spki-sha256: and 64 hexadecimal digits, as `veiltune keygen` prints it")

    @field_validator("key")
    @classmethod
    def _check_pin(cls, key: str) -> str:
        digits = key.removeprefix(PIN_PREFIX)
        if digits == key or len(digits) != _PIN_DIGITS or set(digits) - set("0123456789abcdef"):
            raise ValueError(
                f"is no key; copy it as `veiltune keygen` printed it ({PIN_PREFIX} and {_PIN_DIGITS} hexadecimal digits)"
            )
        return key


def digest_of(pin: str) -> bytes:
    """The 32 bytes that a key's public name says."""
    return bytes.fromhex(pin.removeprefix(PIN_PREFIX))


def roles_of(peers: tuple[PeerConfig, ...], pin: str) -> frozenset[str]:
    """The roles that the holder of a key may act in; empty for a stranger."""
    return frozenset(peer.role for peer in peers if peer.key == pin)


def require_peers(peers: tuple[PeerConfig, ...], me: str, pin: str, peer: str) -> None:
    """Check what would make every handshake fail: no key for the peer, or another one than its own for this party.

    Raises:
        ConfigError: names the role.
    """
    if peer not in {each.role for each in peers}:
        raise ConfigError(
            f"identity.key is set, and [[peers]] has no key for the {peer}",
            hint=f'add [[peers]] with role = "{peer}" and the key that the {peer}\'s `veiltune keygen` printed',
        )
    mine = [each.key for each in peers if each.role == me]
    if mine and pin not in mine:
        raise ConfigError(
            f"this {me}'s key is {pin}, and [[peers]] lists another for it",
            hint=f"correct identity.key, or put this key into the {me}'s entry of every party's configuration",
        )
