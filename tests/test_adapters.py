"""LoRA factors: their coordinates under keys, how they begin, and the adapter that PEFT loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import FAMILY_NAMES, plain_model, token_ids
from veiltune.config import LoraConfig
from veiltune.errors import ConfigError
from veiltune.models.adapters import (
    ADAPTER,
    adapted_linears,
    factor_dtype,
    factor_parameters,
    initial_factors,
    inject_adapters,
    mask_factors,
    peft_config,
    place_factors,
    save_adapter,
    unmask_factor_gradients,
    unmask_factors,
)
from veiltune.models.families import find_family
from veiltune.models.family import Family, Linear
from veiltune.models.presets import random_config
from veiltune.models.skeleton import empty_model
from veiltune.privacy.orthogonal import KEY_KINDS, Key, make_key
from veiltune.secrets import MasterSecret

KAPPA = 8.0
EPS = torch.finfo(torch.float64).eps

kinds = pytest.mark.parametrize("kind", KEY_KINDS)
families = pytest.mark.parametrize("name", FAMILY_NAMES)


def key_of(kind: str, dim: int, label: str) -> Key:
    return make_key(kind, dim, MasterSecret.for_tests(5), label, KAPPA if kind == "conditioned" else None)


def tiny(name: str) -> tuple[Any, Family, int]:
    config = random_config(f"random:{name}:2,32,4,259")
    return config, find_family(config), config.num_hidden_layers


def fans(config: Any, linears: list[Linear]) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of a model without weights."""
    model, in_out = empty_model(config), find_family(config).weights_in_out
    shapes = {linear.path: tuple(getattr(model.get_submodule(linear.path), "weight").shape) for linear in linears}  # noqa: B009
    return {path: (a, b) if in_out else (b, a) for path, (a, b) in shapes.items()}


def draw_factors(
    shapes: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Factors of which neither is zero."""
    generator = torch.Generator().manual_seed(2)
    factors: dict[str, Tensor] = {}
    for path, (fan_in, fan_out) in shapes.items():
        factors[f"{path}.lora_A"] = torch.randn(rank, fan_in, generator=generator, dtype=torch.float64).to(dtype)
        factors[f"{path}.lora_B"] = torch.randn(fan_out, rank, generator=generator, dtype=torch.float64).to(dtype)
    return factors


def close(actual: Tensor, expected: Tensor, key: Key) -> bool:
    """Within the rounding of two multiplications by a key: each moves a number by at most d·κ·eps of the row's norm."""
    assert actual.shape == expected.shape
    scale = float(expected.norm(dim=None)) or 1.0
    return float((actual - expected).abs().max()) <= 4 * key.dim * key.condition_number * EPS * scale


# --- coordinates ------------------------------------------------------------------------------------------------------


@kinds
@families
def test_masked_factors_are_the_formulas_and_unmask_to_what_they_were(name: str, kind: str) -> None:
    config, family, layers = tiny(name)
    linears = list(family.linears(layers))
    factors = draw_factors(fans(config, linears), rank=3)
    keys = {linear.key: key_of(kind, config.hidden_size, linear.key) for linear in linears}
    masked = mask_factors(factors, linears, keys)
    plain = unmask_factors(masked, linears, keys)
    assert [*masked] == [*plain] == [*factors]
    for linear in linears:
        A, B = factors[f"{linear.path}.lora_A"].T, factors[f"{linear.path}.lora_B"].T  # row vectors: ΔW = A·B
        masked_A, masked_B = masked[f"{linear.path}.lora_A"].T, masked[f"{linear.path}.lora_B"].T
        key = keys[linear.key]
        R = key.matrix()
        if linear.side == "input":
            assert close(R @ masked_A, A, key)
            assert torch.equal(masked_B, B)
            assert not torch.allclose(masked_A, A, atol=0.1)
        else:
            assert torch.equal(masked_A, A)
            assert close(masked_B, B @ R, key)
            assert not torch.allclose(masked_B, B, atol=0.1)
        assert close(plain[f"{linear.path}.lora_A"].T, A, key)
        assert close(plain[f"{linear.path}.lora_B"].T, B, key)


@kinds
@settings(max_examples=10)
@given(half=st.integers(2, 6), other=st.integers(1, 9), rank=st.integers(1, 5), members=st.integers(1, 3))
def test_the_gradient_map_is_autograds(kind: str, half: int, other: int, rank: int, members: int) -> None:
    """d(loss)/d(plain factors) through the masking, against the map applied to d(loss)/d(masked factors)."""
    d = 2 * half
    linears = [Linear(f"in{n}", "input", "k.in", 0) for n in range(members)] + [Linear("out", "output", "k.out", 0)]
    shapes = {linear.path: (d, other + n) if linear.side == "input" else (other, d) for n, linear in enumerate(linears)}
    keys = {label: key_of(kind, d, label) for label in ("k.in", "k.out")}
    plain = {name: value.requires_grad_() for name, value in draw_factors(shapes, rank).items()}
    masked = mask_factors(plain, linears, keys)
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for value in masked.values():  # not linear, so that the gradient depends on where it is taken
        loss = loss + (torch.randn(value.shape, generator=generator, dtype=torch.float64) * value.sin()).sum()
    expected = dict(zip(plain, torch.autograd.grad(loss, [*plain.values()], retain_graph=True), strict=True))
    at_host = dict(zip(masked, torch.autograd.grad(loss, [*masked.values()]), strict=True))
    found = unmask_factor_gradients(at_host, linears, keys)
    assert found.keys() == expected.keys()
    for linear in linears:
        for which in "AB":
            name = f"{linear.path}.lora_{which}"
            assert close(found[name], expected[name], keys[linear.key])


@kinds
def test_masked_factors_give_the_masked_product(kind: str) -> None:
    """(X·R)·A*·B* = X·A·B on the input side, and X·A*·B* = X·A·B·R on the output side."""
    d, key = 12, key_of(kind, 12, "k")
    generator = torch.Generator().manual_seed(3)
    linears = [Linear("in", "input", "k.in", 0), Linear("out", "output", "k.out", 0)]
    factors = draw_factors({"in": (d, 5), "out": (7, d)}, rank=2)
    masked = mask_factors(factors, linears, {"k.in": key, "k.out": key})

    def product(x: Tensor, found: dict[str, Tensor], path: str) -> Tensor:
        return x @ found[f"{path}.lora_A"].T @ found[f"{path}.lora_B"].T

    x, y = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (d, 7))
    assert close(product(key.mask(x), masked, "in"), product(x, factors, "in"), key)
    assert close(key.unmask(product(y, masked, "out")), product(y, factors, "out"), key)


