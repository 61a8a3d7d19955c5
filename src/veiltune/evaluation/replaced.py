"""What stands in the leaky control's view for gradients of LoRA factors, for emulators and for what the trunk answered.

Full gradients of the plain model on the true texts, as whoever takes part in federated training without protection sees them; the
trunk itself; the recorded answers on a wire that does not round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.attacks import View
from veiltune.attacks.gradients import FULL_BLOCKS
from veiltune.attacks.passes import agreement_of
from veiltune.evaluation.truth import TruePass
from veiltune.models.emulators.card import EmulatorCard
from veiltune.models.families import find_family
from veiltune.privacy.quantisation import WireCodec
from veiltune.transport.messages import EmulatorShard, FactorGradients, Message, TrunkOutput


class Replaced:
    """Makes such messages of recorded ones.

    Args:
        view: of a run.
        model: the plain causal language model.
        passes: the true texts, by the number of the message that begins their pass.
        codec: of the control's wire.
    """

    def __init__(self, view: View, model: nn.Module, passes: Mapping[int, TruePass], codec: WireCodec) -> None:
        self.model = model
        self.codec = codec
        self._steps = _texts_of_steps(view, passes) if "FactorGradients.tensors" in view.reads else {}
        agreed = agreement_of(view) if "SplitRequest.terms" in view.reads else None
        self._recorded = None if agreed is None else WireCodec.for_activations(agreed.wire)

    def __call__(self, number: int, message: Message) -> Message:
        """The message as it would be without protection; other kinds as they are."""
        if isinstance(message, FactorGradients):
            return FactorGradients(full_gradients(self.model, self._steps[number]) if number in self._steps else {})
        if isinstance(message, EmulatorShard):
            return whole_trunk(message, self.model)
        if isinstance(message, TrunkOutput) and self._recorded is not None:
            return TrunkOutput(message.ticket, self.codec.encode(self._recorded.decode(message.hidden).float()))
        return message


def whole_trunk(message: EmulatorShard, model: nn.Module) -> EmulatorShard:
    """In the last shard every block of the trunk, in the others nothing."""
    start, stop = message.card["trunk"]
    card = EmulatorCard(
        kind="layerdrop", trunk=(start, stop), kept=tuple(range(start, stop)), parameter_share=1.0, byte_share=1.0
    )
    config: Any = model.config
    prefixes = tuple(f"{find_family(config).blocks}.{slot}." for slot in card.kept)
    whole = {name: value.detach() for name, value in model.named_parameters() if name.startswith(prefixes)}
    return EmulatorShard(card.to_json(), whole if message.last else {}, message.last)


def _texts_of_steps(view: View, passes: Mapping[int, TruePass]) -> dict[int, list[TruePass]]:
    """The passes of each step that is asked for, by the number of the message that holds its gradients."""
    steps: dict[int, list[TruePass]] = {}
    before = -1
    for seen in view.messages("FactorGradients"):
        numbers = [number for number in sorted(passes) if before < number < seen.number]
        if view.targets is None or any(view.targets.get(number) for number in numbers):
            steps[seen.number] = [passes[number] for number in numbers]
        before = seen.number
    return steps


def full_gradients(model: Any, passes: Sequence[TruePass]) -> dict[str, Tensor]:
    """Gradients of the first `FULL_BLOCKS` blocks' linears, of the mean loss over a step's texts, by parameter name."""
    family = find_family(model.config)
    blocks = min(FULL_BLOCKS, int(model.config.num_hidden_layers))
    names = [f"{linear.path}.weight" for linear in family.linears(blocks)]
    was = {name: value.requires_grad for name, value in model.named_parameters()}
    model.requires_grad_(False)
    weights = [model.get_parameter(name).requires_grad_(True) for name in names]
    with torch.enable_grad():
        loss = _mean_loss(model, passes)
    gradients = dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
    for name, value in model.named_parameters():
        value.requires_grad_(was[name])
    return gradients


def _mean_loss(model: Any, passes: Sequence[TruePass]) -> Tensor:
    """Cross-entropy over all labelled tokens of these passes."""
    total, counted = torch.zeros(()), 0
    for true in passes:
        logits = model(input_ids=true.ids, attention_mask=true.mask, use_cache=False).logits
        labels = true.labels[:, 1:].flatten()
        total = total + nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
        counted += int((labels >= 0).sum())
    return total / counted
