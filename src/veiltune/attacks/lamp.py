"""LAMP: inputs optimised until their gradients are the observed ones, with discrete steps that a language model judges too.

*Reference.* "LAMP: Extracting Text from Gradients with Language Model Priors" (arXiv 2202.08827). Alternately *continuous*
steps, which move embeddings x_1 … x_n to lessen 1 - cos(∇L(x), observed) averaged over tensors, with a penalty that keeps the
embeddings' mean length that of the vocabulary's, and *discrete* ones, which take each embedding for its nearest token, and swap,
move or replace tokens wherever gradient distance + ``prior`` x (the text's mean negative log-likelihood) becomes less. The prior
is the base model: under a causal language model's loss it is the very loss that is differentiated.

*Not as there.* The published figures are of classifiers with known labels. Here each label is the next token, so labels are
unknown: while embeddings are no tokens a label is a distribution over tokens by cosine. With ``start = "span"`` tokens are those
that DAGER's first check (`veiltune.attacks.span`) leaves, if it leaves any, so that the search is one for their order and number;
``"random"`` is the published start. The last token is taken for the end token. All tokens but the first are taken to bear loss,
as with plain text. One text a step: `train.batch_size = 1`.

*Of LoRA factors* (PEFT's orientation) the gradients follow from the weight's, up to a factor that the cosine does not see:
d(lora_A) = lora_Bᵀ·dW and d(lora_B) = dW·lora_Aᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction, setting
from veiltune.attacks.gradients import FULL_BLOCKS, GRADIENTS, KeyFrom, Step, plain_step, recovered_keys, steps_of
from veiltune.attacks.span import SpanSearch
from veiltune.attacks.view import View
from veiltune.errors import UserError
from veiltune.models.families import find_family
from veiltune.models.family import Linear

LENGTH_WEIGHT = 0.1
SHARPNESS = 20.0
"""Of the labels: softmax of this times the cosine with each token's embedding."""
MOST = 1024
NEAR = 0.1
"""Residual in the first span up to which ``start = "span"`` takes a token."""


@dataclass(frozen=True)
class Lamp(Attack):
    """See the module. ``rounds`` of ``steps`` continuous steps at ``learning_rate`` and ``trials`` discrete ones."""

    name: ClassVar[str] = "lamp"
    summary: ClassVar[str] = "gradient matching with a language model's prior"
    observer: ClassVar[str] = "host"
    against: ClassVar = GRADIENTS
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights", "public_ancestor"})
    cost: ClassVar[str] = (
        "rounds x (3 x steps + trials) passes forward and back through the model a text; minutes a text"
    )
    control: ClassVar[tuple[str, float]] = ("bag_f1", 0.5)
    leaky_settings: ClassVar[Mapping[str, Any]] = {"key": "none"}

    start: Literal["span", "random"] = "span"
    rounds: int = 3
    steps: int = setting(20, least=0)
    trials: int = 100
    learning_rate: float = 0.05
    prior: float = 0.02
    key: KeyFrom = "none"
    distance: float = 0.0

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        model = auxiliary.take("base_weights")
        search = SpanSearch(model, NEAR, MOST)
        readers = [each for each in find_family(model.config).linears(_blocks(model)) if each.side == "input"]
        keys: dict[str, Tensor] = {}
        if self.key == "ancestor":
            keys = recovered_keys(view, auxiliary.take("public_ancestor"), search.family, readers)
        found: list[list[int]] = []
        was = {name: value.requires_grad for name, value in model.named_parameters()}
        model.requires_grad_(requires_grad=False)
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            for step in steps_of(view):
                if len(step.lengths) != 1:
                    raise UserError(
                        f"{len(step.lengths)} texts are in one gradient, and LAMP is made for one",
                        hint="attack a run with train.batch_size = 1 and train.accumulate = 1, or use dager",
                    )
                plain = plain_step(step, keys, readers)
                target = _Target(model, plain, readers)
                allowed = search.inside(plain) if self.start == "span" else None
                found.append(_Texts(self, model, target, step.lengths[0], allowed, rng).best())
        for name, value in model.named_parameters():
            value.requires_grad_(was[name])
        return Reconstruction(tokens=found)


def _blocks(model: Any) -> int:
    return min(FULL_BLOCKS, int(model.config.num_hidden_layers))


