"""``veiltune party``: one party on its own machine."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import ConfigError


def run_service(config: Config, role: str, *, listen: str, health: str | None, as_json: bool) -> int:
    """Serve until SIGINT or SIGTERM; then let an open session save, and end.

    Raises:
        VeiltuneError: what the role cannot start for.
    """
    import torch

    from veiltune.display import ServiceLog, console
    from veiltune.session.service import Service, parse_address

    if health is not None:
        config = config.model_copy(update={"session": config.session.model_copy(update={"health": health})})
    if config.session.threads is not None:
        torch.set_num_threads(config.session.threads)
    service = Service(config, role, parse_address(listen), ServiceLog(console(), as_json=as_json))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: service.stop())
    service.run()
    return 0


def run_owner(config: Config, tune: Callable[[bool], int]) -> int:
    """The owner's party: it tunes with the services of its configuration, from the last checkpoint if there is one.

    Args:
        config: its own.
        tune: does so; told whether to resume.

    Raises:
        ConfigError: no services are named.
    """
    from veiltune.training import COMMIT

    if not config.session.connect:
        known = ", ".join(DESIGNS[config.design].can_serve) or "none"
        raise ConfigError(
            f"session.connect names no services, and under {config.design} no 'owner' runs as a service of its own",
            hint=f"name the addresses of the others that do ({known}), or start all parties here with `veiltune tune`",
        )
    return tune((Path(config.output) / COMMIT).is_file())
