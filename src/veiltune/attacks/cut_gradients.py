"""Labels from the gradients that an owner returns at the upper cut, with nothing of them known but the model before tuning.

*Reference.* Gradient matching of TAG (arXiv 2103.06819) and DLG (arXiv 1906.08935) with unknown labels; a part of BiSR (arXiv
2409.00960). At this cut the dummy input need not be optimised: the provider computed the trunk's output h itself.

*Symbols.* u = T(h) what the head reads, W the head, p the predicted distribution, y the next token, s one over the step's
labelled tokens. G = Jᵀ·g with J = ∂u/∂h, and g = s·(Wᵀp - W_y) where there is a label, 0 elsewhere. So G is linear in g.

*``solve``.* Least squares for g by conjugate gradients (CGLS; Björck 1996, §7.4) with products by J and Jᵀ alone, channels scaled
by the final norm's gain. What a norm takes out of J (the direction of its input) is taken out of the candidates too. Then y is
the token whose Wᵀp - W_y has the largest cosine with g, and there is a label where its coefficient is near s. A second solution
allows gradients at labelled positions alone, which makes it far better determined.

*``tag``.* The published form: dummy labels ("none" among them) and s are optimised until their gradient is near G in TAG's
distance, squares plus ``l1`` times absolute values. It scores every token at every step: for small vocabularies.

*Bound.* Exact but for that direction, if T is the owner's and G is not rounded. A tuned top changes p and J; a token that the
owner predicts surely leaves almost no gradient.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction, provider_reads
from veiltune.attacks.passes import (
    Returned,
    agreement_of,
    places_in,
    require_whole,
    returned_gradients,
    smashed_states,
)
from veiltune.attacks.view import View
from veiltune.errors import UserError
from veiltune.examples import IGNORED
from veiltune.models.families import find_family
from veiltune.models.top import Top
from veiltune.study_terms import Knows, Phase

GRADIENTS_CROSS = ("split", "online")
POSITIONS = 128  # scored against the whole vocabulary at a time
LABELLED = 0.3
"""Least share of the common scale at which a position counts as labelled."""
CLEAR = 0.5
"""Cosine from which a position's coefficient tells the common scale."""
GAP = 2
LARGEST_DUMMY = 8192
DUMMY_RATE, SLOWER = 0.3, 30
FLOOR = 1e-3

Method = Literal["solve", "tag"]


@dataclass(frozen=True)
class GradientLabels(Attack):
    """See the module. ``iterations`` of the solver or the optimiser."""

    name: ClassVar[str] = "gradient_labels"
    summary: ClassVar[str] = "labels from the gradients at the upper cut (TAG/DLG, label unknown)"
    observer: ClassVar[str] = "provider"
    against: ClassVar = {
        design: fields
        for design, fields in provider_reads(
            "TrunkForward.ticket",
            "TrunkOutput.ticket",
            "TrunkOutput.hidden",
            "TrunkBackward.ticket",
            "TrunkBackward.gradient",
        ).items()
        if design in GRADIENTS_CROSS
    }
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights"})
    knows: ClassVar[Knows] = "nothing"
    phases: ClassVar[frozenset[Phase]] = frozenset({"tuning"})
    cost: ClassVar[str] = (
        "two passes through the top an iteration, and the head twice; a minute for some sequences on two cores"
    )
    control: ClassVar[tuple[str, float]] = ("label_recovery", 0.95)

    method: Method = "solve"
    iterations: int = 24
    l1: float = 0.01

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        found = labels_of(view, auxiliary.take("base_weights"), self.iterations, rng, l1=self.l1, method=self.method)
        return Reconstruction(labels=found)


def labels_of(
    view: View, model: nn.Module, iterations: int, rng: torch.Generator, *, method: Method = "solve", l1: float = 0.0
) -> list[list[int]]:
    """The labels of every sequence of the view's passes, as long as it is; `IGNORED` where none was found.

    Raises:
        UserError: the published form on a large vocabulary; or positions of which nothing crossed, which the top reads as well.
    """
    agreed, passes = agreement_of(view), smashed_states(view)
    require_whole(places_in(passes), "gradient_labels")
    owner = _Owner(model, agreed.top_layers)
    if method == "tag" and len(owner.rows) > LARGEST_DUMMY:
        raise UserError(
            f"gradient_labels: method = 'tag' optimises {len(owner.rows)} numbers a position",
            hint="use method = 'solve', which reads the same labels",
        )
    returned = returned_gradients(view)
    found: list[list[int]] = []
    for states in passes:
        seen = returned.get(states.number)
        if seen is None:
            found += [[IGNORED] * length for length in states.lengths]
            continue
        with torch.enable_grad(), _twice_differentiable():
            tag = method == "tag"
            labels = _optimised(owner, seen, iterations, l1, rng) if tag else _solved(owner, seen, iterations)
        found += [row[:length].tolist() for row, length in zip(labels, seen.lengths, strict=True)]
    return found