class _Target:
    """The observed gradients, and how far those of a loss are from them."""

    def __init__(self, model: Any, step: Step, readers: list[Linear]) -> None:
        self.in_out = find_family(model.config).weights_in_out
        self.factors = step.factors
        self.observed = {
            linear.path: {
                leaf: step.gradients[f"{linear.path}.{leaf}"].float()
                for leaf in ("weight", "lora_A", "lora_B")
                if f"{linear.path}.{leaf}" in step.gradients and bool(step.gradients[f"{linear.path}.{leaf}"].any())
            }
            for linear in readers
        }
        self.observed = {path: values for path, values in self.observed.items() if values}
        self.weights = [model.get_parameter(f"{path}.weight").requires_grad_(True) for path in self.observed]

    def distance(self, loss: Tensor, *, twice: bool) -> Tensor:
        """1 - the mean cosine of the loss's gradients and the observed ones."""
        gradients = torch.autograd.grad(loss, self.weights, create_graph=twice)
        cosines = [
            functional.cosine_similarity(self._as(path, leaf, gradient).flatten(), seen.flatten(), dim=0)
            for (path, values), gradient in zip(self.observed.items(), gradients, strict=True)
            for leaf, seen in values.items()
        ]
        return 1 - torch.stack(cosines).mean()

    def _as(self, path: str, leaf: str, gradient: Tensor) -> Tensor:
        if leaf == "weight":
            return gradient
        rows = gradient.T if self.in_out else gradient
        if leaf == "lora_A":
            return self.factors[f"{path}.lora_B"].float().T @ rows
        return rows @ self.factors[f"{path}.lora_A"].float().T


class _Texts:
    """The search of one text.

    Args:
        attack: its settings.
        model: the base model, whose loss is differentiated.
        target: what its gradients should be.
        length: of the text, in tokens.
        allowed: tokens that it may be made of; ``None``: all.
        rng: draws starts and discrete steps.
    """

    def __init__(
        self, attack: Lamp, model: Any, target: _Target, length: int, allowed: Tensor | None, rng: torch.Generator
    ) -> None:
        self.attack, self.model, self.target, self.rng = attack, model, target, rng
        self.table: Tensor = model.get_input_embeddings().weight.detach()
        self.tokens = torch.arange(len(self.table)) if allowed is None else allowed
        self.end = SpanSearch.end_of(model.config)
        self.free = length - 1

    def best(self) -> list[int]:
        """The text found."""
        guess = self.tokens[torch.randint(len(self.tokens), (self.free,), generator=self.rng)]
        if not self.target.observed:
            return [*guess.tolist(), self.end]
        cost = self.cost(guess)
        for _ in range(self.attack.rounds):
            moved = self._continuous(guess)
            other = self.cost(moved)
            guess, cost = (moved, other) if other < cost else (guess, cost)
            for trial in self._trials():
                changed = self._changed(guess, trial)
                other = self.cost(changed)
                guess, cost = (changed, other) if other < cost else (guess, cost)
        return [*guess.tolist(), self.end]

    def cost(self, tokens: Int[Tensor, " n"]) -> float:
        """Gradient distance and the prior's share of a discrete text."""
        ids = torch.cat([tokens, torch.tensor([self.end])])[None]
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return float(self.target.distance(loss, twice=False)) + self.attack.prior * float(loss.detach())

    def _continuous(self, tokens: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Adam on embeddings that begin at these tokens'; the nearest allowed tokens of where they end."""
        inputs = self.table[tokens].clone().requires_grad_(True)
        length = self.table[self.tokens].norm(dim=-1).mean()
        rate = self.attack.learning_rate * float(self.table.std())
        optimizer = torch.optim.Adam([inputs], lr=rate)
        for step in range(self.attack.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / self.attack.steps)
            distance = self.target.distance(self._soft_loss(inputs), twice=True)
            penalty = LENGTH_WEIGHT * (inputs.norm(dim=-1).mean() / length - 1).square()
            optimizer.zero_grad()
            (distance + penalty).backward(inputs=[inputs])
            optimizer.step()
        with torch.no_grad():
            return self.tokens[self._cosines(inputs, self.tokens).argmax(-1)]

    def _cosines(self, inputs: Float[Tensor, "n d"], tokens: Int[Tensor, " v"]) -> Float[Tensor, "n v"]:
        return functional.normalize(inputs, dim=-1) @ functional.normalize(self.table[tokens], dim=-1).T

    def _soft_loss(self, inputs: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Cross-entropy of the next token, the labels told by the embeddings themselves."""
        whole = torch.cat([inputs, self.table[self.end][None]])
        logits = self.model(inputs_embeds=whole[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        labels = (SHARPNESS * self._cosines(inputs[1:], self.tokens)).softmax(-1)
        told = -(labels * logits[:-1, self.tokens]).sum()
        return (told - logits[-1, self.end]) / self.free

    def _trials(self) -> Iterator[int]:
        """Kinds of discrete step: 0 swaps two tokens, 1 moves a stretch, 2 replaces one token."""
        yield from torch.randint(3, (self.attack.trials,), generator=self.rng).tolist()

    def _changed(self, tokens: Int[Tensor, " n"], kind: int) -> Int[Tensor, " n"]:
        changed = tokens.clone()
        i, j, k = sorted(torch.randint(self.free + 1, (3,), generator=self.rng).tolist())
        first, second = torch.randint(self.free, (2,), generator=self.rng).tolist()
        if kind == 0:
            changed[first], changed[second] = tokens[second], tokens[first]
        elif kind == 1:  # the stretches i..j and j..k change places
            changed = torch.cat([tokens[:i], tokens[j:k], tokens[i:j], tokens[k:]])
        else:
            changed[first] = self.tokens[torch.randint(len(self.tokens), (1,), generator=self.rng)]
        return changed
