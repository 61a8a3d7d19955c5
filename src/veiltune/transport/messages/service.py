"""Between an owner and parties that run as services: what a session is for, before it begins, and that one is to end."""

from __future__ import annotations

from dataclasses import dataclass

from veiltune.transport.messages.base import Message


@dataclass(frozen=True, slots=True)
class OpenSession(Message):
    """The first word on a link to a service. The owner's own, which every party passes on as it is.

    ``session`` and ``run`` are 128 random bits in hexadecimal: the links of one session bear the same ``session``, and what
    a party keeps for a resumption is found again by ``run``. ``seed`` is of the dropout that the host draws. ``agreed`` is
    the fingerprint of what all parties must have alike. The answer is `Acknowledged`, or `Refused`.
    """

    session: str
    run: str
    verb: str
    native: bool
    resume_step: int | None
    seed: int
    agreed: str


@dataclass(frozen=True, slots=True)
class StopSoon(Message):
    """The sender is being stopped: save at the end of this step, and end the session. No answer to anything."""