def test_what_is_not_adapted_is_left_out() -> None:
    config, family, layers = tiny("llama")
    linears = list(family.linears(layers))
    keys = {linear.key: key_of("orthogonal", config.hidden_size, linear.key) for linear in linears}
    some = adapted_linears(family, layers, LoraConfig(targets=("q_proj",)))
    factors = draw_factors(fans(config, some), rank=2)
    assert mask_factors(factors, linears, keys).keys() == factors.keys()


# --- targets ----------------------------------------------------------------------------------------------------------


@families
def test_all_targets_are_all_linears(name: str) -> None:
    _, family, layers = tiny(name)
    assert adapted_linears(family, layers, LoraConfig()) == list(family.linears(layers))


@families
def test_a_target_selects_the_linears_of_that_name_in_every_block(name: str) -> None:
    _, family, layers = tiny(name)
    every = list(family.linears(layers))
    for target in {linear.path.rpartition(".")[2] for linear in every}:
        chosen = adapted_linears(family, layers, LoraConfig(targets=(target,)))
        assert chosen == [linear for linear in every if linear.path.endswith(f".{target}")]
        assert len(chosen) in {layers, 2 * layers}


@pytest.mark.parametrize(
    ("name", "target", "meant"),
    [
        ("gpt2", "c_atn", "c_attn"),
        ("opt", "o_proj", "out_proj"),
        ("llama", "q_prj", "q_proj"),
        ("llama", "lm_head", None),
    ],
)
def test_an_unknown_target_is_named_with_the_nearest(name: str, target: str, meant: str | None) -> None:
    _, family, layers = tiny(name)
    known = {linear.path.rpartition(".")[2] for linear in family.linears(layers)}
    with pytest.raises(ConfigError, match=f"{family.name} has no linear '{target}'") as caught:
        adapted_linears(family, layers, LoraConfig(targets=(next(iter(known)), target)))
    hint = str(caught.value.hint)
    assert hint.startswith(f"did you mean '{meant}'?" if meant else "valid:")
    assert all(each in hint for each in known)


