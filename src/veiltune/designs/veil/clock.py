"""What training costs at the enclave's border: seconds, waiting, messages and bytes."""

from __future__ import annotations

import time
from typing import Any

from veiltune.engine import Engine
from veiltune.models.rotated.stub import VeilPort
from veiltune.parties.party import Party
from veiltune.transport.messages import Message, OptimizerStep, TrainBatch


class TrainingClock:
    """Seconds of training requests, those of them spent waiting for the host, and messages over the border."""

    def __init__(self, party: Party, port: VeilPort) -> None:
        self._meter = party.meter
        self._port = port
        self._report = party.report
        self.seconds = self.wait_seconds = 0.0
        self.crossings = self.num_bytes = self.steps = 0

    def _reading(self) -> tuple[float, float, int, int]:
        traffic = self._meter.snapshot()
        crossed = [counts for pair, kinds in traffic.items() if "host" in pair for counts in kinds.values()]
        messages, num_bytes = (sum(counts[unit] for counts in crossed) for unit in ("messages", "bytes"))
        return time.perf_counter(), self._port.wait_seconds, messages, num_bytes

    def timed(self, engine: Engine, request: Message) -> Message:
        """Have the engine answer, and add up what that took if it was part of a training step."""
        before = self._reading()
        answer = engine.handle(request)
        if isinstance(request, (TrainBatch, OptimizerStep)):
            now = self._reading()
            self.seconds += now[0] - before[0]
            self.wait_seconds += now[1] - before[1]
            self.crossings += now[2] - before[2]
            self.num_bytes += now[3] - before[3]
        if isinstance(request, OptimizerStep):
            self.steps += 1
            self._report("border", {"bytes": self.num_bytes, "messages": self.crossings, "border": "enclave's border"})
        return answer

    def figures(self) -> dict[str, Any]:
        """Sums so far."""
        return {
            "engine_seconds": self.seconds,
            "wait_seconds": self.wait_seconds,
            "crossings_per_step": self.crossings / max(1, self.steps),
            "border_bytes_per_step": self.num_bytes / max(1, self.steps),
        }
