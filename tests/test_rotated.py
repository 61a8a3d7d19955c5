"""The rotated trunk against the plain one: maps, folding, norms, factors; and what the host's numbers are to the true ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from helpers import MODELS
from veiltune.config import LoraConfig
from veiltune.errors import ModelError, ProtocolError
from veiltune.models.adapters import adapted_linears, factor_parameters, initial_factors, inject_adapters, place_factors
from veiltune.models.cut import Cut, Trunk, trunk_model
from veiltune.models.families import find_family
from veiltune.models.presets import random_config
from veiltune.models.random_weights import draw_tensor
from veiltune.models.rotated import (
    Folding,
    RotatedTrunk,
    Stream,
    compute_norms_in_float64,
    rotate_factors,
    unrotate_factors,
    unrotate_gradients,
)
from veiltune.models.rotated.maps import HeadRotations, InnerMap, Joined, LinearMap, PairTurns, Same, ScaledOrder
from veiltune.models.rotated.rotation import Reads, Writes
from veiltune.models.skeleton import assign_parameter
from veiltune.privacy.orthogonal import make_key
from veiltune.secrets import MasterSecret
from veiltune.transport.messages import VeiledBackward, VeiledForward

SECRET = MasterSecret.for_tests(3)
WIDTH, LAYERS, SEQ = 32, 3, 12
NAMES = [*MODELS, *({"gemma3"} - MODELS.keys())]
LORA = LoraConfig(rank=3, alpha=6.0, init_seed=2)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


# --- maps -------------------------------------------------------------------------------------------------------------


def haar(dim: int, label: str) -> Tensor:
    return make_key("orthogonal", dim, SECRET, label).matrix()


def made_map(kind: str, heads: int, half: int) -> tuple[InnerMap, int]:
    width = 2 * half
    order = SECRET.permutation(f"order{heads}", heads)
    if kind == "rotations":
        return HeadRotations(order, torch.stack([haar(width, f"h{i}") for i in range(heads)])), heads * width
    if kind == "turns":
        turns = torch.complex(SECRET.normal("re", (heads, half)) + 2, SECRET.normal("im", (heads, half)))
        return PairTurns(order, turns), heads * width
    if kind == "units":
        return ScaledOrder(order, SECRET.normal("scale", (heads,)).exp()), heads
    if kind == "joined":
        parts = [made_map(each, heads, half) for each in ("rotations", "turns", "units")]
        return Joined([part for part, _ in parts], [size for _, size in parts]), sum(size for _, size in parts)
    return Same(), heads


def written_out(linear_map: LinearMap, dim: int) -> Tensor:
    return linear_map.apply(torch.eye(dim, dtype=torch.float64))


def check_linear_map(linear_map: LinearMap, dim: int) -> None:
    """The structured operations against the matrix written out: the slow, obvious twin."""
    matrix, rows = written_out(linear_map, dim), torch.randn(5, dim, dtype=torch.float64)
    assert relative(linear_map.apply(rows), rows @ matrix) < 1e-12
    assert relative(linear_map.pull_back(rows), rows @ matrix.T) < 1e-12
    assert relative(linear_map.undo(rows @ matrix), rows) < 1e-9


@given(
    kind=st.sampled_from(["rotations", "turns", "units", "joined", "same"]),
    heads=st.integers(1, 5),
    half=st.integers(1, 4),
)
def test_inner_maps_do_what_their_matrix_does(kind: str, heads: int, half: int) -> None:
    inner, dim = made_map(kind, heads, half)
    check_linear_map(inner, dim)
    product = written_out(inner, dim) @ written_out(inner.dual(), dim).T  # S·(S⁻ᵀ)ᵀ = I
    assert relative(product, torch.eye(dim, dtype=torch.float64)) < 1e-12


def test_turns_commute_with_rotary_and_head_rotations_do_not() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = torch.outer(torch.arange(6.0, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64))
    cos, sin = (value.repeat(1, 2)[None] for value in (angles.cos(), angles.sin()))

    def rotary(rows: Tensor) -> Tensor:
        states = rows.view(1, 6, 2, 6).transpose(1, 2)
        return apply_rotary_pos_emb(states, states, cos, sin)[0].transpose(1, 2).reshape(6, 12)

    rows = torch.randn(6, 12, dtype=torch.float64)
    for kind, commutes in (("turns", True), ("rotations", False)):
        inner, _ = made_map(kind, 2, 3)
        assert (relative(inner.apply(rotary(rows)), rotary(inner.apply(rows))) < 1e-12) == commutes


def stream_of(*, is_centred: bool, kind: str = "orthogonal", dim: int = 16) -> Stream:
    return Stream(make_key(kind, dim, SECRET, "stream"), is_centred=is_centred)


def gains(dim: int = 16) -> tuple[Tensor, Tensor]:
    return SECRET.normal("gain", (dim,)) + 3, SECRET.normal("bias", (dim,))


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])
def test_reads_do_what_their_matrix_does(kind: str) -> None:
    gain, bias = gains()
    for is_centred, beta in ((False, None), (True, bias)):
        check_linear_map(Reads(stream_of(is_centred=is_centred, kind=kind), gain, beta), 16)


def test_reads_without_bias_undo_to_rows_of_the_same_effect() -> None:
    """M·diag(g) has a kernel: what is lost acts on no state without a mean."""
    gain, _ = gains()
    reads = Reads(stream_of(is_centred=True), gain, None)
    rows, states = torch.randn(5, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    states = states - states.mean(-1, keepdim=True)
    found = reads.undo(reads.apply(rows))
    assert relative((states * gain) @ found.T, (states * gain) @ rows.T) < 1e-12
    assert relative(found, rows) > 1e-2
    assert reads.condition_number() == float("inf")


def test_writes_undo_to_rows_without_their_mean() -> None:
    rows = torch.randn(5, 16, dtype=torch.float64)
    for is_centred in (True, False):
        writes = Writes(stream_of(is_centred=is_centred))
        expected = rows - rows.mean(-1, keepdim=True) if is_centred else rows
        assert relative(writes.undo(writes.apply(rows)), expected) < 1e-12
        matrix = written_out(writes, 16)
        assert relative(writes.pull_back(rows), rows @ matrix.T) < 1e-12


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])
def test_a_norm_and_its_linear_are_the_same_in_the_rotated_basis_iff_the_key_is_orthogonal(kind: str) -> None:
    gain, bias = gains()
    weight, states = torch.randn(16, 9, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64) + 1
    for is_centred in (True, False):
        stream = stream_of(is_centred=is_centred, kind=kind)
        normed = functional.rms_norm(stream.enter(states), (16,), None, 1e-5)
        if is_centred:
            expected = functional.layer_norm(states, (16,), gain, bias, 1e-5) @ weight
            normed = normed + stream.constant()
        else:
            expected = functional.rms_norm(states, (16,), gain, 1e-5) @ weight
        found = normed @ Reads(stream, gain, bias if is_centred else None).apply(weight.T).T
        assert (relative(found, expected) < 1e-12) == (kind == "orthogonal")
        assert kind == "orthogonal" or relative(found, expected) > 1e-2


def test_the_condition_number_of_a_fold_is_that_of_its_matrix() -> None:
    gain, bias = gains()
    for is_centred, beta in ((False, None), (True, bias)):
        reads = Reads(stream_of(is_centred=is_centred), gain, beta)
        assert reads.condition_number() == pytest.approx(float(torch.linalg.cond(written_out(reads, 16))), rel=0.02)
    dead = gain.clone()
    dead[3] = 0
    assert Reads(stream_of(is_centred=False), dead, None).condition_number() == float("inf")


def test_small_gains_do_not_spoil_what_comes_back_from_the_rotated_basis() -> None:
    """A float32 factor that is brought back does what it did there, whatever κ is: its large entries meet small gains."""
    gain = torch.logspace(-6, 0, 16, dtype=torch.float64)
    reads = Reads(stream_of(is_centred=False), gain, None)
    trained = torch.randn(5, 16, dtype=torch.float64)
    back = reads.undo(trained).float()
    assert reads.condition_number() == pytest.approx(1e6, rel=0.02)
    assert relative(reads.apply(back.double()), trained) < 2.0**-22
    assert float(back.abs().max()) > 1e4
    assert reads.error_growth() == 1.0
    gain[3] = 0
    assert Reads(stream_of(is_centred=False), gain, None).error_growth() == float("inf")
    ones, bias = gains()
    centred = Reads(stream_of(is_centred=True), ones, bias)
    assert centred.error_growth() == centred.condition_number()


# --- whole trunks -----------------------------------------------------------------------------------------------------


def config_of(name: str) -> Any:
    family, change = MODELS.get(name, (name, lambda _: None))
    config = random_config(f"random:{family}:{LAYERS},{WIDTH},4,259")
    change(config)
    return config


@cache
def plain_tensors(name: str) -> dict[str, Tensor]:
    """Random parameters of a trunk of all blocks, float64; gains, biases and matrices all of a size to matter."""
    config = config_of(name)
    offset = find_family(config).gain_offset
    model = trunk_model(config, Cut.of(config, 0, 0))
    return {n: draw_tensor(n, tuple(p.shape), WIDTH, offset).double() for n, p in model.named_parameters()}


@dataclass
class Pair:
    """A plain trunk and its rotated twin, with the same factors."""

    plain: nn.Module
    trunk: Trunk
    rotated: RotatedTrunk
    folding: Folding
    linears: list[Any]

    def plain_output(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.trunk.forward(hidden, mask, None, None, training=False)

    def rotated_output(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        request = VeiledForward(
            1, 0, torch.is_grad_enabled(), True, False, mask, None, self.folding.stream.enter(hidden)
        )
        return self.folding.stream.leave(self.rotated.forward(request))


def factors_of(name: str, config: Any, cut: Cut, model: nn.Module) -> dict[str, Tensor]:
    """Both factors of each pair at random, so that both have effect and gradient."""
    family = find_family(config)
    shapes: dict[str, tuple[int, int]] = {}
    for linear in adapted_linears(family, cut.num_layers, LORA, cut.trunk):
        layer: Any = model.get_submodule(linear.path)
        rows, columns = layer.weight.shape
        shapes[linear.path] = (rows, columns) if family.weights_in_out else (columns, rows)
    factors = initial_factors(shapes, LORA, torch.float64)
    return {n: draw_tensor(n, tuple(v.shape), WIDTH).double() if n.endswith("B") else v for n, v in factors.items()}


def pair(
    name: str, *, inner: bool = True, kind: str = "orthogonal", lora: bool = True, must_invert: bool = False,
    tensors: Mapping[str, Tensor] | None = None, cut: tuple[int, int] = (0, 0),
) -> Pair:  # fmt: skip
    config = config_of(name)
    family, where = find_family(config), Cut.of(config, *cut)
    tensors = {n: v for n, v in (tensors or plain_tensors(name)).items() if where.holds(family, n) == "trunk"}
    plain: Any = trunk_model(config, where)
    for parameter, value in tensors.items():
        assign_parameter(plain, parameter, value.clone())
    factors = factors_of(name, config, where, plain)
    compute_norms_in_float64(plain, family)
    linears = adapted_linears(family, where.num_layers, LORA, where.trunk)
    if lora:
        plain._tied_weights_keys = None
        inject_adapters(plain, LORA, family, where.num_layers, paths=[linear.path for linear in linears])
        place_factors(plain, factors)
    key = make_key(kind, WIDTH, SECRET, "stream")
    folding = Folding(config, where, key, SECRET, inner=inner, must_invert=must_invert)
    rotated = RotatedTrunk(config, where, LORA, torch.device("cpu"), rounded=False)
    rotated.load(folding.fold(tensors))
    rotated.load_factors(rotate_factors(factors if lora else zeroed(factors), folding))
    rotated.ready()
    return Pair(plain.eval(), Trunk(plain, config, where), rotated, folding, linears)


def gradients_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.grad for name, value in parameters.items() if value.grad is not None}


def zeroed(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) if name.endswith("B") else value for name, value in factors.items()}


def states(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, SEQ, WIDTH, dtype=torch.float64, generator=generator) + 0.3


def without_mean(hidden: Tensor, folding: Folding) -> Tensor:
    return hidden - hidden.mean(-1, keepdim=True) if folding.stream.is_centred else hidden


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_rotated_trunk_gives_the_plain_trunks_states(name: str, *, inner: bool) -> None:
    both = pair(name, inner=inner, cut=(0, 1) if inner else (1, 0))
    mask = torch.ones(2, SEQ, dtype=torch.bool)
    mask[1, :3] = False
    with torch.no_grad():
        for given_mask in (None, mask):
            expected = without_mean(both.plain_output(states(), given_mask), both.folding)
            found = both.rotated_output(states(), given_mask)
            kept = torch.ones_like(mask) if given_mask is None else given_mask
            assert relative(found[kept], expected[kept]) < 1e-12
        assert relative(expected, without_mean(states(), both.folding)) > 0.1, "the trunk does nothing"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_another_key_or_a_wrong_fold_gives_something_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(**options: Any) -> float:
        with torch.no_grad():
            both = pair(name, **options)
            return relative(both.rotated_output(states()), without_mean(both.plain_output(states()), both.folding))

    assert error() < 1e-12
    assert error(kind="gaussian") > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(Reads, "fold", lambda _, rows: rows)  # a gain and a bias forgotten
        assert error() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama-tied-biased", "qwen3", "gemma3"])
def test_gradients_of_states_and_factors_come_back_exactly(name: str) -> None:
    both = pair(name)
    probe = torch.randn(2, SEQ, WIDTH, dtype=torch.float64)
    if both.folding.stream.is_centred:  # what follows is a norm, which takes out the mean
        probe = probe - probe.mean(-1, keepdim=True)
    hidden = states().requires_grad_()
    both.plain_output(hidden).backward(probe)
    expected = gradients_of(factor_parameters(both.plain, [linear.path for linear in both.linears]))
    both.rotated.forward(VeiledForward(1, 0, True, True, False, None, None, both.folding.stream.enter(states())))
    back = both.rotated.backward(VeiledBackward(1, both.folding.stream.key.mask_gradient(probe)))
    raw = gradients_of(both.rotated.parameters)
    found = unrotate_gradients(raw, both.folding)
    assert back is not None
    assert hidden.grad is not None
    entering = both.folding.stream.key.unmask_gradient(back)
    assert relative(without_mean(entering, both.folding), hidden.grad) < 1e-11
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        assert relative(gradient, expected[parameter]) < 1e-11, parameter
    assert all(relative(raw[n], expected[n]) > 1e-2 for n in raw), "the host's gradients are the plain ones"


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2", "gemma3"])
def test_factors_come_back_with_the_same_effect(name: str) -> None:
    """Exactly for all but the mean of what LayerNorm models write, which no norm sees."""
    both = pair(name)
    plain = {n: p.detach() for n, p in factor_parameters(both.plain, [linear.path for linear in both.linears]).items()}
    back = unrotate_factors({n: p.detach() for n, p in both.rotated.parameters.items()}, both.folding)
    writers = {linear.path for linear in both.linears if linear.side == "output"}
    for parameter, value in plain.items():
        expected = value
        if both.folding.stream.is_centred and parameter.endswith("B") and parameter.rpartition(".")[0] in writers:
            expected = value - value.mean(0, keepdim=True)
        assert relative(back[parameter], expected) < 1e-9, parameter
    with torch.no_grad():
        before = without_mean(both.plain_output(states()), both.folding)
        place_factors(both.plain, back)
        assert relative(without_mean(both.plain_output(states()), both.folding), before) < 1e-10


def test_a_step_on_the_host_stays_within_what_a_plain_adapter_can_say() -> None:
    """Any B* may come of an optimiser's step; what it has along the image of 1 is taken out, and only that."""
    both = pair("gpt2")
    unit = both.folding.stream.constant() / WIDTH**0.5
    with torch.no_grad():
        for parameter in both.rotated.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    stray = {n: p.detach().clone() for n, p in both.rotated.parameters.items()}
    both.rotated.stay_centred()
    for name, parameter in both.rotated.parameters.items():
        if name.endswith("c_proj.lora_B"):
            assert float((unit @ stray[name]).abs().max()) > 1e-3
            assert float((unit @ parameter.detach()).abs().max()) < 1e-12
        else:
            assert torch.equal(parameter, stray[name])
    with torch.no_grad():
        place_factors(
            both.plain, unrotate_factors({n: p.detach() for n, p in both.rotated.parameters.items()}, both.folding)
        )
        expected = without_mean(both.plain_output(states()), both.folding)
        assert relative(both.rotated_output(states()), expected) < 1e-10


