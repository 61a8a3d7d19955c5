"""Fused LoRA layers against PEFT's own forward, which is the slow twin: outputs, every gradient, and when not to fuse."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers import FAMILY_NAMES
from veiltune.config import LoraConfig
from veiltune.models.adapters import ADAPTER, factor_parameters
from veiltune.models.fused_lora import FEW_ROWS, LoraGroup, _Share, fuse_lora
from veiltune.models.presets import random_config
from veiltune.models.trunk import HostTrunk
from veiltune.transport.messages import SegmentForward

IN, OUTS, RANK, ALPHA = 24, (16, 8, 8), 4, 10
NAMES = ("q", "k", "v")

shapes = pytest.mark.parametrize("kind", ["linear", "bare linear", "conv1d"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Readers(nn.Module):
    """Linears that read one input, and one (``other``) that never gets an adapter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        for name, out in zip((*NAMES, "other"), (*OUTS, 4), strict=True):
            made = Conv1D(out, IN) if kind == "conv1d" else nn.Linear(IN, out, bias=kind == "linear")
            setattr(self, name, made)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in NAMES)


class Pair(NamedTuple):
    """The same layers twice: PEFT's own forward, and ours."""

    slow: Any
    fused: Any


def pair(kind: str = "linear", dtype: torch.dtype = torch.float64, *, dropout: float = 0.0) -> Pair:
    """Layers with drawn weights, biases and factors, of which none is zero, before and after fusing."""
    slow: Any = Readers(kind)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(NAMES), fan_in_fan_out=kind == "conv1d"
    )
    peft.inject_adapter_in_model(config, slow, ADAPTER)
    with torch.no_grad():
        for parameter in slow.parameters():
            parameter.normal_()
    slow.to(dtype).eval()
    fused = copy.deepcopy(slow)
    fuse_lora(fused, ((*NAMES, "other"),))
    return Pair(slow, fused)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def pull_back(model: Any, x: Tensor, gradients: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of the input (if it wants one) and of every factor."""
    outputs = model(x)
    torch.autograd.backward(outputs, gradients)
    found = {name: output.detach() for name, output in zip(NAMES, outputs, strict=True)}
    found |= {} if x.grad is None else {"x": x.grad}
    for name, factor in factor_parameters(model, NAMES).items():
        assert factor.grad is not None, name
        found[name] = factor.grad
    return found


def in_absolute_values(model: Any, x: Tensor, gradients: list[Tensor]) -> dict[str, Tensor]:
    """Entry by entry, what bounds the sum of the sizes of all terms: everything here is a sum of products."""
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    start = x.detach().double().abs().requires_grad_(x.requires_grad)
    return pull_back(twin, start, [gradient.double().abs() for gradient in gradients])


@shapes
@dtypes
@pytest.mark.parametrize("wants", [True, False])
@given(batch=st.sampled_from([(1,), (5,), (2, 3), (1, 1), (2, 3, 2)]))
def test_outputs_and_gradients_are_those_of_peft(
    kind: str, dtype: torch.dtype, wants: bool, batch: tuple[int, ...]
) -> None:
    slow, fused = pair(kind, dtype)
    inputs = [draw(*batch, IN, dtype=dtype).requires_grad_(wants)]
    inputs.append(inputs[0].detach().clone().requires_grad_(wants))
    gradients = [draw(*batch, out, dtype=dtype) for out in OUTS]
    expected, actual = (pull_back(model, x, gradients) for model, x in zip((slow, fused), inputs, strict=True))
    sizes = in_absolute_values(slow, inputs[0], gradients)
    assert actual.keys() == expected.keys() == sizes.keys()
    assert ("x" in actual) is wants
    # No number is a sum of more terms than this, in either order of summing; rounding moves each by eps at most.
    terms = IN + sum(OUTS) + 4 * RANK + 12
    for name, size in sizes.items():
        bound = 2 * terms * torch.finfo(dtype).eps * size
        assert bool(((actual[name] - expected[name]).double().abs() <= bound).all()), name
        assert float(actual[name].abs().max()) > 100 * float(bound.max()), name  # else the bound would show nothing


@shapes
def test_the_scaling_and_every_factor_count(kind: str) -> None:
    x = draw(3, IN)
    for name in NAMES:
        for spoil in ("lora_A", "lora_B", "scaling"):
            slow, fused = pair(kind)
            before = [y.detach() for y in fused(x)]
            layer = getattr(fused, name)
            if spoil == "scaling":
                layer.scaling[ADAPTER] *= 2
            else:
                with torch.no_grad():
                    getattr(layer, spoil)[ADAPTER].weight.mul_(2)
            correction = slow_correction(getattr(slow, name), x)
            for other, old, new in zip(NAMES, before, fused(x), strict=True):
                torch.testing.assert_close(new, old + correction if other == name else old)


def slow_correction(layer: Any, x: Tensor) -> Tensor:
    return ALPHA / RANK * x @ layer.lora_A[ADAPTER].weight.T @ layer.lora_B[ADAPTER].weight.T


def test_a_group_is_computed_once_for_each_input() -> None:
    _, fused = pair()
    x = draw(3, IN)
    q, k, v = fused(x)
    assert q.grad_fn.next_functions  # a node of the graph …
    assert nodes(q) & nodes(k) & nodes(v) & fused_nodes(q)  # … that all three share
    again = fused(x)
    assert not fused_nodes(again[0]) & fused_nodes(q)
    with torch.no_grad():
        assert fused(x)[0].grad_fn is None


@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS])
def test_a_few_rows_without_a_gradient_are_left_to_peft(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fused = pair()
    computed: list[int] = []
    monkeypatch.setattr(LoraGroup, "_compute", counting(LoraGroup._compute, computed))
    x = draw(rows, IN)
    with torch.no_grad():
        for found, expected in zip(fused(x), slow(x), strict=True):
            torch.testing.assert_close(found, expected)
    assert bool(computed) is (rows >= FEW_ROWS)
    fused(x)
    assert computed, "with a gradient every input is fused"


def counting(function: Any, calls: list[int]) -> Any:
    def counted(self: LoraGroup, x: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(x))
        return function(self, x)

    return counted


def nodes(y: Tensor) -> set[Any]:
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [parent for parent, _ in node.next_functions]
    return found


def fused_nodes(y: Tensor) -> set[Any]:
    return {node for node in nodes(y) if "FusedLora" in node.name()}


def test_members_may_be_called_in_any_order_and_alone() -> None:
    slow, fused = pair()
    x, other = draw(3, IN), draw(2, IN)
    torch.testing.assert_close(fused.v(x), slow.v(x))
    torch.testing.assert_close(fused.q(other), slow.q(other))  # k of x was never asked for
    torch.testing.assert_close(fused.k(x), slow.k(x))
    torch.testing.assert_close(fused.k(x), slow.k(x))


def test_no_activations_are_held_once_all_members_were_called() -> None:
    _, fused = pair()
    fused(draw(3, IN))
    group = fused.q.forward._group
    assert group._source is None
    assert group._waiting == {}


def test_frozen_weights_get_no_gradient() -> None:
    _, fused = pair()
    pull_back(fused, draw(3, IN).requires_grad_(), [draw(3, out) for out in OUTS])
    assert all(getattr(fused, name).base_layer.weight.grad is None for name in NAMES)


def test_a_factor_that_changed_before_the_backward_is_noticed() -> None:
    _, fused = pair()
    outputs = fused(draw(3, IN).requires_grad_())
    with torch.no_grad():
        fused.k.lora_B[ADAPTER].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, [draw(3, out) for out in OUTS])


# --- what is left to PEFT ---------------------------------------------------------------------------------------------


def both(models: Pair, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    torch.manual_seed(3)
    slow = models.slow(x)
    torch.manual_seed(3)
    return slow, models.fused(x)


def left_to_peft(models: Pair, x: Tensor) -> bool:
    slow, fused = both(models, x)
    assert all(torch.equal(a, b) for a, b in zip(slow, fused, strict=True))
    return not fused_nodes(fused[0])


def test_dropout_is_left_to_peft_while_it_acts() -> None:
    models = pair(dropout=0.5)
    for model in models:
        model.train()
    assert left_to_peft(models, draw(3, IN))
    for model in models:
        model.eval()
    assert fused_nodes(models.fused(draw(3, IN))[0])


def test_training_without_dropout_is_fused() -> None:
    models = pair()
    models.fused.train()
    assert fused_nodes(models.fused(draw(3, IN))[0])


def test_mixed_precision_is_left_to_peft() -> None:
    models = pair(dtype=torch.float32)
    for model in models:
        for name in NAMES:
            getattr(model, name).base_layer.bfloat16()
    x = draw(3, IN, dtype=torch.bfloat16)
    assert left_to_peft(models, x)
    assert models.fused(x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["merged", "disabled", "trained base"])
def test_other_states_of_a_layer_are_left_to_peft(change: str) -> None:
    models = pair()
    x = draw(3, IN)
    for model in models:
        if change == "merged":
            model.q.merge()
        elif change == "disabled":
            model.q.enable_adapters(enabled=False)
        else:
            model.q.base_layer.weight.requires_grad_()
    assert left_to_peft(models, x)
    torch.cat(models.fused(x), dim=-1).sum().backward()
    assert (models.fused.q.base_layer.weight.grad is not None) is (change == "trained base")


# --- in the host ------------------------------------------------------------------------------------------------------


def test_names_and_modules_stay_as_peft_made_them() -> None:
    slow, fused = pair()
    assert list(slow.state_dict()) == list(fused.state_dict())
    assert [type(module) for module in slow.modules()] == [type(module) for module in fused.modules()]
    assert type(fused.other.forward).__name__ == "method"


def make_trunk(name: str, *, rounded: bool = False, dropout: float = 0.0) -> HostTrunk:
    """A host's trunk of one block, ready; its numbers are drawn."""
    config, lora = random_config(f"random:{name}:1,32,4,259"), LoraConfig(rank=RANK, dropout=dropout)
    trunk = HostTrunk(config, "compact", lora, torch.device("cpu"), rounded=rounded)
    shapes = {key: value.shape for key, value in trunk.model.named_parameters() if "lora_" not in key}
    trunk.load({key.replace(".base_layer", ""): draw(*shape, dtype=torch.float32) for key, shape in shapes.items()})
    trunk.load_factors({key: draw(*value.shape, dtype=torch.float32) for key, value in trunk.parameters.items()})
    trunk.ready()
    return trunk


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("rounded", [False, True])
def test_the_host_fuses_unless_it_imitates_rounding(name: str, rounded: bool) -> None:
    trunk = make_trunk(name, rounded=rounded)
    layers: list[Any] = [trunk.model.get_submodule(path) for path in trunk.adapted]
    assert len(layers) == sum(len(segment.inputs) + 1 for segment in trunk.family.segments)
    assert all(isinstance(layer.forward, _Share) is not rounded for layer in layers)


def test_adapters_drop_out_in_training_alone() -> None:
    trunk = make_trunk("gpt2", dropout=0.5)
    hidden = draw(1, 6, 32, dtype=torch.float32)

    def outputs(training: bool) -> Tensor:  # of the MLP, twice
        request = SegmentForward(1, 1, 0, 0, keep=False, input_gradient=False, training=training, hidden=hidden)
        return torch.stack([trunk.forward(request)[0] for _ in range(2)])

    for training in (False, True, False):
        first, second = outputs(training)
        assert torch.equal(first, second) is not training