@contextmanager
def _twice_differentiable() -> Generator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        yield


class _Owner:
    """The owner's top as it was before tuning, with the head in coordinates in which the final norm is well conditioned."""

    def __init__(self, model: Any, top_layers: int) -> None:
        family = find_family(model.config)
        self.top = Top(model, top_layers)
        norm: Any = model.get_submodule(f"{family.decoder}.{family.final_norm}")
        gain = norm.weight.detach().float() + family.gain_offset
        self.gain = gain.abs().clamp_min(FLOOR * float(gain.abs().max())) * gain.sign().where(gain != 0, 1.0)
        bias = getattr(norm, "bias", None)
        self.bias = torch.zeros_like(self.gain) if bias is None else bias.detach().float()
        self.rows: Float[Tensor, "v d"] = self.top.head.get_parameter("weight").detach().float() * self.gain
        self.squares = self.rows.square().sum(1)

    def unseen(self, inputs: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The direction of the final norm's input at each position, which no gradient shows; of length 1."""
        return nn.functional.normalize((inputs - self.bias) / self.gain, dim=-1)


def _graph(owner: _Owner, seen: Returned) -> tuple[Tensor, Tensor]:
    states = seen.outputs.clone().requires_grad_()
    return states, owner.top.head_inputs(states)


# --- least squares ----------------------------------------------------------------------------------------------------


def _solved(owner: _Owner, seen: Returned, iterations: int) -> Int[Tensor, "rows seq"]:
    """Which positions bear labels, then, with zero everywhere else, which labels."""
    predicting = _predicting(seen)
    everywhere = torch.ones_like(seen.gradients[..., :1])
    _, cosines, scales = _explained(owner, seen, _head_gradients(owner, seen, iterations, everywhere, everywhere))
    clear = scales[(cosines > CLEAR) & predicting]
    common = clear.median() if len(clear) else scales.max()
    labelled = _filled((scales > LABELLED * common) & predicting, predicting)
    peaks = seen.gradients.abs().amax(-1, keepdim=True)
    largest = peaks.amax(1, keepdim=True).clamp_min(1e-30)
    weights = largest / peaks.clamp_min(FLOOR * largest)  # what was rounded errs by a share of each row's largest entry
    support = labelled[..., None].to(weights.dtype)
    tokens, _, _ = _explained(owner, seen, _head_gradients(owner, seen, iterations, weights, support))
    labels = torch.full(predicting.shape, IGNORED)
    rows, columns = torch.nonzero(labelled, as_tuple=True)
    labels[rows, columns + 1] = tokens[rows, columns]
    return labels


def _filled(labelled: Bool[Tensor, "rows seq"], predicting: Bool[Tensor, "rows seq"]) -> Bool[Tensor, "rows seq"]:
    """Gaps of at most `GAP` between labels, and before a text's end, are labelled too: what is surely predicted hardly shows."""
    filled = labelled.clone()
    for row, known, length in zip(filled, labelled, predicting.sum(1).tolist(), strict=True):
        places = torch.nonzero(known)[:, 0].tolist()
        for start, stop in zip(places, [*places[1:], length], strict=True):
            if stop - start - 1 <= GAP:
                row[start:stop] = True
    return filled


def _head_gradients(
    owner: _Owner,
    seen: Returned,
    iterations: int,
    weights: Float[Tensor, "rows seq 1"],
    support: Float[Tensor, "rows seq 1"],
) -> Float[Tensor, "rows seq d"]:
    """The least-squares gradient at the head's input, times the final norm's gain; each sequence on its own.

    Args:
        owner: the top.
        seen: what was sent and returned.
        iterations: of the solver.
        weights: of the rows of what was returned.
        support: 1 at positions that may have a gradient, 0 elsewhere.
    """
    states, inputs = _graph(owner, seen)
    probe = torch.zeros_like(inputs, requires_grad=True)
    (pulled,) = torch.autograd.grad(inputs, states, probe, create_graph=True)  # Jᵀ·probe: linear in the probe

    def down(unknown: Tensor) -> Tensor:
        return weights * torch.autograd.grad(inputs, states, support * unknown / owner.gain, retain_graph=True)[0]

    def up(residual: Tensor) -> Tensor:
        return support * torch.autograd.grad(pulled, probe, weights * residual, retain_graph=True)[0] / owner.gain

    return _least_squares(down, up, weights * seen.gradients, iterations)


def _least_squares(down: Any, up: Any, wanted: Float[Tensor, "rows seq d"], iterations: int) -> Tensor:
    """CGLS from zero for each row of the batch: argmin ‖down(x) - wanted‖², where ``up`` is the transpose of ``down``."""
    residual = wanted.clone()
    steepest = up(residual)
    x = torch.zeros_like(steepest)
    direction, size = steepest, _square(steepest)
    first = size.clamp_min(1e-300)
    for _ in range(iterations):
        if bool((size <= 1e-12 * first).all()):
            break
        image = down(direction)
        step = size / _square(image).clamp_min(1e-300)
        x = x + step * direction
        residual = residual - step * image
        steepest = up(residual)
        before, size = size, _square(steepest)
        direction = steepest + size / before.clamp_min(1e-300) * direction
    return x


def _square(x: Float[Tensor, "rows seq d"]) -> Float[Tensor, "rows 1 1"]:
    return x.double().square().sum((1, 2), keepdim=True).float()


# --- reading tokens ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _explained(
    owner: _Owner, seen: Returned, gradients: Float[Tensor, "rows seq d"]
) -> tuple[Int[Tensor, "rows seq"], Float[Tensor, "rows seq"], Float[Tensor, "rows seq"]]:
    """The best explanation of the gradient at each position: token, cosine, coefficient."""
    inputs = owner.top.head_inputs(seen.outputs)
    parts = zip(inputs.flatten(0, 1).split(POSITIONS), gradients.flatten(0, 1).split(POSITIONS), strict=True)
    best = [_best_tokens(owner, *part) for part in parts]
    shape = inputs.shape[:2]
    tokens, cosines, scales = (torch.cat([part[i] for part in best]).view(shape) for i in range(3))
    return tokens, cosines, scales


