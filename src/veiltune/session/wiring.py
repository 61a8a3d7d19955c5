"""What every end of a link is given, however it comes about: guards, observers, and the party's own directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veiltune.config import Config
from veiltune.designs import Design
from veiltune.transport.channel import ChannelOptions
from veiltune.transport.transcript import Meter, Transcript


def channel_options(design: Design, me: str, peer: str, observers: tuple[Any, ...]) -> ChannelOptions:
    """Guards of one end of a link: only what the receiver's ``reveals`` lists may cross."""
    return ChannelOptions(may_send=design.may_receive(peer), may_receive=design.may_receive(me), observers=observers)


def party_directory(config: Config, role: str) -> Path:
    """Where a party keeps its own state."""
    return Path(config.output) / "parties" / role


def observers_of(config: Config, role: str) -> tuple[Meter, Transcript | None]:
    """The meter of a party, and its transcript if one was asked for."""
    if role not in config.session.record:
        return Meter(role), None
    directory = Path(config.output) / "transcript"
    directory.mkdir(parents=True, exist_ok=True)
    count = len(list(directory.glob(f"{role}*.vtt")))
    name = f"{role}.vtt" if count == 0 else f"{role}.{count}.vtt"
    return Meter(role), Transcript(directory / name, role, fingerprint=config.run_fingerprint())
