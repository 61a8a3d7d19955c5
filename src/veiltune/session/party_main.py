"""One party from start to end: run its role, report how it ended, close its links. The same in a process and in a thread."""

from __future__ import annotations

import logging

from pydantic import BaseModel

from veiltune.designs import DESIGNS, Design
from veiltune.errors import PeerLostError, ProtocolError, VeiltuneError, storage_fault
from veiltune.parties.party import Party, peak_rss_bytes
from veiltune.session.opening import link_up
from veiltune.transport.messages import Message, PartyDone, PartyFailed

log = logging.getLogger(__name__)


def design_options(design: Design, tables: dict[str, dict[str, object]]) -> BaseModel:
    """The chosen design's options from the configuration's tables."""
    return design.options.model_validate(tables.get(design.name, {}))


def run_party(party: Party) -> None:
    """Run the party's role and tell the supervisor how it ended. Raises nothing."""
    design = DESIGNS[party.config.design]
    ending: Message
    try:
        link_up(party)
        design.roles[party.role](party)
        ending = PartyDone({**party.figures, "traffic": party.meter.snapshot(), "peak_rss": peak_rss_bytes()})
    except VeiltuneError as error:
        log.info("the %s stops: %s", party.role, error.message)
        ending = PartyFailed(type(error).__name__, error.message, error.hint, error.exit_code)
    except Exception as error:
        log.exception("internal error in the %s", party.role)
        if fault := storage_fault(error, f"the {party.role}'s"):
            ending = PartyFailed(type(fault).__name__, fault.message, fault.hint, fault.exit_code)
        else:  # the text of a foreign exception may quote data, so only its type leaves this process
            ending = PartyFailed(
                "InternalError",
                f"internal error in the {party.role}: {type(error).__name__}",
                f"its log has the details: log/{party.role}.log",
                70,
            )
    for link in party.links.values():
        link.close()
    try:
        party.control.send(ending)
    except (PeerLostError, ProtocolError):
        log.warning("the supervisor is gone")
    party.control.close()