def _predicting(seen: Returned) -> Bool[Tensor, "rows seq"]:
    """Positions that have a next one."""
    return torch.arange(seen.outputs.shape[1]) < torch.tensor(list(seen.lengths))[:, None] - 1


def _best_tokens(
    owner: _Owner, inputs: Float[Tensor, "n d"], gradients: Float[Tensor, "n d"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Token, cosine and coefficient (in units of s) of the best explanation of each gradient."""
    unseen = owner.unseen(inputs)
    mean = owner.top.head(inputs).float().softmax(-1) @ owner.rows
    gradients = gradients - (gradients * unseen).sum(-1, keepdim=True) * unseen
    inner = (gradients * mean).sum(-1, keepdim=True) - gradients @ owner.rows.T
    squares = mean.square().sum(-1, keepdim=True) - 2 * mean @ owner.rows.T + owner.squares
    squares -= ((mean * unseen).sum(-1, keepdim=True) - unseen @ owner.rows.T).square()
    norms = squares.clamp_min(1e-6 * float(owner.squares.mean())).sqrt()
    cosines, tokens = (inner / norms).max(-1)
    lengths = norms.gather(1, tokens[:, None])[:, 0]
    size = gradients.norm(dim=-1).clamp_min(1e-30)
    return tokens, cosines / size, cosines / lengths


# --- the published form -----------------------------------------------------------------------------------------------


def _optimised(
    owner: _Owner, seen: Returned, iterations: int, l1: float, rng: torch.Generator
) -> Int[Tensor, "rows seq"]:
    """Dummy labels whose gradient matches, by Adam."""
    states, inputs = _graph(owner, seen)
    fixed = inputs.detach()
    head = owner.top.head.get_parameter("weight").detach()
    mean = owner.top.head(fixed).detach().softmax(-1) @ head
    predicting = _predicting(seen)
    unit = seen.gradients.square().mean().sqrt().clamp_min(1e-30)
    dummy = (0.01 * torch.randn((*predicting.shape, len(head) + 1), generator=rng)).requires_grad_()

    def made_by(chosen: Tensor) -> Tensor:
        gradient = (chosen[..., 1:].sum(-1, keepdim=True) * mean - chosen[..., 1:] @ head) * predicting[..., None]
        return torch.autograd.grad(inputs, states, gradient, create_graph=True)[0]

    single = nn.functional.one_hot(torch.randint(1, len(head) + 1, predicting.shape, generator=rng), len(head) + 1)
    least = seen.gradients.norm() / made_by(single.to(head.dtype)).detach().norm().clamp_min(1e-30) / unit
    # It starts as if every position bore a label: from above, mixtures would explain G as well.
    scale = least.log().requires_grad_()
    rates = [{"params": [dummy], "lr": DUMMY_RATE}, {"params": [scale], "lr": DUMMY_RATE / SLOWER}]
    optimizer = torch.optim.Adam(rates)
    for _ in range(iterations):
        made = scale.exp() * made_by(dummy.softmax(-1))
        error = made - seen.gradients / unit
        loss = error.square().mean() + l1 * error.abs().mean()
        optimizer.zero_grad()
        loss.backward(inputs=[dummy, scale])
        optimizer.step()
    tokens = dummy.detach()[..., 1:].argmax(-1)
    # "None" and s trade with one another: only ratios tell.
    strength = (1 - dummy.detach().softmax(-1)[..., 0]) * predicting
    rows, columns = torch.nonzero(strength > LABELLED * strength.amax(), as_tuple=True)
    labels = torch.full(predicting.shape, IGNORED)
    labels[rows, columns + 1] = tokens[rows, columns]
    return labels
