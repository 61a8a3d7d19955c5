"""Emulators of the trunk: what is built, what it reveals, that it computes what its card says, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from helpers import FAMILY_NAMES
from veiltune.checkpoints import StateStore
from veiltune.errors import CheckpointError, ConfigError, DataError, ModelError, ProtocolError, TrainingError
from veiltune.models.emulators.blocks import emulator_blocks, install_emulator
from veiltune.models.emulators.build import TrunkSource, build_emulator, emulator_fingerprint
from veiltune.models.emulators.card import Emulator, EmulatorCard, block_linears
from veiltune.models.emulators.distil import Distillation, distil, distillation_loss, newest_step, token_batches
from veiltune.models.emulators.linears import (
    LowRankLinear,
    QuantisedLinear,
    dequantise,
    factorise,
    is_smaller,
    pack,
    packed_shape,
    quantise,
    relative_error,
    unpack,
)
from veiltune.models.emulators.options import EmulatorOptions
from veiltune.models.families import find_family
from veiltune.models.presets import random_config
from veiltune.models.random_weights import draw_tensor

LAYERS, WIDTH = 7, 32
TRUNK = range(1, 6)
IDS = torch.tensor([[5, 17, 200, 3, 90, 41], [8, 8, 250, 61, 7, 100]])
EPS = torch.finfo(torch.float32).eps
families = pytest.mark.parametrize("name", FAMILY_NAMES)


class Through(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


@cache
def plain(name: str) -> Any:
    """A tiny model as `transformers` builds it. Shared: tests must not change it."""
    from transformers import AutoModelForCausalLM

    config = random_config(f"random:{name}:{LAYERS},{WIDTH},4,259")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(draw_tensor(path, tuple(parameter.shape), WIDTH))
    return model.requires_grad_(False)


def source(name: str, dtype: torch.dtype = torch.float32, log: list[Sequence[str]] | None = None) -> TrunkSource:
    state = plain(name).state_dict()

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        if log is not None:
            log.append(names)
        return {key: state[key].to(dtype) for key in names}

    return TrunkSource(plain(name).config, TRUNK, read, f"model-{name}-{dtype}")


def built(name: str, log: list[Sequence[str]] | None = None, **options: Any) -> Emulator:
    return build_emulator(source(name, log=log), EmulatorOptions(**options))


def with_emulator(name: str, emulator: Emulator, **arguments: Any) -> Any:
    """The model with an emulator in the place of its trunk."""
    model = copy.deepcopy(plain(name))
    slots = model.get_submodule(find_family(model.config).blocks)
    for slot in TRUNK:
        setattr(slots, str(slot), Through())
    install_emulator(model, TRUNK, emulator.card, emulator.tensors, **arguments)
    return model


def slots_of(model: Any) -> Any:
    return model.get_submodule(find_family(model.config).blocks)


def run(name: str, blocks: Mapping[int, nn.Module], hidden: Tensor) -> Tensor:
    """Blocks in the order of their slots, on states that nothing masks but causality."""
    extra: dict[str, Any] = {}
    inner = getattr(plain(name), "model", None)
    if hasattr(inner, "rotary_emb"):
        extra["position_embeddings"] = inner.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1]).unsqueeze(0))
    for slot in sorted(blocks):
        hidden = blocks[slot](hidden, attention_mask=None, **extra)
    return hidden


def trunk_blocks(name: str) -> dict[int, nn.Module]:
    return {slot: slots_of(plain(name))[slot] for slot in TRUNK}


def states(seed: int, length: int = 8) -> Tensor:
    return torch.randn(4, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def weights(name: str, slot: int) -> dict[str, Tensor]:
    """(out, in) of every linear of a block, by path."""
    family = find_family(plain(name).config)
    found = {path: plain(name).get_parameter(f"{path}.weight") for path in block_linears(family, slot)}
    return {path: (value.T if family.weights_in_out else value).detach() for path, value in found.items()}


def trunk_numbers(name: str, slots: Sequence[int]) -> int:
    return sum(value.numel() for slot in slots for value in slots_of(plain(name))[slot].parameters())


# --- which blocks -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(2, 60), st.data())
def test_kept_blocks_are_uniform_and_hold_both_ends(start: int, num: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(2, num))
    kept = EmulatorOptions(layers=wanted).kept(range(start, start + num))
    gaps = [after - before for before, after in pairwise(kept)]
    assert len(kept) == wanted
    assert (kept[0], kept[-1]) == (start, start + num - 1)
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_kept_blocks_by_default() -> None:
    assert EmulatorOptions().kept(range(2, 12)) == (2, 4, 7, 9, 11)
    assert EmulatorOptions(kind="distilled").kept(range(1, 6)) == (1, 3, 5)
    assert EmulatorOptions(kind="lowrank").kept(range(1, 6)) == (1, 2, 3, 4, 5)
    assert EmulatorOptions(kind="quantised").kept(range(3, 4)) == (3,)
    assert EmulatorOptions(layers=1).kept(range(3, 9)) == (3,)


@pytest.mark.parametrize(("layers", "num"), [(6, 5), (1, 0), (None, 0)])
def test_a_trunk_too_small_is_refused(layers: int | None, num: int) -> None:
    with pytest.raises(ConfigError, match=f"trunk of {num}"):
        EmulatorOptions(layers=layers).kept(range(1, 1 + num))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "pruned"},
        {"kind": "lowrank", "compression": "quantised"},
        {"rank": 1.5},
        {"rank": 0},
        {"bits": 5},
        {"layers": 0},
        {"unknown": 1},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EmulatorOptions(**wrong)


def test_rank_is_a_share_or_a_number() -> None:
    assert EmulatorOptions(rank=0.25).rank_of(32) == 8
    assert EmulatorOptions(rank=1).rank_of(32) == 32
    assert EmulatorOptions(rank=12).rank_of(32) == 12
    assert EmulatorOptions(rank=100).rank_of(32) == 32
    assert EmulatorOptions(rank=0.001).rank_of(32) == 1


# --- layer drop -------------------------------------------------------------------------------------------------------


@families
def test_all_layers_kept_is_the_model(name: str) -> None:
    emulator = built(name, layers=len(TRUNK))
    model = with_emulator(name, emulator)
    assert torch.equal(model(IDS).logits, plain(name)(IDS).logits)
    assert emulator.card.parameter_share == emulator.card.byte_share == 1.0
    assert not any(parameter.requires_grad for slot in TRUNK for parameter in slots_of(model)[slot].parameters())


@families
def test_dropped_layers_are_passed_through(name: str) -> None:
    emulator = built(name)
    assert emulator.card.kept == (1, 3, 5)
    model, twin = with_emulator(name, emulator), copy.deepcopy(plain(name))
    for slot in (2, 4):
        setattr(slots_of(twin), str(slot), Through())
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    assert not torch.allclose(model(IDS).logits, plain(name)(IDS).logits, atol=1e-2)


@families
def test_the_cache_works(name: str) -> None:
    """A token at a time gives the logits of the whole: kept blocks write to the cache under their own slots."""
    model = with_emulator(name, built(name, layers=2, kind="quantised", group=8))
    whole = model(IDS).logits
    past, parts = None, []
    for position in range(IDS.shape[1]):
        output = model(IDS[:, position : position + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e3 * EPS * float(whole.abs().max()))


@families
def test_shares_of_layer_drop(name: str) -> None:
    card = built(name).card
    assert card.parameter_share == card.byte_share == trunk_numbers(name, (1, 3, 5)) / trunk_numbers(name, TRUNK)


@families
def test_the_trunk_is_read_block_by_block_and_no_more_than_is_kept(name: str) -> None:
    log: list[Sequence[str]] = []
    emulator = built(name, log=log, kind="lowrank", layers=2)
    prefix = find_family(plain(name).config).blocks
    assert [{key.removeprefix(f"{prefix}.").split(".")[0] for key in names} for names in log] == [{"1"}, {"5"}]
    assert all(key.startswith((f"{prefix}.1.", f"{prefix}.5.")) for key in emulator.tensors)


# --- low rank ---------------------------------------------------------------------------------------------------------


@families
def test_low_rank_errors_are_the_tails_of_the_singular_values(name: str) -> None:
    """Eckart and Young: the error of rank r is the root of the sum of the squares of the other singular values."""
    card = built(name, kind="lowrank", rank=0.25).card
    for slot in TRUNK:
        for path, weight in weights(name, slot).items():
            singular = torch.linalg.svdvals(weight.double())
            tail = float(singular[card.ranks[path] :].norm() / singular.norm())
            assert card.errors[path] == pytest.approx(tail, rel=1e3 * EPS)


@families
def test_low_rank_errors_fall_with_the_rank_and_end_at_zero(name: str) -> None:
    cards = [built(name, kind="lowrank", rank=rank, layers=1).card for rank in (1 / 32, 0.125, 0.375, 1.0)]
    for path in weights(name, TRUNK[0]):
        errors = [card.errors[path] for card in cards]
        assert all(before > after for before, after in pairwise(errors))
        assert errors[-1] == 0.0
    assert cards[-1].ranks == {}
    assert [card.parameter_share for card in cards] == sorted(card.parameter_share for card in cards)


@families
def test_full_share_is_the_trunk(name: str) -> None:
    model = with_emulator(name, built(name, kind="lowrank", rank=1.0))
    assert torch.equal(model(IDS).logits, plain(name)(IDS).logits)


@families
def test_low_rank_numbers_are_counted(name: str) -> None:
    emulator = built(name, kind="lowrank", rank=4)
    expected = trunk_numbers(name, TRUNK)
    for slot in TRUNK:
        for weight in weights(name, slot).values():
            expected -= weight.numel() - 4 * sum(weight.shape)
    assert emulator.card.parameter_share == expected / trunk_numbers(name, TRUNK)
    assert emulator.card.byte_share == emulator.card.parameter_share
    assert emulator.num_bytes == 4 * expected


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_full_rank_factors_give_the_matrix(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    down, up = factorise(weight, min(rows, columns))
    assert (down.shape, up.shape) == ((min(rows, columns), columns), (rows, min(rows, columns)))
    assert torch.allclose(up @ down, weight, atol=100 * EPS * float(weight.norm()))


def test_factors_that_are_no_smaller_are_not_made() -> None:
    assert [is_smaller(rank, 32, 32) for rank in (15, 16, 17)] == [True, False, False]
    card = built("llama", kind="lowrank", rank=16, layers=1).card  # q and o are square, the others are not
    paths = weights("llama", 1)
    assert {path for path, weight in paths.items() if weight.shape == (32, 32)} == set(paths) - set(card.ranks) - {
        path for path, weight in paths.items() if min(weight.shape) == 16
    }
    assert card.ranks


def test_relative_error_of_zeros() -> None:
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0
    assert relative_error(torch.ones(2, 3), torch.zeros(2, 3)) == 1.0


# --- integers ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 9), st.data())
def test_packed_integers_round_trip(bits: int, rows: int, columns: int, data: st.DataObject) -> None:
    bound = 2 ** (bits - 1)
    row = st.lists(st.integers(-bound, bound - 1), min_size=columns, max_size=columns)
    codes = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.int16)
    packed = pack(codes, bits)
    assert tuple(packed.shape) == packed_shape(rows, columns, bits)
    assert torch.equal(unpack(packed, bits, columns).to(torch.int16), codes)


@given(st.binary(min_size=1, max_size=40))
def test_any_bytes_unpack_and_pack_again(data: bytes) -> None:
    packed = torch.tensor([list(data)], dtype=torch.uint8)
    for bits in (4, 8):
        codes = unpack(packed, bits, packed.shape[1] * 8 // bits)
        assert torch.equal(pack(codes.to(torch.int16), bits), packed)


@given(st.sampled_from([4, 8]), st.integers(1, 6), st.integers(1, 20), st.integers(1, 24), st.integers(0, 99))
def test_every_weight_is_within_half_its_scale(bits: int, rows: int, columns: int, group: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3
    weight[0] = 0.0
    packed, scales = quantise(weight, bits, group)
    got = dequantise(packed, scales, columns=columns, bits=bits, group=group, dtype=torch.float32)
    each = scales.repeat_interleave(group, dim=1)[:, :columns]
    assert bool(((got - weight).abs() <= each / 2 + 4 * EPS * weight.abs()).all())
    assert torch.equal(got[0], weight[0])
    largest = torch.stack([part.abs().amax(dim=1) for part in weight.split(group, dim=1)], dim=1)
    assert torch.allclose(scales, largest / (2 ** (bits - 1) - 1), rtol=2 * EPS, atol=0)


@families
def test_eight_bits_are_nearer_than_four(name: str) -> None:
    fine, coarse = (built(name, kind="quantised", bits=bits, group=16, layers=1).card for bits in (8, 4))
    assert fine.errors.keys() == coarse.errors.keys() == weights(name, 1).keys()
    for path, error in fine.errors.items():
        assert 0 < error < coarse.errors[path] / 8  # the scales differ by 127 / 7
    assert coarse.byte_share < fine.byte_share < 0.5 * fine.parameter_share


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_bytes_are_counted(bits: int) -> None:
    emulator = built("gpt2", kind="quantised", bits=bits, group=16)
    whole = trunk_numbers("gpt2", TRUNK)
    expected = 4 * whole
    for slot in TRUNK:
        for rows, columns in (weight.shape for weight in weights("gpt2", slot).values()):
            expected += rows * columns * bits // 8 + 4 * rows * math.ceil(columns / 16) - 4 * rows * columns
    assert emulator.num_bytes == expected
    assert emulator.card.byte_share == expected / (4 * whole)
    assert emulator.card.parameter_share == 1.0


# --- compressed linears in use ----------------------------------------------------------------------------------------


def compressed_linear(kind: str, bias: Tensor | None) -> tuple[nn.Module, Tensor]:
    """A compressed linear and the dense weight it is equal to."""
    weight = torch.randn(6, 9, dtype=torch.float64)
    if kind == "lowrank":
        down, up = factorise(weight, 3)
        return LowRankLinear(down, up, bias), up @ down
    packed, scales = quantise(weight, 4, 4)
    linear = QuantisedLinear(packed, scales, bias, in_features=9, bits=4, group=4)
    return linear, linear.weight_in(torch.float64)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("kind", ["lowrank", "quantised"])
def test_compressed_linears_are_their_dense_equivalent(kind: str, *, biased: bool) -> None:
    bias = torch.randn(6, dtype=torch.float64) if biased else None
    linear, dense = compressed_linear(kind, bias)
    x = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    ours, theirs = linear(x), nn.functional.linear(x, dense, bias)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    out = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * out).sum(), x)[0] for y in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-12)
    assert float(gradients[0].norm()) > 0
    assert torch.autograd.gradgradcheck(linear, (x,))
    assert not any(parameter.requires_grad for parameter in linear.parameters())


@families
@pytest.mark.parametrize("compression", ["lowrank", "quantised"])
def test_compressed_blocks_are_their_dense_equivalent(name: str, compression: str) -> None:
    """Outputs, and the gradient that the owner's bottom gets, against blocks with the products written out."""
    emulator = built(name, compression=compression, rank=0.25, bits=4, group=8)
    config, card = plain(name).config, emulator.card
    plain_weights = {path: weight for slot in card.kept for path, weight in weights(name, slot).items()}
    dense: dict[str, Tensor] = {}
    for key, value in emulator.tensors.items():
        path, _, leaf = key.rpartition(".")
        if leaf in {"down", "packed"}:
            if leaf == "down":
                weight = emulator.tensors[f"{path}.up"] @ value
            else:
                columns = plain_weights[path].shape[1]
                scales = emulator.tensors[f"{path}.scales"]
                weight = dequantise(value, scales, columns=columns, bits=4, group=8, dtype=torch.float32)
            dense[f"{path}.weight"] = weight.T.contiguous() if find_family(config).weights_in_out else weight
        elif leaf not in {"up", "scales"}:
            dense[key] = value
    twin = EmulatorCard(kind="layerdrop", trunk=card.trunk, kept=card.kept, parameter_share=1, byte_share=1)
    outputs, gradients = [], []
    for blocks in (emulator_blocks(config, TRUNK, card, emulator.tensors), emulator_blocks(config, TRUNK, twin, dense)):
        x = states(3).requires_grad_()
        output = run(name, blocks, x)
        (output * states(4)).sum().backward()
        outputs.append(output.detach())
        gradients.append(x.grad)
    assert torch.allclose(*outputs, atol=1e3 * EPS * float(outputs[1].abs().max()))
    assert torch.allclose(*gradients, atol=1e3 * EPS * float(gradients[1].abs().max()))
    whole = run(name, {slot: trunk_blocks(name)[slot] for slot in card.kept}, states(3))
    assert not torch.allclose(outputs[0], whole, atol=1e-2)


