"""Canonical JSON for what is signed or hashed: one text for one value, so that nothing is read two ways.

Keys are sorted, there is no white space, and every value is a string or a whole number. A decoder encodes again what
it read and compares: another order, a repeated key, an escape or a space that need not be there is refused, and so
needs no rule of its own.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from veiltune.errors import AttestationError

Fields = dict[str, str | int]


def canonical(fields: Mapping[str, str | int]) -> bytes:
    """The one encoding of ``fields``: ASCII, sorted keys, no white space."""
    return json.dumps(dict(fields), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse(data: bytes, *, max_bytes: int, what: str) -> Fields:
    """The fields whose canonical encoding is ``data``.

    Args:
        data: as received.
        max_bytes: longest encoding that is looked at.
        what: a name for messages.

    Raises:
        AttestationError: too long, not JSON, not an object of strings and whole numbers, or not canonical.
    """
    if len(data) > max_bytes:
        raise AttestationError(f"{what} of {len(data)} bytes", hint=f"at most {max_bytes} bytes are read")
    try:
        fields: Any = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise AttestationError(f"{what} is not JSON", hint="both sides need the same version") from None
    plain = isinstance(fields, dict) and all(type(value) in {str, int} for value in fields.values())
    if not plain or canonical(fields) != data:
        raise AttestationError(
            f"{what} is not a canonical object of strings and whole numbers", hint="both sides need the same version"
        )
    return fields


def to_base64(data: bytes) -> str:
    """Standard base64, with padding."""
    return base64.b64encode(data).decode("ascii")


def from_base64(fields: Mapping[str, str | int], name: str, *, max_bytes: int, what: str) -> bytes:
    """The bytes of the base64 field ``name``.

    Raises:
        AttestationError: absent, not a string, not canonical base64, or longer than ``max_bytes``.
    """
    text = fields.get(name)
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except ValueError:
        data = None
    if data is None or len(data) > max_bytes or to_base64(data) != text:
        raise AttestationError(
            f"{what}: field {name!r} is not base64 of at most {max_bytes} bytes",
            hint="both sides need the same version",
        )
    return data


def require_fields(fields: Mapping[str, str | int], names: frozenset[str], what: str) -> None:
    """Exactly the fields ``names``, no more.

    Raises:
        AttestationError: another set of fields.
    """
    if fields.keys() != names:
        found, wanted = ", ".join(sorted(fields)), ", ".join(sorted(names))
        raise AttestationError(f"{what} has the fields {found[:200]}", hint=f"it needs exactly {wanted}")