# --- what the host's numbers are to the true ones ---------------------------------------------------------------------


def captured(model: nn.Module, path: str, run: Callable[[], Any]) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _i, output: found.append(output.detach()))
    with torch.no_grad():
        run()
    handle.remove()
    return found[-1]


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen3", "gemma3"])
def test_inner_states_are_the_true_ones_iff_inner_is_off(name: str) -> None:
    family = find_family(config_of(name))
    for inner in (False, True):
        both = pair(name, inner=inner, lora=False)
        for segment in family.segments:
            for local in segment.inputs:
                path = f"{family.blocks}.1.{local}"
                true = captured(both.plain, path, lambda both=both: both.plain_output(states())).flatten(0, -2)
                seen = captured(both.rotated.model, path, lambda both=both: both.rotated_output(states())).flatten(
                    0, -2
                )
                assert (relative(seen, true) < 1e-10) == (not inner), path
                if inner:
                    linear = next(each for each in both.folding.linears.values() if each.path == path)
                    secret_map = both.folding.inner_output(linear)
                    assert secret_map is not None
                    assert relative(secret_map.undo(seen), true) < 1e-10  # it is these states, turned
                    cosines = functional.cosine_similarity(seen[:, None], true[None], dim=-1).diagonal().abs()
                    assert float(cosines.median()) < 0.8, path


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen3", "gemma3"])
def test_attention_scores_and_norms_of_values_are_what_stays(name: str) -> None:
    """`reveals` says so: here is the other side of the claim above."""
    both = pair(name, lora=False)
    family, config = find_family(config_of(name)), config_of(name)
    path = f"{family.blocks}.1.{family.attention.inputs[-1]}"
    true = captured(both.plain, path, lambda: both.plain_output(states()))
    seen = captured(both.rotated.model, path, lambda: both.rotated_output(states()))
    width = int(getattr(config, "head_dim", None) or WIDTH // 4)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or 4)

    def norms(projected: Tensor) -> Tensor:
        return projected[..., -kv_heads * width :].unflatten(-1, (kv_heads, width)).norm(dim=-1).sort(-1).values

    assert relative(norms(seen), norms(true)) < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_the_hosts_weights_are_not_the_plain_ones(name: str) -> None:
    for key, value in pair(name).rotated.model.named_parameters():
        plain = plain_tensors(name).get(key.replace(".base_layer", ""))
        if plain is not None and plain.shape == value.shape:
            assert relative(value, plain) > 0.1, key


def test_a_sandwich_norm_gives_the_rotation_away_and_a_plain_norm_has_nothing_to_give() -> None:
    """The eigenvectors of R⁻¹·diag(g)·R are the rows of R, up to sign and order: stated in the design's reveals."""
    both = pair("gemma3", lora=False)
    norm: Any = both.rotated.model.get_submodule("model.layers.1.post_attention_layernorm")
    matrix = norm.gain.detach()
    vectors = torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors.T
    alike = (vectors @ both.folding.stream.key.matrix().T).abs().amax(1)
    assert float(alike.min()) > 0.999
    for norm in (m for m in pair("llama").rotated.model.modules() if type(m).__name__ == "StreamNorm"):
        assert not list(norm.parameters())


# --- the module is an ordinary one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    def gradients(*, checkpointing: bool) -> dict[str, Tensor]:
        both = pair(name)
        if checkpointing:
            model: Any = both.rotated.model
            model.activation_checkpointing_enable()
        request = VeiledForward(1, 0, True, True, True, None, None, both.folding.stream.enter(states()))
        output = both.rotated.forward(request)
        both.rotated.backward(VeiledBackward(1, torch.ones_like(output)))
        return gradients_of(both.rotated.parameters)

    plain, checkpointed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert all(relative(checkpointed[n], plain[n]) < 1e-12 for n in plain)


def test_in_bfloat16_the_module_runs_as_it_is_and_errs_by_a_few_of_its_eps() -> None:
    both = pair("llama", lora=False)
    expected = both.plain_output(states()).detach()
    model = copy.deepcopy(both.rotated.model).to(torch.bfloat16)
    trunk = Trunk(model, config_of("llama"), both.trunk.cut)
    with torch.no_grad():
        found = trunk.forward(both.folding.stream.enter(states()).bfloat16(), None, None, None, training=False)
    error = relative(both.folding.stream.leave(found.double()), expected)
    assert 2**-10 < error < 0.1


# --- what is refused --------------------------------------------------------------------------------------------------


def test_linears_that_come_before_their_norm_are_refused() -> None:
    config = config_of("llama")
    folding = Folding(config, Cut.of(config, 0, 0), make_key("orthogonal", WIDTH, SECRET, "s"), SECRET, inner=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ModelError, match=r"input_layernorm' has not come"):
        folding.fold({name: plain_tensors("llama")[name]})


def test_an_unknown_tensor_is_refused() -> None:
    config = config_of("llama")
    folding = Folding(config, Cut.of(config, 0, 0), make_key("orthogonal", WIDTH, SECRET, "s"), SECRET, inner=True)
    with pytest.raises(ModelError, match="no fold is known"):
        folding.fold({"model.layers.0.extra.weight": torch.ones(WIDTH)})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"model.layers.1.input_layernorm.weight": (5, 0.0)}),  # a dead channel
        ("gpt2", {"transformer.h.1.ln_1.bias": (slice(None), 0.0)}),  # the constant channel would be trained too
    ],
)  # fmt: skip
def test_a_fold_that_cannot_be_undone_is_refused_if_it_must_be(name: str, change: dict[str, Any]) -> None:
    tensors = {n: v.clone() for n, v in plain_tensors(name).items()}
    for parameter, (where, value) in change.items():
        tensors[parameter][where] = value
    with pytest.raises(ModelError, match="enlarges errors inf times") as caught:
        pair(name, tensors=tensors, must_invert=True)
    assert "optimizer_at = 'enclave'" in str(caught.value.hint)
    with torch.no_grad():  # without the need it is as exact as any
        both = pair(name, tensors=tensors)
        expected = without_mean(both.plain_output(states()), both.folding)
        assert relative(both.rotated_output(states()), expected) < 1e-12


def test_a_backward_that_fits_no_forward_is_refused() -> None:
    trunk = pair("gpt2").rotated
    with pytest.raises(ProtocolError, match="no kept forward 7"):
        trunk.backward(VeiledBackward(7, torch.ones(1)))
    trunk.forward(VeiledForward(1, 0, True, True, False, None, None, states()))
    with pytest.raises(ProtocolError, match="for an output of"):
        trunk.backward(VeiledBackward(1, torch.ones(1, 1, WIDTH)))


def test_secret_maps_are_not_printed() -> None:
    both = pair("llama")
    for secret in (both.folding.stream, both.folding.writes, *both.folding.maps(both.linears[0])):
        assert "redacted" in repr(secret)
        assert "tensor" not in repr(secret)
