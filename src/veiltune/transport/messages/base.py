"""The base of all messages, and the one field type that is not self-explaining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

JsonObject = dict[str, Any]
"""A JSON object: what TOML and JSON can hold, never code."""


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages."""
