"""Distillation of an emulator: its blocks are trained so that together they give what the whole trunk gives.

*Reference.* Offsite-tuning (Xiao, Lin and Han 2023, §3.2): layer drop, then layer-wise distillation against the full trunk's
output.

*Symbols.* Y, the trunk's output, and Ŷ, the emulator's, (tokens, d); Ȳ the mean of Y over the tokens. The loss is

    1/d · Σ_j ‖Ŷ_j - Y_j‖² / ‖Y_j - Ȳ_j‖²  +  c · mean_t(1 - cos(Ŷ_t, Y_t)),

the mean over features of one minus the coefficient of determination. Each feature has its own variance, because a trunk has a
few outlier features, thousands of times larger, which would otherwise be all that is learnt.

*Reveals*, to the owner: weights that were the trunk's when training began, and a function that is closer to it afterwards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.errors import DataError, TrainingError
from veiltune.models.emulators.options import EmulatorOptions

States = tuple[Tensor, Tensor | None]
"""Hidden states (batch, seq, d) at the trunk's entry, and a mask (batch, seq) that is 0 at padding, or ``None``."""
Runner = Callable[[Tensor, Tensor | None], Tensor]
"""Runs blocks on hidden states and a mask: gives the hidden states after the last block."""
Progress = Callable[[str, int, int, float | None], None]
"""Told of a stage (``distil`` or ``compress``), the steps done, the steps in all, and the step's loss if it has one."""

_MAX_GRAD_NORM = 1.0
_FLOOR = 1e-2  # least variance of a feature, relative to the median one: a constant feature must not own the loss


@dataclass(frozen=True)
class Distillation:
    """What the provider brings to a distillation.

    Attributes:
        teacher: runs the whole trunk. It is called without gradients.
        student: puts the emulator's blocks to work (by slot; in the trunk's other slots states pass through), and gives what
            runs them.
        states: the batch of a step. It depends on the step alone, so that a resumed distillation sees the same batches.
    """

    teacher: Runner
    student: Callable[[dict[int, nn.Module]], Runner]
    states: Callable[[int], States]


def distillation_loss(
    output: Float[Tensor, "batch seq d"],
    target: Float[Tensor, "batch seq d"],
    mask: Tensor | None = None,
    cosine: float = 0.0,
) -> Float[Tensor, ""]:
    """The module's loss over the positions where the mask is not 0, with c = ``cosine``."""
    if mask is None:
        given, wanted = output.flatten(0, 1), target.flatten(0, 1)
    else:
        given, wanted = output[mask != 0], target[mask != 0]
    variance = wanted.var(dim=0, correction=0)
    floor = (_FLOOR * variance.median()).clamp_min(torch.finfo(variance.dtype).tiny)
    loss = ((given - wanted).square().mean(dim=0) / variance.clamp_min(floor)).mean()
    if cosine:
        loss = loss + cosine * (1 - nn.functional.cosine_similarity(given, wanted, dim=-1)).mean()
    return loss


def token_batches(
    options: EmulatorOptions, vocab_size: int, text: Sequence[int] | None = None
) -> Callable[[int], Int[Tensor, "batch seq"]]:
    """Token ids of a step's sequences: windows of ``text``, or random tokens. The same step always gives the same.

    Raises:
        DataError: the text is shorter than a sequence.
    """
    batch, length = options.distil_batch, options.distil_length
    corpus = None if text is None else torch.tensor(text, dtype=torch.int64)
    if corpus is not None and len(corpus) < length:
        raise DataError(
            f"distil_data has {len(corpus)} tokens, a sequence takes {length}",
            hint="give more text, or lower distil_length",
        )

    def draw(step: int) -> Int[Tensor, "batch seq"]:
        seed = hashlib.sha256(f"{options.distil_seed}/{step}".encode()).digest()[:4]  # torch heeds no more than 32 bits
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        if corpus is None:
            return torch.randint(vocab_size, (batch, length), generator=generator)
        starts = torch.randint(len(corpus) - length + 1, (batch, 1), generator=generator)
        return corpus[starts + torch.arange(length)]

    return draw


def distil(
    blocks: dict[int, nn.Module],
    plan: Distillation,
    options: EmulatorOptions,
    *,
    store: StateStore | None = None,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Train the blocks' parameters in place with AdamW; they are frozen again afterwards. The first and the last loss.

    Args:
        blocks: the emulator's blocks by slot, as the student is given them. They are in evaluation mode: no dropout.
        plan: the teacher, and batches.
        options: steps, learning rate and so on.
        store: where states are written every ``distil_checkpoint_every`` steps; the newest one there is resumed from.
        progress: told of every step.

    Raises:
        CheckpointError: the state to resume from is damaged, or of another emulator.
        TrainingError: the loss is not finite.
    """
    student = plan.student(blocks)
    parameters = {f"{slot}.{name}": p for slot, block in blocks.items() for name, p in block.named_parameters()}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=options.distil_learning_rate, weight_decay=0.0)
    start, first = _resume(store, optimizer, parameters)
    last = first
    trained = nn.ModuleList(blocks.values()).requires_grad_(True)
    for step in range(start, options.distil_steps):
        last = _step(student, plan, optimizer, parameters, options, step)
        first = last if step == 0 else first
        done = step + 1
        if store is not None and done < options.distil_steps and done % options.distil_checkpoint_every == 0:
            _save(store, done, optimizer, parameters, first)
        if progress is not None:
            progress("distil", done, options.distil_steps, last)
    trained.requires_grad_(False)
    optimizer.zero_grad()
    return first, last


def _step(
    student: Runner,
    plan: Distillation,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    options: EmulatorOptions,
    step: int,
) -> float:
    """One step; its loss before the update."""
    states, mask = plan.states(step)
    like = next(iter(parameters.values()))
    with torch.no_grad():
        target = plan.teacher(states, mask).to(like)
    loss = distillation_loss(student(states.to(like), mask), target, mask, options.distil_cosine)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"the distillation's loss is {value} at step {step + 1}", hint="lower the emulator's distil_learning_rate"
        )
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters.values(), _MAX_GRAD_NORM)
    for group in optimizer.param_groups:
        group["lr"] = options.distil_learning_rate * (1 - step / options.distil_steps)
    optimizer.step()
    return value


def _save(
    store: StateStore,
    step: int,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    first: float,
) -> None:
    state = optimizer_tensors(optimizer, parameters)
    drawn = {name: value for name, value in state.items() if name not in {"rng", "rng_cuda"}}  # nothing here draws
    store.save(step, drawn | {"first_loss": torch.tensor(first, dtype=torch.float64)})


def _resume(
    store: StateStore | None, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[int, float]:
    """Go back to the newest state, if there is one: the steps done, and the first one's loss."""
    step = 0 if store is None else newest_step(store.directory)
    if store is None or step == 0:
        return 0, math.nan
    state = store.load(step)
    first = float(state.pop("first_loss"))
    restore_optimizer(optimizer, parameters, state | {"rng": torch.get_rng_state()})
    return step, first


def newest_step(directory: Path) -> int:
    """The number of the newest state in a `StateStore`'s directory, 0 if it has none."""
    return max((int(path.stem.removeprefix("step-")) for path in directory.glob("step-*.safetensors")), default=0)
