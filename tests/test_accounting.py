"""Accounts are compared with what modules really hold and really compute, not with themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import enclave_shares
from veiltune.config import LoraConfig
from veiltune.errors import ModelError, UserError
from veiltune.models.accounting import lora_parameters, shares, tensor_placement
from veiltune.models.cut import Cut
from veiltune.models.family import Placement
from veiltune.models.presets import random_config
from veiltune.models.rotated import rotated_model
from veiltune.models.trunk import HostTrunk
from veiltune.models.veil_accounting import veil_placement, veil_shares

PLACEMENTS: tuple[Placement, ...] = ("paper", "compact")
# Tied and untied heads, biases, fused QKV, grouped queries, QK-norm with heads wider than the hidden state.
FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3")
LAYERS, HIDDEN = 2, 32


def tiny(family: str) -> Any:
    return random_config(f"{family}:{LAYERS},{HIDDEN},4,384")


def real_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("model", "percent"), [("gpt2-small", 31.7), ("gpt2-medium", 14.8), ("gpt2-large", 8.5), ("gpt2-xl", 5.3)]
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_published_shares_are_reproduced(model: str, percent: float, placement: Placement) -> None:
    counted = shares(random_config(model), placement, 1, 16)
    assert 100 * counted.param_share == pytest.approx(percent, abs=0.2)
    if model == "gpt2-xl":
        assert counted.num_parameters == 1_557_611_200
        assert counted.param_share <= 0.054


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_placed_once(family: str) -> None:
    config = tiny(family)
    stored = {id(value): (name, tuple(value.shape)) for name, value in real_model(config).named_parameters()}
    for placement in PLACEMENTS:
        for design in ("local", "obfuscatune"):
            places = tensor_placement(config, placement, design)
            assert sorted((place.name, place.shape) for place in places) == sorted(stored.values())
            assert all(place.num_parameters == torch.Size(place.shape).numel() for place in places)
            assert "other" not in {place.kind for place in places}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_host_is_said_to_hold_what_the_host_trunk_has(family: str, placement: Placement) -> None:
    config = tiny(family)
    trunk = HostTrunk(config, placement, LoraConfig(rank=2), torch.device("cpu"), rounded=False)
    held = {
        name.replace(".base_layer.", "."): tuple(value.shape)
        for name, value in trunk.model.named_parameters()
        if ".lora_" not in name
    }
    placed = tensor_placement(config, placement, "obfuscatune")
    assert {place.name: place.shape for place in placed if place.holder == "host"} == held


@pytest.mark.parametrize("family", FAMILIES)
def test_only_weights_of_linears_are_masked(family: str) -> None:
    placed = tensor_placement(tiny(family), "compact", "obfuscatune")
    masked = [place for place in placed if place.is_masked]
    assert all(place.holder == "host" and len(place.shape) == 2 for place in masked)
    assert {place.kind for place in masked} == {
        "attention input weights",
        "attention output weights",
        "MLP input weights",
        "MLP output weights",
    }
    clear = {place.kind for place in placed if place.holder == "host" and not place.is_masked}
    assert clear <= {"attention input biases", "MLP input biases", "attention inner norms"}
    assert ("attention inner norms" in clear) == (family == "qwen3")
    outputs = [place for place in placed if place.kind.endswith("output biases")]
    assert bool(outputs) == (family in {"gpt2", "opt"})
    assert all(place.holder == "enclave" for place in outputs)


def test_paper_placement_keeps_the_inner_norms() -> None:
    compact, paper = (shares(tiny("qwen3"), placement, 1, 4) for placement in ("compact", "paper"))
    head_width = 2 * HIDDEN // 4
    assert paper.enclave_parameters - compact.enclave_parameters == LAYERS * 2 * head_width
    assert compact.clear_parameters == LAYERS * 2 * head_width
    assert paper.revealed_param_share == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_torch_counts(family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config, batch, length = tiny(family), 2, 5
    model = real_model(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros((batch, length), dtype=torch.int64), use_cache=False)
    counted = shares(config, "compact", batch, length)
    assert counter.get_total_flops() == counted.linear_flops + counted.attention_flops + counted.head_flops


@pytest.mark.parametrize("family", FAMILIES)
def test_maskings_are_four_square_products_a_block(family: str) -> None:
    counted = shares(tiny(family), "compact", 3, 7)
    assert counted.key_elements == LAYERS * 4 * HIDDEN**2
    assert counted.mask_flops == 3 * 7 * 2 * LAYERS * 4 * HIDDEN**2
    assert counted.enclave_flops == counted.head_flops + counted.mask_flops


def test_paper_placement_brings_attention_into_the_enclave() -> None:
    compact, paper = (shares(tiny("llama"), placement, 2, 9) for placement in ("compact", "paper"))
    assert paper.flops == compact.flops
    assert paper.enclave_flops - compact.enclave_flops == compact.attention_flops > 0
    assert (compact.crossings, paper.crossings) == (4 * LAYERS, 8 * LAYERS)


def test_local_has_no_enclave() -> None:
    config = tiny("gpt2")
    counted = shares(config, "compact", 2, 9, design="local")
    assert (counted.param_share, counted.flop_share, counted.mask_flops, counted.crossings) == (0, 0, 0, 0)
    assert counted.revealed_param_share == 1
    assert counted.flops == shares(config, "compact", 2, 9).flops - shares(config, "compact", 2, 9).mask_flops
    assert {(p.holder, p.is_masked) for p in tensor_placement(config, "compact", "local")} == {("host", False)}


# --- veil -------------------------------------------------------------------------------------------------------------

DEPTHS = (0, 1, 2)


def deep(family: str) -> Any:
    return random_config(f"{family}:3,{HIDDEN},4,384")


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_veils_host_is_said_to_hold_what_its_trunk_has(family: str, depth: int) -> None:
    """Under the plain names; a norm's constant is the image of 1, which is no parameter of the model."""
    config = deep(family)
    cut = Cut.of(config, depth, 0)
    held = {
        name.replace(".gain", ".weight")
        for name, _ in rotated_model(config, cut).named_parameters()
        if not name.endswith(".constant")
    }
    places = veil_placement(config, cut)
    assert {place.name for place in places if place.holder == "host"} == held
    assert {place.name for place in places} == {name for name, _ in real_model(config).named_parameters()}


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_veil_leaves_nothing_in_the_clear_iff_there_are_inner_maps(family: str) -> None:
    config = deep(family)
    cut = Cut.of(config, 1, 0)
    assert veil_shares(config, cut, 1, 4).revealed_param_share == 0
    bare = {
        place.kind
        for place in veil_placement(config, cut, inner=False)
        if place.holder == "host" and not place.is_masked
    }
    assert bare <= {"attention input biases", "MLP input biases", "attention inner norms"}
    assert bool(bare) == (family in {"gpt2", "opt", "qwen2", "qwen3", "gemma3"})
    assert (veil_shares(config, cut, 1, 4, inner=False).clear_parameters > 0) == bool(bare)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_block_more_in_veils_enclave_is_a_block_of_work_more(family: str) -> None:
    config, batch, length = deep(family), 2, 5
    counted = [veil_shares(config, Cut.of(config, depth, 0), batch, length) for depth in DEPTHS]
    plain = shares(config, "compact", batch, length, design="local")
    block = (plain.linear_flops + plain.attention_flops) // 3
    assert [each.enclave_flops - counted[0].enclave_flops for each in counted] == [0, block, 2 * block]
    assert {each.mask_flops for each in counted} == {4 * HIDDEN**2 * batch * length}
    assert counted[0].enclave_flops == plain.head_flops + counted[0].mask_flops
    assert {each.flops - each.mask_flops for each in counted} == {plain.flops}
    assert {each.crossings for each in counted} == {2}
    assert counted[0].param_share < counted[1].param_share < counted[2].param_share < 1
    top = veil_shares(config, Cut.of(config, 0, 1), batch, length)
    assert (top.enclave_flops, top.enclave_parameters) == (counted[1].enclave_flops, counted[1].enclave_parameters)