@families
def test_materialised_integers_compute_the_same(name: str) -> None:
    emulator = built(name, kind="quantised", bits=4, group=8)
    lazy, dense = with_emulator(name, emulator), with_emulator(name, emulator, materialise=torch.float32)
    logits = lazy(IDS).logits
    assert torch.allclose(dense(IDS).logits, logits, atol=1e3 * EPS * float(logits.abs().max()))
    assert any(isinstance(module, QuantisedLinear) for module in lazy.modules())
    assert not any(isinstance(module, QuantisedLinear) for module in dense.modules())
    assert not torch.allclose(logits, plain(name)(IDS).logits, atol=1e-2)


def test_quantised_graphs_keep_no_dense_weight() -> None:
    packed, scales = quantise(torch.randn(64, 64), 4, 16)
    linear, kept = QuantisedLinear(packed, scales, None, in_features=64, bits=4, group=16), []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        linear(x)
        assert kept == []
        nn.functional.linear(x, linear.weight_in(torch.float32))
    assert 64 * 64 in kept


def test_compressed_modules_say_their_sizes() -> None:
    assert "in=9, out=6, rank=3" in repr(compressed_linear("lowrank", None)[0])
    assert "in=9, out=6, bits=4, group=4" in repr(compressed_linear("quantised", None)[0])


