"""A session whose owner is this very process: for benchmarks, notebooks, and whoever wants the tuner in hand."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import PeerLostError, ProtocolError
from veiltune.parties.owner import Owner
from veiltune.parties.party import Job
from veiltune.session.launch import start_processes
from veiltune.session.opening import link_up
from veiltune.session.run import GRACE_SECONDS, prepare_output
from veiltune.transport.channel import Channel


@contextmanager
def live_owner(config: Config, *, overwrite: bool = False) -> Generator[Owner]:
    """Start the other parties as processes and be the owner: a context manager that yields the owner.

    Raises:
        PeerLostError: a party ended; its log in ``OUT/log`` says why.
        VeiltuneError: what the output directory or the enclave's evidence is refused for.
    """
    prepare_output(config, resume=False, overwrite=overwrite)
    design = DESIGNS[config.design]
    started, party = start_processes(config, Job(verb="provision"), here="owner")
    if party is None:
        raise ValueError(f"{design.name} has no owner")
    for running in started:
        threading.Thread(target=_drain, args=(running.control,), daemon=True).start()
    try:
        link_up(party)
        owner = design.join(party)
        yield owner
        owner.leave()
    except PeerLostError as error:
        deaths = [f"the {running.role} {how}" for running in started if (how := running.how_it_died())]
        raise PeerLostError(
            deaths[0] if deaths else error.message, hint="its log is in the output's log directory"
        ) from None
    finally:
        for link in party.links.values():
            link.close()
        for running in started:
            running.stop(GRACE_SECONDS)


def _drain(control: Channel) -> None:
    """Read what a party tells its supervisor, so that it never waits for room."""
    try:
        while True:
            control.recv()
    except (PeerLostError, ProtocolError):
        return