def test_veils_enclave_does_less_than_that_of_obfuscatune() -> None:
    """Where the head is narrow beside the trunk, which is what counts: two maskings in all against four a block."""
    config = random_config("gpt2-xl")
    ours = veil_shares(config, Cut.of(config, 1, 0), 4, 128)
    theirs = shares(config, "compact", 4, 128)
    assert ours.flop_share < theirs.flop_share / 2
    assert ours.param_share < 2 * theirs.param_share


def test_an_empty_pass_under_veil_is_refused() -> None:
    config = deep("gpt2")
    with pytest.raises(UserError, match="0 x 1"):
        veil_shares(config, Cut.of(config, 1, 0), 0, 1)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_lora_numbers_are_those_peft_makes(family: str) -> None:
    import peft

    config, rank = tiny(family), 3
    fused = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    targets: Any = fused if family == "gpt2" else "all-linear"
    lora = peft.LoraConfig(r=rank, target_modules=targets, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
    trained: Any = peft.get_peft_model(real_model(config), lora)
    made = sum(value.numel() for value in trained.parameters() if value.requires_grad)
    assert lora_parameters(config, rank) == shares(config, "paper", 1, 1).lora_parameters(rank) == made


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("compact", 1, 1, "obfuscatun"), "obfuscatun", "obfuscatune"),
        (("compactt", 1, 1, "obfuscatune"), "compactt", "compact"),
        (("paper", 0, 1, "obfuscatune"), "0 x 1", "at least 1"),
        (("paper", 1, -1, "local"), "1 x -1", "at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], message: str, hint: str) -> None:
    placement, batch, length, design = arguments
    unchecked: Any = getattr(shares, "__wrapped__", shares)  # the suite's own type check comes before ours
    with pytest.raises(UserError, match=message) as caught:
        unchecked(tiny("gpt2"), placement, batch, length, design=design)
    assert hint in str(caught.value.hint)


def test_unsupported_architecture_is_refused() -> None:
    from transformers import BertConfig

    with pytest.raises(ModelError, match="bert"):
        tensor_placement(BertConfig(), "compact", "obfuscatune")


def test_committed_shares_are_what_the_benchmark_gives() -> None:
    path = Path(enclave_shares.__file__).parent / "results" / "enclave_shares.json"
    committed = json.loads(path.read_text(encoding="utf-8"))
    assert committed["rows"] == enclave_shares.measure(quick=False)
    assert {row["model"] for row in committed["rows"]} == set(enclave_shares.MODELS)