def test_a_slot_that_holds_a_block_is_not_left_there() -> None:
    emulator = built("llama")
    with pytest.raises(ModelError, match="slot 2"):
        install_emulator(copy.deepcopy(plain("llama")), TRUNK, emulator.card, emulator.tensors)


# --- distillation -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"kind": "distilled", "layers": 2, "distil_steps": 12, "distil_learning_rate": 3e-3}


def distillation(name: str, drawn: Callable[[int], tuple[Tensor, Tensor | None]] | None = None) -> Distillation:
    return Distillation(
        teacher=lambda hidden, _: run(name, trunk_blocks(name), hidden.float()),
        student=lambda blocks: lambda hidden, _: run(name, blocks, hidden),
        states=drawn or (lambda step: (states(step), None)),
    )


def held_out_loss(name: str, emulator: Emulator) -> float:
    blocks = emulator_blocks(plain(name).config, TRUNK, emulator.card, emulator.tensors)
    hidden = states(10_000, length=32)
    return float(distillation_loss(run(name, blocks, hidden), run(name, trunk_blocks(name), hidden)))


@families
def test_distillation_lowers_the_loss_on_held_out_states(name: str) -> None:
    before = {key: value.clone() for key, value in plain(name).state_dict().items()}
    told: list[tuple[str, int, int, float | None]] = []
    emulator = build_emulator(
        source(name),
        EmulatorOptions(**OPTIONS),
        distillation=distillation(name),
        progress=lambda stage, done, total, loss: told.append((stage, done, total, loss)),
    )
    dropped = built(name, layers=2)
    assert emulator.tensors.keys() == dropped.tensors.keys()
    assert held_out_loss(name, emulator) < 0.9 * held_out_loss(name, dropped)
    assert [entry[:3] for entry in told] == [("distil", step, 12) for step in range(1, 13)]
    assert emulator.card.distil_loss == (told[0][3], told[-1][3])
    assert all(torch.equal(value, before[key]) for key, value in plain(name).state_dict().items())
    assert not any(value.requires_grad for value in emulator.tensors.values())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


