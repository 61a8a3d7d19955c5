"""Stealing by retraining: the host keeps the trunk as it has it, and trains what it lacks around it on public text.

*Symbols.* The thief has the ends of a public ancestor: embeddings E', norms, head. Its first states are E'·P with a trained
(d, d) matrix P, and its head reads n(h·Q) with a trained Q and the final norm n, trained on; P and Q begin as I. Under
`obfuscatune` norms between the linears are trained on too, and every one of the many keys is missing between them. Under `veil`
the trunk is whole in one unknown basis, so P = R and Q = R⁻¹ would make the thief's model the true one.

The thief keeps back some of its text and returns the moment of its training at which it predicted that best, the beginning
included: P and Q have d² numbers each, and little text at a rate that could turn a basis unlearns what was right at the start.

`of` = "random" is the floor: the same training around random weights of the same sizes.

*Controls.* Leaky: the trunk as it is without protection, the same training. There I is the solution, so it says that the thief's
model is put together rightly and that training does no harm, not that training would find a rotation. Shuffled: the thief's
predictions beside other texts.

*Reference.* The attack is that of TEE-shielded partitions: Zhang et al., "No Privacy Left Outside" (IEEE S&P 2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, Knowledge, Reconstruction
from veiltune.attacks.folded import Shape, shards
from veiltune.attacks.view import View
from veiltune.models.cut import Trunk, trunk_model
from veiltune.models.rotated import rotated_model
from veiltune.models.skeleton import assign_parameter
from veiltune.study_terms import Knows

CHECKS = 5
"""How often, evenly over the training, the thief looks at the text that it kept back."""
KEPT_BACK = 8
"""Texts that it keeps back, or as many as it learns from."""


@dataclass(frozen=True)
class Retraining(Attack):
    """See the module. ``steps`` of ``batch`` texts cut to ``length`` tokens."""

    name: ClassVar[str] = "retraining"
    summary: ClassVar[str] = "the trunk as the host has it, with ends trained on public text"
    observer: ClassVar[str] = "host"
    against: ClassVar = {
        design: frozenset({"TrunkShard.tensors", "TrunkPlan.config", "TrunkPlan.settings"})
        for design in ("obfuscatune", "veil")
    }
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"public_ancestor", "ancestor_model", "corpus"})
    knows: ClassVar[Knows] = "public_ancestor"
    cost: ClassVar[str] = "steps forward and backward passes through the trunk; some minutes on two cores"
    control: ClassVar[tuple[str, float]] = ("agreement", 0.5)
    of_texts: ClassVar[bool] = False
    leaky_settings: ClassVar[Mapping[str, Any]] = {"of": "seen"}

    steps: int = 60
    batch: int = 4
    length: int = 48
    learning_rate: float = 1e-3
    of: Literal["seen", "random"] = "seen"

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        tensors = shards(view)
        if self.of == "random":
            tensors = {name: _alike(value, rng) for name, value in tensors.items()}
        thief = _Thief(Shape.of(view), tensors, auxiliary.take("ancestor_model"), view.rights.design)
        self._train(thief, auxiliary.take("corpus"), rng)
        thief.eval()

        @torch.no_grad()
        def predict(text: Sequence[int]) -> list[int]:
            return thief(torch.tensor([list(text)]))[0, :-1].argmax(-1).tolist()

        return Reconstruction(predict=predict)

    def _train(self, thief: _Thief, corpus: Sequence[Sequence[int]], rng: torch.Generator) -> None:
        texts = [torch.tensor(list(text[: self.length])) for text in corpus if len(text) > 1]
        count = min(KEPT_BACK, len(texts) // 2)
        kept_back, texts = texts[:count], texts[count:]
        trained = [value for value in thief.parameters() if value.requires_grad]
        best = _Best(trained)
        checks = {round(self.steps * part / CHECKS) for part in range(CHECKS + 1)}
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=self.steps + 1)
        for step in range(self.steps):
            if step in checks:
                best.look(_held_out_loss(thief, kept_back))
            chosen = torch.randint(len(texts), (self.batch,), generator=rng).tolist()
            length = min(len(texts[i]) for i in chosen)
            loss = _loss(thief, torch.stack([texts[i][:length] for i in chosen]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
        best.look(_held_out_loss(thief, kept_back))
        best.restore()


class _Best:
    """The moment of a training with the least loss on text that was kept back."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self._trained = trained
        self._loss = math.inf
        self._values: list[Tensor] = []

    def look(self, loss: float) -> None:
        """Keep what is trained as it is now, if it is better than before."""
        if loss < self._loss:
            self._loss, self._values = loss, [value.detach().clone() for value in self._trained]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was kept."""
        for value, kept in zip(self._trained, self._values, strict=False):
            value.copy_(kept)


def _loss(thief: _Thief, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token."""
    return functional.cross_entropy(thief(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def _held_out_loss(thief: _Thief, texts: Sequence[Int[Tensor, " seq"]]) -> float:
    """The mean over texts; of none it is 0."""
    return sum(float(_loss(thief, text[None])) for text in texts) / max(1, len(texts))


def _alike(value: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian numbers of a tensor's shape and size."""
    noise = torch.randn(value.shape, generator=rng)
    return noise * (value.float().norm() / noise.norm())


class _Thief(nn.Module):
    """Public ends, a trained map into the host's trunk, the trunk, and a trained map out of it."""

    def __init__(self, shape: Shape, tensors: Mapping[str, Tensor], public: Any, design: str) -> None:
        super().__init__()
        self.model: Any = (rotated_model if design == "veil" else trunk_model)(shape.config, shape.cut)
        for name, value in tensors.items():
            assign_parameter(self.model, name, value.float())
        for name, value in list(self.model.named_parameters()):
            if value.is_meta:  # the host was not sent it: norms, and biases of what writes to the stream
                assign_parameter(self.model, name, public.get_parameter(name).detach().clone())
                self.model.get_parameter(name).requires_grad_(True)
        self.trunk = Trunk(self.model, shape.config, shape.cut)
        self.table = EmbeddingTable(public)
        self.form = self.table.form("veil")
        decoder = public.get_submodule(shape.family.decoder)
        self.norm: nn.Module = copy.deepcopy(getattr(decoder, shape.family.final_norm)).requires_grad_(True)
        self.register_buffer("head", public.get_output_embeddings().weight.detach())
        width = int(shape.config.hidden_size)
        self.enter, self.leave = (nn.Parameter(torch.eye(width)) for _ in range(2))

    def forward(self, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq v"]:
        """Logits of the thief's model."""
        batch, seq = ids.shape
        places = torch.arange(seq).repeat(batch)
        states = self.table.states(ids.flatten(), places, self.form).view(batch, seq, -1)
        hidden = self.trunk.forward(states @ self.enter, None, None, None, training=False)
        return self.norm(hidden @ self.leave) @ self.get_buffer("head").T