# --- the first factors ------------------------------------------------------------------------------------------------

WIDE = {"a": (400, 7), "b": (400, 3)}


def distance_from_uniform(values: Tensor, bound: float) -> float:
    """Kolmogorov's statistic times √n: below 1.95 with probability 0.999 if the values are uniform on ±bound."""
    found = (values.flatten().double().sort().values / bound + 1) / 2
    n = len(found)
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    return float(torch.maximum((grid - found).abs(), (grid - 1 / n - found).abs()).max()) * math.sqrt(n)


def pefts_first_factors(fan_in: int, rank: int) -> Tensor:
    import peft

    model = nn.Sequential(nn.Linear(fan_in, 3))
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=["0"]), model, ADAPTER)
    layer: Any = model[0]
    assert not bool(layer.lora_B[ADAPTER].weight.any())
    return layer.lora_A[ADAPTER].weight.detach()


def test_first_factors_are_distributed_as_pefts() -> None:
    fan_in, rank = 400, 16
    bound = 1 / math.sqrt(fan_in)
    ours = initial_factors({"a": (fan_in, 3)}, LoraConfig(rank=rank, init_seed=1), torch.float32)["a.lora_A"]
    theirs = pefts_first_factors(fan_in, rank)
    assert ours.shape == theirs.shape == (rank, fan_in)
    for values in (ours, theirs):
        assert float(values.abs().max()) <= bound
        assert distance_from_uniform(values, bound) < 1.95
    # the control: another bound, or another shape of distribution, is told apart
    assert distance_from_uniform(ours, 1.1 * bound) > 1.95
    assert distance_from_uniform(torch.randn(rank, fan_in) * bound / math.sqrt(3), bound) > 1.95


def test_first_products_are_zero() -> None:
    factors = initial_factors(WIDE, LoraConfig(rank=2), torch.bfloat16)
    for path, (fan_in, fan_out) in WIDE.items():
        assert factors[f"{path}.lora_A"].shape == (2, fan_in)
        assert factors[f"{path}.lora_B"].shape == (fan_out, 2)
        assert not bool(factors[f"{path}.lora_B"].any())
    assert {value.dtype for value in factors.values()} == {torch.bfloat16}


def test_seeded_first_factors_are_repeatable_and_others_are_not() -> None:
    def first(seed: int | None) -> Tensor:
        torch.manual_seed(0)  # which must not matter
        return initial_factors(WIDE, LoraConfig(rank=2, init_seed=seed), torch.float32)["a.lora_A"]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert not torch.equal(first(None), first(None))


def test_each_linear_has_factors_of_its_own_whatever_the_others() -> None:
    lora = LoraConfig(rank=2, init_seed=1)
    both, alone = (initial_factors(shapes, lora, torch.float32) for shapes in (WIDE, {"b": WIDE["b"]}))
    assert not torch.equal(both["a.lora_A"], both["b.lora_A"])
    assert torch.equal(both["b.lora_A"], alone["b.lora_A"])


def test_first_factors_in_a_narrow_dtype_are_the_wide_ones_rounded() -> None:
    lora = LoraConfig(rank=2, init_seed=1)
    exact = initial_factors(WIDE, lora, torch.float64)["a.lora_A"]
    assert torch.equal(initial_factors(WIDE, lora, torch.float32)["a.lora_A"], exact.float())


def test_factors_are_never_half_precision() -> None:
    assert {factor_dtype(each) for each in (torch.bfloat16, torch.float16, torch.float32)} == {torch.float32}
    assert factor_dtype(torch.float64) == torch.float64


# --- in a model, and on disk ------------------------------------------------------------------------------------------


def with_factors(name: str, lora: LoraConfig, factors: dict[str, Tensor]) -> Any:
    model = plain_model(name)
    family, layers = find_family(model.config), model.config.num_hidden_layers
    inject_adapters(model, lora, family, layers)
    place_factors(model, factors)
    return model.eval()


def logits_of(model: Any) -> Tensor:
    ids = torch.tensor(token_ids(2, 9))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