class Stopped(Exception):  # noqa: N818
    pass


def stop_at(step: int) -> Callable[..., None]:
    def progress(_stage: str, done: int, _total: int, _loss: float | None) -> None:
        if done == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("stop", [3, 4, 11])
def test_a_resumed_distillation_ends_where_an_undisturbed_one_does(tmp_path: Path, stop: int) -> None:
    options = EmulatorOptions(**OPTIONS, distil_checkpoint_every=4)
    undisturbed = build_emulator(source("llama"), options, distillation=distillation("llama"))
    with pytest.raises(Stopped):
        build_emulator(
            source("llama"),
            options,
            distillation=distillation("llama"),
            directory=tmp_path,
            progress=stop_at(stop),
        )
    assert not list(tmp_path.glob("emulators/*/card.json"))
    told: list[int] = []
    torch.manual_seed(99)  # what else draws numbers meanwhile is no matter
    drawn = torch.get_rng_state()
    resumed = build_emulator(
        source("llama"),
        options,
        distillation=distillation("llama"),
        directory=tmp_path,
        progress=lambda _stage, done, _total, _loss: told.append(done),
    )
    assert told[0] == stop // 4 * 4 + 1
    assert same(resumed.tensors, undisturbed.tensors)
    assert resumed.card == undisturbed.card
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not list(tmp_path.glob("emulators/*.distilling"))


