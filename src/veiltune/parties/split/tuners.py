"""How an owner with layers of its own tunes: over the trunk, from kept trunk outputs, or against an emulator.

*Reveals.* `KeepingTuner`: each example crosses once, whatever the number of epochs. `EmulatedTuner`: training crosses nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from veiltune.engine import Engine
from veiltune.examples import TokenizedExample
from veiltune.models.bottom import Bottom
from veiltune.models.cut import Cut, Trunk
from veiltune.models.emulators.blocks import emulated_trunk, emulator_blocks
from veiltune.models.emulators.card import EmulatorCard
from veiltune.models.emulators.port import EmulatorPort
from veiltune.models.trunk_stub import TrunkStub
from veiltune.parties.clock import BorderClock
from veiltune.parties.output_cache import OutputCache
from veiltune.parties.party import Party
from veiltune.parties.split.plan import SplitPlan
from veiltune.parties.split.port import WirePort, expect
from veiltune.privacy.decorrelation import Decorrelation
from veiltune.tee.sealing import SealingKey
from veiltune.transport.messages import EmulatorRequest, EmulatorShard
from veiltune.tuner import EngineTuner


def tuner_kind(plan: SplitPlan) -> type[SplitTuner]:
    """The tuner that a plan asks for."""
    if plan.emulator is not None:
        return EmulatedTuner
    return SplitTuner if plan.cache is None else KeepingTuner


class SplitTuner(EngineTuner):
    """Every step crosses: states out and back, and gradients out and back where the bottom is trained."""

    def __init__(
        self,
        party: Party,
        plan: SplitPlan,
        cut: Cut,
        engine: Engine,
        stub: TrunkStub,
        port: WirePort,
        decorrelation: Decorrelation | None,
    ) -> None:
        super().__init__(engine)
        self.party = party
        self.plan = plan
        self.cut = cut
        self.stub = stub
        self.port = port
        self.decorrelation = decorrelation
        self.correlations: list[float] = []
        self._clock = BorderClock(party, "provider", "cut")
        self._step = 0
        self._is_new_step = True
        self._random_state: Tensor | None = None
        engine.penalty = None if decorrelation is None else self._penalty

    def accumulate(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, normalizer: int) -> float:
        """See `Tuner.accumulate`."""
        if self._is_new_step:
            self.port.begin_step(self._step)
            self._is_new_step, self._random_state = False, torch.get_rng_state()
        with self._clock:
            self.stub.observe = self.decorrelation is not None
            try:
                return super().accumulate(input_ids, attention_mask, labels, normalizer)
            finally:
                self.stub.observe = False

    def step(self, learning_rate: float, max_grad_norm: float = 0.0) -> float:
        """See `Tuner.step`."""
        with self._clock:
            norm = super().step(learning_rate, max_grad_norm)
        self._clock.end_step()
        self._step, self._is_new_step = self._step + 1, True
        if self.decorrelation is not None:
            if self.decorrelation.last is not None:
                self.correlations.append(self.decorrelation.last)
            self.decorrelation.advance()
        return norm

    def save(self, step: int) -> None:
        """See `Tuner.save`. Saved in the middle of a step, the step will be run again, and must draw what it drew."""
        if not self._is_new_step and self._random_state is not None:
            torch.set_rng_state(self._random_state)
        super().save(step)

    def load(self, step: int) -> None:
        """See `Tuner.load`."""
        super().load(step)
        self._step, self._is_new_step = step, True
        if self.decorrelation is not None:
            self.decorrelation.start_at(step)

    def _penalty(self) -> Tensor | None:
        observed = self.stub.take_observed()
        if observed is None or self.decorrelation is None:
            return None
        embeddings, hidden, mask = observed
        present = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
        return self.decorrelation.penalty(embeddings.detach(), hidden, present)

    def figures(self) -> dict[str, Any]:
        """See `Tuner.figures`."""
        return self._clock.figures()

    def prepare(
        self, examples: Sequence[TokenizedExample], held_out: Sequence[TokenizedExample], *, bottom: str
    ) -> None:
        """What is to be done once the text is known and before the first step."""

    @contextmanager
    def on_emulator(self) -> Generator[None]:
        """Compute on the emulator for a while, where there is one."""
        yield


class KeepingTuner(SplitTuner):
    """Only the top is trained, so an example's trunk output never changes: it is asked for once and kept by the owner."""

    cache: OutputCache | None = None

    def prepare(
        self, examples: Sequence[TokenizedExample], held_out: Sequence[TokenizedExample], *, bottom: str
    ) -> None:
        """Open the cache; refuse now what would not fit later."""
        assert self.plan.cache is not None  # noqa: S101 - `tuner_kind`
        self._below_top = Bottom(self.engine.model, self.stub.index + 1)  # bottom and, at the stub, the whole trunk
        directory = self.party.directory / "trunk-outputs"
        key = SealingKey.load_or_create(self.party.directory) if self.plan.cache.sealed else None
        self.cache = OutputCache(directory, bottom, max_bytes=self.plan.cache.max_bytes, key=key)
        distinct = {tuple(example.input_ids) for example in [*examples, *held_out]}
        distinct = {ids for ids in distinct if self.cache.missing(list(ids))}
        width = int(self.engine.model.config.hidden_size)
        dtype = next(self.engine.model.parameters()).dtype
        self.cache.require_room(sum(len(ids) for ids in distinct), width, dtype, num_examples=len(distinct))

    def accumulate(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, normalizer: int) -> float:
        """See `Tuner.accumulate`."""
        with self._clock, self._replaying(input_ids, attention_mask):
            return super().accumulate(input_ids, attention_mask, labels, normalizer)

    def evaluate(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[float, int]:
        """See `Tuner.evaluate`."""
        with self._replaying(input_ids, attention_mask):
            return super().evaluate(input_ids, attention_mask, labels)

    @contextmanager
    def _replaying(self, input_ids: Tensor, attention_mask: Tensor) -> Generator[None]:
        """Kept outputs in the place of the trunk's, once those that are missing were asked for."""
        if self.cache is None:
            yield
            return
        rows = [row[: int(mask.sum())].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        self._fetch(self.cache, rows, input_ids, attention_mask)
        self.stub.replay = self._assembled(self.cache, rows, input_ids.shape[1])
        try:
            yield
        finally:
            self.stub.replay = None

    @torch.no_grad()
    def _fetch(self, cache: OutputCache, rows: list[list[int]], input_ids: Tensor, attention_mask: Tensor) -> None:
        first = {tuple(ids): index for index, ids in reversed(list(enumerate(rows)))}  # equal texts cross once
        missing = sorted(index for ids, index in first.items() if cache.missing(list(ids)))
        if not missing:
            return
        length = max(len(rows[index]) for index in missing)
        device = self.engine.device
        self.engine.model.eval()
        output = self._below_top.states(
            input_ids[missing, :length].to(device), attention_mask[missing, :length].to(device)
        )
        for position, index in enumerate(missing):
            cache.put(rows[index], output[position, : len(rows[index])])

    def _assembled(self, cache: OutputCache, rows: list[list[int]], length: int) -> Tensor:
        """Kept outputs of the rows, padded on the right with zeros: (batch, length, d)."""
        kept = [cache.get(ids) for ids in rows]
        made = kept[0].new_zeros((len(rows), length, kept[0].shape[1]))
        for row, value in zip(made, kept, strict=True):
            row[: len(value)] = value
        return made.to(self.engine.device)


class EmulatedTuner(SplitTuner):
    """Training and its evaluation run on the emulator; scoring and generation cross to the trunk."""

    _emulator: EmulatorPort | None = None

    def accumulate(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, normalizer: int) -> float:
        """See `Tuner.accumulate`."""
        with self.on_emulator():
            return super().accumulate(input_ids, attention_mask, labels, normalizer)

    def evaluate(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[float, int]:
        """See `Tuner.evaluate`."""
        with self.on_emulator():
            return super().evaluate(input_ids, attention_mask, labels)

    def prepare(
        self,
        examples: Sequence[TokenizedExample],  # noqa: ARG002
        held_out: Sequence[TokenizedExample],  # noqa: ARG002
        *,
        bottom: str,  # noqa: ARG002
    ) -> None:
        """Get the emulator."""
        self._emulator = self._emulator or self._fetch()

    @contextmanager
    def on_emulator(self) -> Generator[None]:
        """See `SplitTuner.on_emulator`."""
        self._emulator = self._emulator or self._fetch()
        before, self.stub.port = self.stub.port, self._emulator
        try:
            yield
        finally:
            self.stub.port = before
            self._emulator.forget()

    def _fetch(self) -> EmulatorPort:
        self.port.link.send(EmulatorRequest())
        tensors: dict[str, Tensor] = {}
        card: dict[str, Any] = {}
        while True:
            shard = expect(self.port.link.recv(), EmulatorShard)
            card = card or shard.card
            tensors.update(shard.tensors)
            if shard.last:
                break
        self.party.figures["emulator"] = card
        config: Any = self.engine.model.config
        blocks = emulator_blocks(
            config,
            self.cut.trunk,
            EmulatorCard.from_json(card),
            tensors,
            materialise=next(self.engine.model.parameters()).dtype,
        )
        model = emulated_trunk(config, self.cut, blocks).to(self.engine.device)
        return EmulatorPort(Trunk(model, config, self.cut))
