"""The provider builds an emulator of its trunk, once for all runs (in its cache), and hands it to whoever was promised one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.data import load_examples
from veiltune.examples import tokenize
from veiltune.models.bottom import Bottom
from veiltune.models.cache import cache_root
from veiltune.models.checkpoint import Checkpoint
from veiltune.models.cut import Cut, owner_model
from veiltune.models.emulators.blocks import as_trunk
from veiltune.models.emulators.build import TrunkSource, build_emulator
from veiltune.models.emulators.card import Emulator
from veiltune.models.emulators.distil import Distillation, Runner, States, token_batches
from veiltune.models.emulators.options import EmulatorOptions
from veiltune.models.families import find_family
from veiltune.models.skeleton import assign_parameter
from veiltune.parties.party import Party
from veiltune.parties.split.server import TrunkServer
from veiltune.parties.weights import read_group, shards
from veiltune.transport.channel import Channel
from veiltune.transport.messages import EmulatorShard

SHARD_BYTES = 64 << 20


class Emulation:
    """Builds the emulator when it is first asked for; owners that come meanwhile wait for the same one.

    Args:
        party: the provider.
        checkpoint: its model.
        cut: the agreed one.
        options: which emulator.
        server: gives the trunk's server, for a distillation's teacher, which takes its turn.
    """

    def __init__(
        self,
        party: Party,
        checkpoint: Checkpoint,
        cut: Cut,
        options: EmulatorOptions,
        server: Callable[[], TrunkServer],
    ) -> None:
        self.party = party
        self.checkpoint = checkpoint
        self.cut = cut
        self.options = options
        self._server = server
        self._lock = threading.Lock()
        self._built: Emulator | None = None

    def send(self, link: Channel) -> None:
        """Stream the emulator, card first."""
        emulator = self._emulator()
        group: dict[str, Tensor] = {}
        card = emulator.card.to_json()
        for name, value in emulator.tensors.items():
            if group and sum(each.nbytes for each in group.values()) + value.nbytes > SHARD_BYTES:
                link.send(EmulatorShard(card, group, last=False))
                group = {}
            group[name] = value
        link.send(EmulatorShard(card, group, last=True))

    def _emulator(self) -> Emulator:
        with self._lock:
            if self._built is None:
                dtype = next(self._server().trunk.model.parameters()).dtype
                names = {
                    n: s
                    for _, group in shards(self.checkpoint, find_family(self.checkpoint.config))
                    for n, s in group.items()
                }

                def read(wanted: Sequence[str]) -> dict[str, Tensor]:
                    found = read_group(self.checkpoint, {name: names[name] for name in wanted if name in names})
                    return {name: value.to(dtype) for name, value in found.items()}

                source = TrunkSource(
                    self.checkpoint.config, self.cut.trunk, read, f"{self.checkpoint.fingerprint} {dtype}"
                )
                distillation = self._distillation() if self.options.kind == "distilled" else None
                self._built = build_emulator(
                    source,
                    self.options,
                    distillation=distillation,
                    directory=cache_root(),
                    progress=self._report,
                )
            return self._built

    def _report(self, stage: str, done: int, total: int, loss: float | None) -> None:
        self.party.report("emulating", {"stage": stage, "done": done, "total": total, "loss": loss})

    # --- distillation ---------------------------------------------------------------------------------------------------

    def _distillation(self) -> Distillation:
        """The trunk as teacher, and states that the bottom makes of public text."""
        config = self.checkpoint.config
        server = self._server()
        parameter = next(server.trunk.model.parameters())
        bottom = self._bottom(parameter.dtype, parameter.device)
        draw = token_batches(self.options, int(config.vocab_size), self._text())

        def teacher(hidden: Tensor, mask: Tensor | None) -> Tensor:
            with server.lock:
                return server.trunk.forward(hidden, mask, None, None, training=False)

        def student(blocks: dict[int, nn.Module]) -> Runner:
            return as_trunk(config, self.cut, blocks)

        @torch.no_grad()
        def states(step: int) -> States:
            return bottom.states(draw(step).to(parameter.device)), None

        return Distillation(teacher, student, states)

    def _bottom(self, dtype: torch.dtype, device: torch.device) -> Bottom:
        """Token ids to states at the bottom cut: what of the owner's half stands above is never filled."""
        config = self.checkpoint.config
        family, model = find_family(config), owner_model(config, self.cut)
        decoder: Any = model.get_submodule(family.decoder)
        top = tuple(f"{family.blocks}.{slot}." for slot in self.cut.top)
        wanted = {name for name, _ in decoder.named_parameters(prefix=family.decoder) if not name.startswith(top)}
        for _, group in shards(self.checkpoint, family):
            chosen = {name: stored for name, stored in group.items() if name in wanted}
            for name, value in read_group(self.checkpoint, chosen).items() if chosen else ():
                assign_parameter(model, name, value.to(device, dtype))
        return Bottom(model, self.cut.bottom_layers)

    def _text(self) -> list[int] | None:
        """The public text to distil on, as one run of tokens; ``None``: random tokens.

        Raises:
            DataError: it cannot be read.
        """
        if self.options.distil_data is None:
            return None
        tokenizer = self.checkpoint.load_tokenizer()
        longest = self.options.distil_length
        examples = load_examples(self.options.distil_data, split="train", limit=None, seed=self.options.distil_seed)
        return [
            token
            for example in examples
            for token in tokenize(example, tokenizer, longest, too_long="truncate").input_ids
        ]