def test_a_state_of_another_emulator_is_refused(tmp_path: Path) -> None:
    options = EmulatorOptions(**OPTIONS, distil_checkpoint_every=4)
    with pytest.raises(Stopped):
        build_emulator(
            source("opt"), options, distillation=distillation("opt"), directory=tmp_path, progress=stop_at(5)
        )
    (folder,) = tmp_path.glob("emulators/*.distilling")
    assert newest_step(folder) == 4
    emulator = built("opt", layers=2)
    blocks = emulator_blocks(plain("opt").config, TRUNK, emulator.card, emulator.tensors)
    with pytest.raises(CheckpointError, match="another configuration"):
        distil(blocks, distillation("opt"), options, store=StateStore(folder, "another"))


def test_distilled_blocks_can_be_compressed_and_keep_their_dtype() -> None:
    stages: list[str] = []
    emulator = build_emulator(
        source("gpt2", torch.bfloat16),
        EmulatorOptions(**OPTIONS | {"distil_steps": 2}, compression="quantised", bits=8, group=16),
        distillation=distillation("gpt2"),
        progress=lambda stage, *_: stages.append(stage),
    )
    assert stages == ["distil", "distil", "compress", "compress"]
    assert {value.dtype for value in emulator.tensors.values()} == {torch.bfloat16, torch.uint8, torch.float32}
    assert emulator.card.distil_loss is not None
    assert emulator.card.errors


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a teacher"):
        built("gpt2", **OPTIONS)


