"""LAMP: inputs optimised until their gradients are the observed ones, with discrete steps that a language model judges too.

*Reference.* "LAMP: Extracting Text from Gradients with Language Model Priors" (arXiv 2202.08827). Alternately *continuous*
steps, which move embeddings x_1 … x_n to lessen 1 - cos(∇L(x), observed) averaged over tensors, with a penalty that keeps the
embeddings' mean length that of the vocabulary's, and *discrete* ones, which take each embedding for its nearest token, and swap,
move or replace tokens wherever gradient distance + ``prior`` x (the text's mean negative log-likelihood) becomes less. The prior
is the base model: under a causal language model's loss it is the very loss that is differentiated.

*Not as there.* The published figures are of classifiers with known labels. Here each label is the next token, so labels are
unknown: while embeddings are no tokens a label is a distribution over tokens by cosine. With ``start = "span"`` tokens are those
that DAGER's first check (`veiltune.attacks.span`) leaves, if it leaves any, so that the search is one for their order and number.
If all of them have room in the text, all stand in it: then nothing is moved continuously, and the discrete steps begin at those
orders that the prior likes best, found by beam search. ``"random"`` is the published start. The last token is taken for the end
token. All tokens but the first are taken to bear loss, as with plain text. One text a step: `train.batch_size = 1`.

*Of LoRA factors* (PEFT's orientation) the gradients follow from the weight's, up to a factor that the cosine does not see:
d(lora_A) = lora_Bᵀ·dW and d(lora_B) = dW·lora_Aᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction, setting
from veiltune.attacks.gradients import FULL_BLOCKS, GRADIENTS, KeyFrom, Step, input_keys, plain_step, steps_of
from veiltune.attacks.span import SpanSearch
from veiltune.attacks.view import View
from veiltune.errors import UserError
from veiltune.models.families import find_family
from veiltune.models.family import Linear
from veiltune.study_terms import Knows, Phase

LENGTH_WEIGHT = 0.1
SHARPNESS = 20.0
"""Of the labels: softmax of this times the cosine with each token's embedding."""
MOST = 1024
TINY = 1e-30
AT_ONCE = 16  # discrete trials in one pass; the best of them is taken
BEAM = 64
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
    knows: ClassVar[Knows] = "public_ancestor"
    phases: ClassVar[frozenset[Phase]] = frozenset({"tuning"})
    cost: ClassVar[str] = (
        "rounds x (3 x steps + trials / 4) passes forward and back through the model a text; a minute or two a text"
    )
    control: ClassVar[tuple[str, float]] = ("bag_f1", 0.5)
    leaky_settings: ClassVar[Mapping[str, Any]] = {"key": "none"}

    start: Literal["span", "random"] = "span"
    rounds: int = 3
    steps: int = setting(20, least=0)
    trials: int = 400
    learning_rate: float = 0.05
    prior: float = 0.15
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
            keys = input_keys(view, auxiliary.take("public_ancestor"), search.family, readers)
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
    """The observed gradients, and how far those of texts are from them.

    A text's gradient of a linear is dYᵀ·X, of what goes in and what comes back, so that one pass serves many texts. It is never
    formed: texts are short, and ⟨dYᵀ·X, W⟩ = ⟨dY·W, X⟩ and ‖dYᵀ·X‖² = ⟨dY·dYᵀ, X·Xᵀ⟩ need no matrix of the weight's size a text.
    """

    def __init__(self, model: Any, step: Step, readers: list[Linear]) -> None:
        in_out = find_family(model.config).weights_in_out
        self.factors = step.factors
        self.observed: dict[str, dict[str, Tensor]] = {}
        for linear in readers:
            for leaf in ("weight", "lora_A", "lora_B"):
                seen = step.gradients.get(f"{linear.path}.{leaf}")
                if seen is not None and bool(seen.any()):
                    turned = seen.T if leaf == "weight" and in_out else seen
                    self.observed.setdefault(linear.path, {})[leaf] = turned.float()
        self._linears = [model.get_submodule(path) for path in self.observed]
        for linear in self._linears:
            linear.weight.requires_grad_(True)  # so that what comes out has a gradient

    def distances(self, losses_of: Callable[[], Tensor], *, twice: bool) -> tuple[Tensor, Tensor]:
        """1 - the mean cosine of each text's gradients and the observed ones, (n,), and the texts' losses, (n,)."""
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((inputs[0], output))

        handles = [linear.register_forward_hook(keep) for linear in self._linears]
        try:
            losses = losses_of()
        finally:
            for handle in handles:
                handle.remove()
        returned = torch.autograd.grad(losses.sum(), [output for _, output in seen], create_graph=twice)
        cosines = [
            _cosines(*self._sides(path, leaf, dy, x), wanted)
            for (path, values), (x, _), dy in zip(self.observed.items(), seen, returned, strict=True)
            for leaf, wanted in values.items()
        ]
        return 1 - torch.stack(cosines).mean(0), losses

    def _sides(
        self, path: str, leaf: str, dy: Float[Tensor, "n seq out"], x: Float[Tensor, "n seq in"]
    ) -> tuple[Tensor, Tensor]:
        """L and R whose product Lᵀ·R is the gradient of that tensor."""
        if leaf == "lora_A":
            return dy @ self.factors[f"{path}.lora_B"].float(), x
        if leaf == "lora_B":
            return dy, x @ self.factors[f"{path}.lora_A"].float().T
        return dy, x


