"""What training costs at a border between parties: seconds, waiting, messages, bytes; and the loop of a party that trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from veiltune.engine import Engine
from veiltune.parties.party import Party
from veiltune.transport.messages import CostReport, CostRequest, Goodbye, OptimizerStep, TrainBatch
from veiltune.transport.transcript import Traffic, traffic_since


class BorderClock:
    """Adds up what passes while it is entered, apart from all other traffic. May be entered again inside itself.

    Args:
        party: whose links are counted.
        across: the role at the other side of the border.
        border: what people call it.
        waited: seconds spent waiting for the other side so far; ``None``: not known.

    Attributes:
        more: figures of the trainer's own, asked for with the others.
    """

    def __init__(self, party: Party, across: str, border: str, waited: Callable[[], float] | None = None) -> None:
        self._party = party
        self._across = across
        self._border = border
        self._waited = waited
        self.more: Callable[[], dict[str, Any]] = dict
        self._depth = 0
        self._before: tuple[float, float, Traffic] = (0.0, 0.0, {})
        self.steps = self.messages = self.num_bytes = 0
        self.seconds = self.wait_seconds = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._before = self._reading()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        begun, waited, traffic = self._before
        now = self._reading()
        self.seconds += now[0] - begun
        self.wait_seconds += now[1] - waited
        for pair, kinds in traffic_since(now[2], traffic).items():
            if self._across in pair.split("->"):
                self.messages += sum(counts["messages"] for counts in kinds.values())
                self.num_bytes += sum(counts["bytes"] for counts in kinds.values())

    def _reading(self) -> tuple[float, float, Traffic]:
        return time.perf_counter(), self._waited() if self._waited else 0.0, self._party.meter.snapshot()

    def end_step(self) -> None:
        """A step is complete."""
        self.steps += 1
        self._party.report("border", {"bytes": self.num_bytes, "messages": self.messages, "border": self._border})

    def figures(self) -> dict[str, Any]:
        """Sums so far; traffic by the step."""
        waits = {"wait_seconds": self.wait_seconds} if self._waited else {}
        return {
            "engine_seconds": self.seconds,
            **waits,
            "crossings_per_step": self.messages / max(1, self.steps),
            "border_bytes_per_step": self.num_bytes / max(1, self.steps),
            **self.more(),
        }


def serve_owner(party: Party, make_engine: Callable[[], Engine], clock: BorderClock, *, held_parameters: int) -> None:
    """Answer the owner until it is done.

    The engine is made when something is first to be computed: before that no factor is drawn and no key used again.
    """
    engine: Engine | None = None
    owner = party.links["owner"]
    party.report("ready")
    while not isinstance(request := owner.recv(), Goodbye):
        if isinstance(request, CostRequest):
            owner.send(CostReport({"enclave_parameters": held_parameters, **clock.figures()}))
            continue
        engine = engine or make_engine()
        if isinstance(request, (TrainBatch, OptimizerStep)):
            with clock:
                answer = engine.handle(request)
        else:
            answer = engine.handle(request)
        if isinstance(request, OptimizerStep):
            clock.end_step()
        owner.send(answer)