def test_a_loss_that_is_not_finite_stops_it() -> None:
    def drawn(step: int) -> tuple[Tensor, Tensor | None]:
        return states(step) * (math.nan if step == 1 else 1.0), None

    with pytest.raises(TrainingError, match="step 2"):
        build_emulator(source("gpt2"), EmulatorOptions(**OPTIONS), distillation=distillation("gpt2", drawn))


def test_the_loss_is_one_for_the_mean_and_zero_for_the_target() -> None:
    target = states(1)
    mean = target.flatten(0, 1).mean(dim=0).expand_as(target)
    assert float(distillation_loss(target, target)) == 0.0
    assert float(distillation_loss(mean, target)) == pytest.approx(1, rel=1e-5)


def test_a_few_large_features_count_no_more_than_others() -> None:
    output, target = states(1), states(2)
    size = torch.ones(WIDTH)
    size[:5] = 1000
    even = float(distillation_loss(output, target))
    assert float(distillation_loss(output * size, target * size)) == pytest.approx(even, rel=1e-5)


def test_a_constant_feature_does_not_own_the_loss() -> None:
    target = states(1)
    target[..., 0] = 1.0
    near = target.clone()
    near[..., 0] += 1e-3
    assert 0 < float(distillation_loss(near, target)) < 1e-4


def test_padding_is_left_out_of_the_loss() -> None:
    output, target = states(1), states(2)
    mask = torch.ones(4, 8, dtype=torch.int64)
    assert float(distillation_loss(output, target, mask)) == pytest.approx(
        float(distillation_loss(output, target)), rel=1e-5
    )
    mask[:, :3] = 0
    disturbed = output.clone()
    disturbed[:, :3] = 1e6
    assert float(distillation_loss(disturbed, target, mask)) == float(distillation_loss(output, target, mask))


def test_the_cosine_is_weighed_in() -> None:
    output, target = states(1), states(2)
    plain_loss = distillation_loss(output, target)
    angle = 1 - nn.functional.cosine_similarity(output, target, dim=-1).mean()
    assert float(distillation_loss(output, target, None, 3.0)) == pytest.approx(float(plain_loss + 3 * angle), rel=1e-5)