LORAS = [LoraConfig(rank=3, alpha=7.0, dropout=0.1), LoraConfig(rank=1, alpha=0.5, targets=("NAMED",))]
NAMED = {"gpt2": "c_proj", "opt": "fc1", "llama": "v_proj", "qwen3": "o_proj"}


@pytest.mark.parametrize("lora", LORAS, ids=["all", "some"])
@pytest.mark.parametrize("name", NAMED)
def test_peft_loads_what_was_saved_and_gives_the_same_logits(name: str, lora: LoraConfig, tmp_path: Path) -> None:
    from peft import PeftModel

    if lora.targets != "all":
        lora = lora.model_copy(update={"targets": (NAMED[name],)})
    plain = plain_model(name)
    family, layers = find_family(plain.config), plain.config.num_hidden_layers
    factors = draw_factors(fans(plain.config, adapted_linears(family, layers, lora)), lora.rank, torch.float32)
    save_adapter(tmp_path / "new" / "adapter", factors, lora, family, layers, "the/base")
    expected = logits_of(with_factors(name, lora, factors))
    without = logits_of(plain)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "new" / "adapter")).eval()
    assert torch.equal(logits_of(loaded), expected)
    assert float((expected - without).abs().max()) > 0.1 * float(without.abs().max())
    trained = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    assert len(trained) == len(factors)
    merged = loaded.merge_and_unload()
    assert torch.allclose(logits_of(merged), expected, atol=1e-4 * float(expected.abs().max()))


def test_the_saved_files_are_pefts(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, alpha=6.0, dropout=0.25)
    config, family, layers = tiny("gpt2")
    factors = draw_factors(fans(config, adapted_linears(family, layers, lora)), 2, torch.float32)
    save_adapter(tmp_path, factors, lora, family, layers, "the/base")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.{name}.weight" for name in factors}
    assert all(torch.equal(stored[f"base_model.model.{name}.weight"], value) for name, value in factors.items())
    said = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (2, 6.0, 0.25)
    assert (said["base_model_name_or_path"], said["task_type"], said["fan_in_fan_out"]) == (
        "the/base",
        "CAUSAL_LM",
        True,
    )
    assert sorted(said["target_modules"]) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert said["inference_mode"] is True


def test_a_crash_while_saving_leaves_no_adapter_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoraConfig(rank=2)
    config, family, layers = tiny("gpt2")
    factors = draw_factors(fans(config, adapted_linears(family, layers, lora)), 2, torch.float32)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(tmp_path, factors, lora, family, layers, "the/base")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors.partial"}


@families
def test_injected_linears_are_exactly_those_described(name: str) -> None:
    config, family, layers = tiny(name)
    model = empty_model(config)
    inject_adapters(model, LoraConfig(rank=2), family, layers)
    wrapped = {path.rpartition(".lora_A")[0] for path, _ in model.named_parameters() if ".lora_A." in path}
    assert wrapped == {linear.path for linear in family.linears(layers)}
    assert sorted(peft_config(LoraConfig(), family, layers).target_modules) == sorted(
        {path for segment in family.segments for path in (*segment.inputs, segment.output)}
    )


def test_placed_factors_are_parameters_once_and_are_copied_into_thereafter() -> None:
    config, family, layers = tiny("llama")
    model, lora = empty_model(config), LoraConfig(rank=2)
    linears = adapted_linears(family, layers, lora)
    inject_adapters(model, lora, family, layers)
    paths = [linear.path for linear in linears]
    assert all(value.is_meta for value in factor_parameters(model, paths).values())
    first = draw_factors(fans(config, linears), 2, torch.float32)
    kept = {name: value.clone() for name, value in first.items()}
    place_factors(model, first)
    placed = factor_parameters(model, paths)
    assert placed.keys() == first.keys()
    assert all(torch.equal(placed[name], value) and placed[name].requires_grad for name, value in first.items())
    second = {name: value + 1 for name, value in first.items()}
    place_factors(model, second)
    assert all(factor_parameters(model, paths)[name] is value for name, value in placed.items()), (
        "an optimiser holds them"
    )
    assert all(torch.equal(placed[name], value) for name, value in second.items())
    assert all(torch.equal(value, kept[name]) for name, value in first.items()), "the given tensors are not taken"
