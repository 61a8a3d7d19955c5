"""A session whose owner is this very process: for benchmarks, notebooks, and whoever wants the tuner in hand."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import PeerLostError, ProtocolError
from veiltune.parties.owner import Owner
from veiltune.parties.party import Job
from veiltune.session.launch import Running, start_processes
from veiltune.session.opening import link_up
from veiltune.session.run import GRACE_SECONDS, SETTLE_SECONDS, PartyFailure, prepare_output
from veiltune.transport.messages import PartyFailed


@contextmanager
def live_owner(config: Config, *, overwrite: bool = False) -> Generator[Owner]:
    """Start the other parties as processes and be the owner: a context manager that yields the owner.

    Raises:
        PartyFailure: a party refused something, in its own words.
        PeerLostError: a party ended without a word; its log in ``OUT/log`` may say why.
        VeiltuneError: what the output directory or the enclave's evidence is refused for.
    """
    prepare_output(config, resume=False, overwrite=overwrite)
    design = DESIGNS[config.design]
    started, party = start_processes(config, Job(verb="provision"), here="owner")
    if party is None:
        raise ValueError(f"{design.name} has no owner")
    failures: queue.Queue[PartyFailure] = queue.Queue()
    for running in started:
        threading.Thread(target=_drain, args=(running, failures), daemon=True).start()
    try:
        link_up(party)
        owner = design.join(party)
        yield owner
        owner.leave()
    except PeerLostError as error:
        with suppress(queue.Empty):  # a party closes its links before it says what it ends for
            raise failures.get(timeout=SETTLE_SECONDS) from None
        deaths = [f"the {running.role} {how}" for running in started if (how := running.how_it_died())]
        raise PeerLostError(
            deaths[0] if deaths else error.message, hint="its log is in the output's log directory"
        ) from None
    finally:
        for link in party.links.values():
            link.close()
        party.control.close()
        for running in started:
            running.stop(GRACE_SECONDS)


def _drain(running: Running, failures: queue.Queue[PartyFailure]) -> None:
    """Read what a party tells its supervisor, so that it never waits for room; keep what explains the end of the others."""
    try:
        while True:
            message = running.control.recv()
            if isinstance(message, PartyFailed) and message.error != "PeerLostError":
                failures.put(PartyFailure(running.role, message))
    except (PeerLostError, ProtocolError):
        return