def test_token_batches_depend_on_the_step_alone() -> None:
    options = EmulatorOptions(distil_batch=3, distil_length=5)
    for text in (None, range(40)):
        draw, again = token_batches(options, 259, text), token_batches(options, 259, text)
        assert draw(7).shape == (3, 5)
        assert torch.equal(draw(7), again(7))
        assert not torch.equal(draw(7), draw(8))
    windows = token_batches(options, 259, range(40))(0)
    assert torch.equal(windows - windows[:, :1], torch.arange(5).expand(3, 5))
    assert torch.equal(token_batches(options, 259, range(5))(0), torch.arange(5).expand(3, 5))
    other = EmulatorOptions(distil_batch=3, distil_length=5, distil_seed=1)
    assert not torch.equal(token_batches(other, 259)(7), token_batches(options, 259)(7))
    with pytest.raises(DataError, match="has 4 tokens"):
        token_batches(options, 259, range(4))


# --- kept on disk -----------------------------------------------------------------------------------------------------


def test_a_second_session_does_not_build_again(tmp_path: Path) -> None:
    log: list[Sequence[str]] = []
    options = EmulatorOptions(kind="quantised", bits=4, layers=2)
    first = build_emulator(source("gpt2", log=log), options, directory=tmp_path)
    assert len(log) == 2
    second = build_emulator(source("gpt2", log=log), options, directory=tmp_path)
    assert len(log) == 2
    assert second.card == first.card == build_emulator(source("gpt2"), options).card
    assert same(second.tensors, first.tensors)
    build_emulator(source("gpt2", log=log), options.model_copy(update={"bits": 8}), directory=tmp_path)
    assert len(log) == 4


def test_the_fingerprint_covers_what_matters_and_no_more() -> None:
    def of(trunk: range = TRUNK, model: str = "m", **options: Any) -> str:
        values = TrunkSource(plain("gpt2").config, trunk, lambda _: {}, model)
        return emulator_fingerprint(values, EmulatorOptions(**options))

    assert of() == of(bits=4, rank=0.5, distil_steps=7) == of(layers=3)
    distinct = [
        of(),
        of(model="n"),
        of(trunk=range(1, 5)),
        of(trunk=range(5)),
        of(layers=2),
        of(kind="lowrank"),
        of(kind="lowrank", rank=0.5),
        of(compression="lowrank"),
        of(kind="quantised"),
        of(kind="quantised", bits=4),
        of(kind="quantised", group=32),
        of(kind="distilled"),
        of(kind="distilled", distil_steps=7),
        of(kind="distilled", distil_data="public.jsonl"),
    ]
    assert len(set(distinct)) == len(distinct)
    assert of(kind="distilled", distil_checkpoint_every=3) == of(kind="distilled")


@pytest.mark.parametrize("damage", ["torn", "gone", "card", "nan", "swapped"])
def test_a_damaged_store_is_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    options = EmulatorOptions(layers=2)
    build_emulator(source("gpt2"), options, directory=tmp_path)
    (folder,) = (path for path in (tmp_path / "emulators").iterdir() if path.is_dir())
    block, card = folder / "block-5.safetensors", folder / "card.json"
    if damage == "torn":
        block.write_bytes(block.read_bytes()[:-8])
    elif damage == "gone":
        block.unlink()
    elif damage == "card":
        card.write_text("[1]", encoding="utf-8")
    elif damage == "nan":
        save_file({key: value * math.nan for key, value in load_file(block).items()}, block)
    else:
        card.write_text(json.dumps(json.loads(card.read_text(encoding="utf-8")) | {"fingerprint": "0"}))
    with pytest.raises(CheckpointError, match=folder.name) as caught:
        build_emulator(source("gpt2"), options, directory=tmp_path)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda _key, _value: {}, "lacks the tensor"),
        (lambda key, value: {key: value[:1]}, "has shape"),
        (lambda key, value: {key: value * math.inf}, "not finite"),
    ],
    ids=["missing", "shape", "infinite"],
)
def test_a_trunk_that_does_not_fit_is_refused(spoil: Callable[[str, Tensor], dict[str, Tensor]], fault: str) -> None:
    good, culprit = source("gpt2"), "transformer.h.3.mlp.c_fc.weight"

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        values = dict(good.read(names))
        return values | spoil(culprit, values.pop(culprit)) if culprit in values else values

    with pytest.raises(ModelError, match=fault) as caught:
        build_emulator(TrunkSource(good.config, TRUNK, read, "f"), EmulatorOptions())
    assert culprit in caught.value.message


