"""Emulator misuse: the owner makes a model of its own out of the emulator it was given, without the trunk.

The thief is the owner, who rightly has embeddings, bottom, top, head and the emulator. It puts them together, and may then tune
the emulator's blocks: on public text (``learn_from = "text"``), or so that they answer the states it once sent as the trunk did
(``"queries"``: distillation from what its own inference brought it, the loss being that of `models.emulators.distil`).

*Measured*: how often the thief's model predicts the next token of public text it never learnt from, and how often it predicts
what the true model does. Beside it stands the leaky control, whose emulator is the trunk itself and is left as it is: the true
model. The emulator as it came is ``learn_from = "nothing"``; nothing at all in the trunk's place is ``start = "empty"``.

*Reference.* The risk is offsite-tuning's (arXiv 2302.04870, §3.1): an emulator that is too good gives the model away. Utility of
emulator, plug-in and zero-shot on a run's tasks are in its record (``utility_emulator`` and ``utility``); this adds what an owner
who repairs the emulator gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction, predictions, setting
from veiltune.attacks.passes import agreement_of
from veiltune.attacks.view import View
from veiltune.errors import DataError
from veiltune.models.cut import Cut, owner_model
from veiltune.models.emulators.blocks import as_trunk, install_emulator
from veiltune.models.emulators.card import EmulatorCard
from veiltune.models.emulators.distil import distillation_loss
from veiltune.models.families import find_family
from veiltune.models.skeleton import assign_parameter, blocks_of, config_from_json
from veiltune.privacy.quantisation import WireCodec
from veiltune.study_terms import Knows

BATCH = 4
LENGTH = 96
"""Tokens of a public text that are learnt from."""

READS = frozenset(
    {
        "SplitRequest.terms",
        "ModelCard.config",
        "WeightShard.tensors",
        "EmulatorShard.card",
        "EmulatorShard.tensors",
        "TrunkForward.ticket",
        "TrunkForward.hidden",
        "TrunkForward.position_ids",
        "TrunkForward.attention_mask",
        "TrunkOutput.ticket",
        "TrunkOutput.hidden",
    }
)

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class EmulatorMisuse(Attack):
    """See the module. ``steps`` of AdamW at ``learning_rate``, falling linearly to 0."""

    name: ClassVar[str] = "emulator_misuse"
    summary: ClassVar[str] = "a model put together from the emulator, and repaired by tuning it"
    observer: ClassVar[str] = "owner"
    against: ClassVar = {"offsite": READS, "offline": READS}
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"corpus"})
    knows: ClassVar[Knows] = "public_text"
    cost: ClassVar[str] = "steps of training the emulator's blocks on batches of 4 texts; minutes on two cores"
    control: ClassVar[tuple[str, float]] = ("agreement", 0.99)
    leaky_settings: ClassVar = {"learn_from": "nothing", "start": "emulator"}
    of_texts: ClassVar[bool] = False

    learn_from: Literal["text", "queries", "nothing"] = "text"
    start: Literal["emulator", "empty"] = "emulator"
    steps: int = setting(60, least=0)
    learning_rate: float = 1e-4

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        config = config_from_json(view.messages("ModelCard")[0]["config"])
        cut = _cut_of(view, config)
        model: Any = _owner_half(view, config, cut)
        if self.start == "emulator":
            card, tensors = _emulator_of(view)
            install_emulator(model, cut.trunk, card, tensors, materialise=torch.float32)
            if self.learn_from != "nothing":
                self._repair(view, auxiliary, model, cut, card, rng)
        model.eval().requires_grad_(requires_grad=False)
        return Reconstruction(predict=lambda text: predictions(model, text))

    def _repair(
        self, view: View, auxiliary: Auxiliary, model: Any, cut: Cut, card: EmulatorCard, rng: torch.Generator
    ) -> None:
        blocks = blocks_of(model, find_family(model.config))
        kept = {slot: blocks[slot] for slot in card.kept}
        model.requires_grad_(requires_grad=False)
        parameters = [p for block in kept.values() for p in block.requires_grad_(requires_grad=True).parameters()]
        if self.learn_from == "text":
            losses = _text_losses(model, auxiliary.take("corpus"), rng)
        else:
            losses = _query_losses(as_trunk(model.config, cut, kept), _queries(view), rng)
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        for step, loss in zip(range(self.steps), losses, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - step / self.steps)
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()


# --- what the owner was given -----------------------------------------------------------------------------------------


def _cut_of(view: View, config: Any) -> Cut:
    terms = view.messages("SplitRequest")[0]["terms"]
    return Cut.of(config, int(terms["cut.bottom_layers"]), int(terms["cut.top_layers"]))


def _owner_half(view: View, config: Any, cut: Cut) -> nn.Module:
    """Embeddings, bottom, top and head, in a copy; the trunk's slots hand states on."""
    model: Any = owner_model(config, cut)
    for shard in view.messages("WeightShard"):
        for name, value in shard["tensors"].items():
            assign_parameter(model, name, value.float())
    model.tie_weights()
    return model


def _emulator_of(view: View) -> tuple[EmulatorCard, dict[str, Tensor]]:
    shards = view.messages("EmulatorShard")
    if not shards:
        raise DataError("the transcript holds no emulator", hint="record a whole session: session.record")
    tensors = {name: value for shard in shards for name, value in shard["tensors"].items()}
    floats = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    return EmulatorCard.from_json(shards[0]["card"]), {name: value.clone() for name, value in floats.items()}


Query = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""States that went in, (batch, seq, d), what came back, the padding mask, and position ids where they do not count."""


def _queries(view: View) -> list[Query]:
    """Every answered forward.

    Raises:
        DataError: there is none.
    """
    codec = WireCodec.for_activations(agreement_of(view).wire)
    asked: dict[int, Any] = {}
    found: list[Query] = []
    events = [*view.messages("TrunkForward"), *view.messages("TrunkOutput")]
    for seen in sorted(events, key=lambda each: each.number):
        if seen.kind == "TrunkForward":
            asked[seen["ticket"]] = seen
        elif (forward := asked.pop(seen["ticket"], None)) is not None:
            states, output = (codec.decode(each["hidden"]).float() for each in (forward, seen))
            found.append((states, output, forward["attention_mask"], forward["position_ids"]))
    if not found:
        raise DataError(
            "the owner asked the trunk nothing in this run",
            hint='set evaluate.tasks, or learn_from = "text"',
        )
    return found


# --- what it learns from ----------------------------------------------------------------------------------------------


def _text_losses(model: Any, corpus: Sequence[Sequence[int]], rng: torch.Generator) -> Iterator[Loss]:
    """Cross-entropy of the next token, batch by batch, for ever."""
    texts = [torch.tensor(list(text[:LENGTH])) for text in corpus if len(text) > 1]
    for order in _orders(len(texts), rng):
        for chosen in order.split(BATCH):
            rows = [texts[index] for index in chosen.tolist()]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
            yield lambda ids=ids, labels=labels: model(input_ids=ids, labels=labels, use_cache=False).loss


def _query_losses(run: Any, queries: Sequence[Query], rng: torch.Generator) -> Iterator[Loss]:
    """The distance of the emulator's answer from the trunk's, query by query, for ever."""
    for order in _orders(len(queries), rng):
        for index in order.tolist():
            states, output, mask, places = queries[index]
            yield lambda given=(states, mask, places), output=output: distillation_loss(run(*given), output, given[1])


def _orders(count: int, rng: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield torch.randperm(count, generator=rng)