def _cosines(
    left: Float[Tensor, "n seq a"], right: Float[Tensor, "n seq b"], wanted: Float[Tensor, "a b"]
) -> Float[Tensor, " n"]:
    """The cosine of each Lᵀ·R and one matrix."""
    inner = ((left @ wanted) * right).sum((1, 2))
    squares = ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
    return inner / (squares.clamp_min(TINY).sqrt() * wanted.norm().clamp_min(TINY))


class _Texts:
    """The search of one text.

    Args:
        attack: its settings.
        model: the base model, whose loss is differentiated.
        target: what its gradients should be.
        length: of the text, in tokens.
        allowed: tokens that it may be made of; ``None``: all.
        rng: draws starts and discrete steps.

    Attributes:
        all_stand: whether each allowed token must be in the text.
    """

    def __init__(
        self, attack: Lamp, model: Any, target: _Target, length: int, allowed: Tensor | None, rng: torch.Generator
    ) -> None:
        self.attack, self.model, self.target, self.rng = attack, model, target, rng
        self.table: Tensor = model.get_input_embeddings().weight.detach()
        self.tokens = torch.arange(len(self.table)) if allowed is None else allowed
        self.all_stand = allowed is not None and len(allowed) <= length - 1
        self.end = SpanSearch.end_of(model.config)
        self.free = length - 1

    def best(self) -> list[int]:
        """The text found."""
        guess = self.tokens[torch.randint(len(self.tokens), (self.free,), generator=self.rng)]
        if not self.target.observed or not self.free:
            return [*guess.tolist(), self.end]
        starts = self._fluent()[:AT_ONCE] if self.all_stand else guess[None]
        guess, cost = self._better(starts[0], torch.inf, starts)
        for _ in range(self.attack.rounds):
            if not self.all_stand:
                guess, cost = self._better(guess, cost, self._continuous(guess)[None])
            kinds = torch.randint(3, (self.attack.trials,), generator=self.rng)
            for some in kinds.split(AT_ONCE):
                guess, cost = self._better(guess, cost, torch.stack([self._changed(guess, k) for k in some.tolist()]))
        return [*guess.tolist(), self.end]

    @torch.no_grad()
    def _fluent(self) -> Int[Tensor, "k n"]:
        """Texts of the allowed tokens, what the prior likes best first; none stands twice while others have to find room."""
        texts, log_probs = torch.arange(len(self.tokens))[:, None], torch.zeros(len(self.tokens))
        for length in range(1, self.free):
            after = self.model(input_ids=self.tokens[texts], use_cache=False).logits[:, -1].log_softmax(-1)
            longer = log_probs[:, None] + after[:, self.tokens]
            used = functional.one_hot(texts, len(self.tokens)).sum(1) > 0
            crowded = (~used).sum(1, keepdim=True) >= self.free - length
            best = longer.masked_fill(used & crowded, -torch.inf).flatten().topk(min(BEAM, longer.numel()))
            kept = best.indices[best.values.isfinite()]
            log_probs = best.values[best.values.isfinite()]
            texts = torch.cat([texts[kept // len(self.tokens)], (kept % len(self.tokens))[:, None]], dim=1)
        last = self.model(input_ids=self.tokens[texts], use_cache=False).logits[:, -1].log_softmax(-1)[:, self.end]
        return self.tokens[texts[(log_probs + last).argsort(descending=True)]]

    def _better(
        self, guess: Int[Tensor, " n"], cost: float, others: Int[Tensor, "k n"]
    ) -> tuple[Int[Tensor, " n"], float]:
        if self.all_stand:
            others = others[(others[:, :, None] == self.tokens).any(1).all(1)]
            if not len(others):
                return guess, cost
        costs = self.costs(others)
        best = int(costs.argmin())
        return (others[best], float(costs[best])) if float(costs[best]) < cost else (guess, cost)

    def costs(self, texts: Int[Tensor, "k n"]) -> Float[Tensor, " k"]:
        """Gradient distance and the prior's share of discrete texts."""
        ids = torch.cat([texts, torch.full((len(texts), 1), self.end)], dim=1)

        def losses() -> Tensor:
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
            told = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            return told.view(len(ids), -1).mean(1)

        distances, loss = self.target.distances(losses, twice=False)
        return (distances + self.attack.prior * loss).detach()

    def _continuous(self, tokens: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Adam on embeddings that begin at these tokens'; the nearest allowed tokens of where they end."""
        inputs = self.table[tokens].clone().requires_grad_(True)
        length = self.table[self.tokens].norm(dim=-1).mean()
        rate = self.attack.learning_rate * float(self.table.std())
        optimizer = torch.optim.Adam([inputs], lr=rate)
        for step in range(self.attack.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / self.attack.steps)
            distance = self.target.distances(lambda: self._soft_loss(inputs)[None], twice=True)[0][0]
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

    def _changed(self, tokens: Int[Tensor, " n"], kind: int) -> Int[Tensor, " n"]:
        """Two tokens swapped (0), two neighbouring stretches exchanged (1), or one token replaced (2)."""
        changed = tokens.clone()
        i, j, k = sorted(torch.randint(self.free + 1, (3,), generator=self.rng).tolist())
        first, second = torch.randint(self.free, (2,), generator=self.rng).tolist()
        if kind == 0:
            changed[first], changed[second] = tokens[second], tokens[first]
        elif kind == 1:
            changed = torch.cat([tokens[:i], tokens[j:k], tokens[i:j], tokens[k:]])
        else:
            changed[first] = self.tokens[torch.randint(len(self.tokens), (1,), generator=self.rng)]
        return changed