# --- from the wire ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layerdrop", "lowrank", "quantised"])
def test_cards_survive_json(kind: str) -> None:
    card = built("qwen3", kind=kind).card
    assert EmulatorCard.from_json(json.loads(json.dumps(card.to_json()))) == card


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"kind": "pruned"}, "kind"),
        ({"kept": [1, 6]}, "kept block 6"),
        ({"kept": [0, 1]}, "kept block 0"),
        ({"kept": []}, "kept"),
        ({"kept": [3, 1]}, "ascending"),
        ({"kept": [1, 1]}, "ascending"),
        ({"kept": "all"}, "kept"),
        ({"trunk": [-1, 6]}, "-1"),
        ({"compression": "quantised", "bits": 3, "group": 8}, "3 bits"),
        ({"compression": "quantised", "bits": 8, "group": 0}, "groups of 0"),
        ({"ranks": {"x": 1}}, "ranks"),
        ({"parameter_share": math.nan}, "parameter_share"),
        ({"extra": 1}, "extra"),
    ],
)
def test_malformed_cards_are_refused(change: dict[str, Any], culprit: str) -> None:
    values = built("gpt2").card.to_json()
    with pytest.raises(ProtocolError, match=culprit):
        EmulatorCard.from_json(values | change)


KINDS: dict[str, dict[str, Any]] = {
    "layerdrop": {"layers": 2},
    "lowrank": {"kind": "lowrank", "layers": 2},
    "quantised": {"kind": "quantised", "layers": 2, "bits": 4, "group": 8},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda _key, _value: {}, "lacks the tensor"),
        (lambda key, value: {key: value, f"{key}s": value}, "unexpected tensor"),
        (lambda key, value: {key: value[:-1]}, "has shape"),
        (lambda key, value: {key: value.unsqueeze(0)}, "has shape"),
        (lambda key, value: {key: value.to(torch.int32)}, "is torch.int32"),
        (lambda key, value: {key: value.float() * math.nan}, "not finite|is torch.float32"),
    ],
    ids=["missing", "extra", "short", "deep", "dtype", "nan"],
)
def test_tensors_the_card_did_not_promise_are_refused(
    kind: str, spoil: Callable[[str, Tensor], dict[str, Tensor]], fault: str
) -> None:
    emulator = built("llama", **KINDS[kind])
    for culprit, value in emulator.tensors.items():
        if not culprit.startswith("model.layers.5."):
            continue
        tensors = {key: other for key, other in emulator.tensors.items() if key != culprit} | spoil(culprit, value)
        with pytest.raises(ProtocolError, match=fault) as caught:
            emulator_blocks(plain("llama").config, TRUNK, emulator.card, tensors)
        assert culprit in caught.value.message


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"ranks": {"model.layers.2.mlp.up_proj": 4}}, r"model\.layers\.2\.mlp\.up_proj"),
        ({"ranks": {"model.layers.1.mlp.up_proj": 0}}, "rank 0"),
        ({"ranks": {"model.layers.1.mlp.up_proj": 33}}, "rank 33"),
        ({"trunk": [1, 5], "kept": [1, 4]}, "trunk 1 to 4"),
        ({"trunk": [1, 8]}, "trunk 1 to 7"),
    ],
)
def test_cards_of_another_model_or_cut_are_refused(change: dict[str, Any], culprit: str) -> None:
    emulator = built("llama", **KINDS["lowrank"])
    card = EmulatorCard.from_json(emulator.card.to_json() | change)
    with pytest.raises(ProtocolError, match=culprit):
        emulator_blocks(plain("llama").config, TRUNK, card, emulator.tensors)


def test_a_card_beyond_the_model_is_refused() -> None:
    emulator = built("llama", layers=1)
    card = emulator.card.model_copy(update={"trunk": (1, 99)})
    with pytest.raises(ProtocolError, match="99"):
        emulator_blocks(plain("llama").config, range(1, 99), card, emulator.tensors)
