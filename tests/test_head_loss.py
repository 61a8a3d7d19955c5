"""The loss of a frozen head in chunks of logits, against the whole product and torch's cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veiltune import engine
from veiltune.models import head_loss as module
from veiltune.models.head_loss import can_be_chunked, head_loss

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
VOCABULARY, DIM = 37, 8


def problem(rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, VOCABULARY, (rows,), generator=generator)


def twin(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Slow and obvious: all logits, torch's loss, autograd."""
    hidden = hidden.clone().requires_grad_()
    logits = functional.linear(hidden, weight)
    loss = functional.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum"
    )
    (3 * loss).backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    loss = head_loss(hidden, weight, labels)
    (3 * loss).backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@given(rows=st.integers(0, 11), chunk=st.integers(1, 12), seed=st.integers(0, 99))
def test_it_is_the_loss_of_all_logits(dtype: torch.dtype, rows: int, chunk: int, seed: int) -> None:
    given_, kept = problem(rows, dtype, seed), module.CHUNK
    module.CHUNK = chunk
    try:
        (loss, gradient), (expected, reference) = chunked(*given_), twin(*given_)
    finally:
        module.CHUNK = kept
    assert loss.dtype == expected.dtype
    assert gradient.dtype == reference.dtype == dtype
    # the loss is of float32 logits or better; a gradient is rounded once to the head's dtype and once in the product
    wide = EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    assert abs(float(loss - expected)) <= 32 * wide * max(1.0, float(expected))
    largest = max(1.0, float(reference.abs().max()) if rows else 0.0)
    assert rows == 0 or float((gradient - reference).abs().max()) <= 8 * EPS[dtype] * largest


def test_huge_logits_do_not_overflow_and_lost_ones_are_noticed() -> None:
    hidden, weight, labels = problem(4, torch.float32)
    assert float(head_loss(1e4 * hidden, weight, labels)) == pytest.approx(
        float(twin(1e4 * hidden, weight, labels)[0]), rel=1e-5
    )
    hidden[2, 3] = float("nan")
    assert not bool(torch.isfinite(head_loss(hidden, weight, labels)))


class _Largest(TorchDispatchMode):
    """The largest tensor any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 64
    hidden, weight, labels = problem(rows, torch.float32)
    monkeypatch.setattr(module, "CHUNK", 4)
    with _Largest() as mine:
        chunked(hidden, weight, labels)
    with _Largest() as whole:
        twin(hidden, weight, labels)
    assert whole.numel == rows * VOCABULARY
    assert mine.numel == rows * DIM  # the gradient of the states


class _Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_the_engine_chunks_a_frozen_plain_head_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = problem(5, torch.float32)
    calls: list[int] = []

    def counting(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return head_loss(*arguments)

    monkeypatch.setattr(engine, "head_loss", counting)
    heads = {name: nn.Linear(DIM, VOCABULARY, bias=name == "bias") for name in ("plain", "bias", "trained", "hooked")}
    for name, head in heads.items():
        head.weight = nn.Parameter(weight, requires_grad=name == "trained")
        if head.bias is not None:
            head.bias = nn.Parameter(torch.zeros(VOCABULARY), requires_grad=False)
    heads["hooked"].register_forward_hook(lambda _module, _inputs, output: 2 * output)
    losses = {name: float(engine.summed_loss(_Model(head), hidden, labels).detach()) for name, head in heads.items()}
    assert {name: can_be_chunked(head) for name, head in heads.items()} == {name: name == "plain" for name in heads}
    assert len(calls) == 1
    assert losses["plain"] == pytest.approx(losses["bias"], rel=1e-6)
    assert losses["plain"] == pytest.approx(losses["trained"], rel=1e-6)
    assert losses["hooked"] != pytest.approx(losses["plain"], rel=1e-2)
