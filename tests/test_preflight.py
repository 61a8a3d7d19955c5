"""A public ancestor is found before anything is sent, unrelated weights are not, what is not comparable is not called safe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import helpers
from commands import runner
from veiltune.errors import VeiltuneError
from veiltune.models.ancestry import AncestorCheck, check_ancestor
from veiltune.models.presets import random_config
from veiltune.models.random_weights import byte_tokenizer, write_random_weights
from veiltune.models.sources import resolve_model
from veiltune.parties.party import Job
from veiltune.privacy.alignment import ALIGNED_EXCESS, Alignment, align
from veiltune.privacy.orthogonal import make_key
from veiltune.secrets import MasterSecret
from veiltune.session.protection import protect_model

D, N = 48, 144
DISTANCES = (0.0, 0.01, 0.1, 0.5)
Change = Callable[[str, Tensor, torch.Generator], Tensor]


def drawn(seed: int, rows: int = D, columns: int = N) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(weights: Tensor, distance: float, seed: int) -> Tensor:
    noise = drawn(seed, *weights.shape)
    return weights + noise * (distance * weights.norm() / noise.norm())


def measured(ancestor: Tensor, weights: Tensor, seed: int = 0) -> Alignment:
    return align(ancestor, weights, torch.Generator().manual_seed(seed))


def model(name: str, change: Change, *, family: str = "llama", hidden: int = 48, seed: int = 0, layers: int = 3) -> str:
    """A small random model in a folder, each of its matrices changed."""
    directory = helpers.scratch() / f"preflight-{family}-{hidden}-{layers}-{name}-{seed}"
    if directory.exists():
        return str(directory)
    directory.mkdir()
    write_random_weights(random_config(f"random:{family}:{layers},{hidden},4,259"), directory, torch.float32)
    rng = torch.Generator().manual_seed(seed)
    for path in sorted(directory.glob("*.safetensors")):
        tensors = {key: change(key, value, rng).contiguous() for key, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def same(_name: str, value: Tensor, _rng: torch.Generator) -> Tensor:
    return value


def fresh(_name: str, value: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=rng) * value.std() if value.ndim == 2 else value


def noisy(distance: float) -> Change:
    def change(_name: str, value: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(value.shape, generator=rng)
        return value + noise * (distance * value.norm() / noise.norm())

    return change


def low_rank(_name: str, value: Tensor, rng: torch.Generator) -> Tensor:
    """As LoRA leaves them: a change of rank 2, a fifth as large as the weights."""
    if value.ndim < 2:
        return value
    update = torch.randn(value.shape[0], 2, generator=rng) @ torch.randn(2, value.shape[1], generator=rng)
    return value + update * (0.2 * value.norm() / update.norm())


def channels_permuted(name: str, value: Tensor, _rng: torch.Generator) -> Tensor:
    """The same function with the residual stream's channels in another order."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(99))
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    return value[order] if writes or value.ndim == 1 else value[:, order]


@cache
def checked(ancestor: str, one: str) -> AncestorCheck:
    with helpers.own_cache():
        return check_ancestor(resolve_model(one), resolve_model(ancestor))


# --- the measure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("seed", range(4))
def test_a_near_ancestor_is_found_by_its_distance(distance: float, seed: int) -> None:
    """Noise at right angles to the weights: s is about 1/√(1 + δ²), and larger only by what the rotation fits of the noise."""
    weights = drawn(seed)
    found = measured(near(weights, distance, seed + 100), weights)
    assert found.is_aligned
    expected = 1 / math.sqrt(1 + distance**2)
    assert expected - 3 * distance / math.sqrt(D * N) - 1e-12 <= found.similarity <= 1 + 1e-12
    assert found.weight_error <= distance + 1e-6


def test_the_residual_grows_with_the_distance_and_the_excess_falls() -> None:
    weights = drawn(0)
    found = [measured(near(weights, distance, 1), weights) for distance in (*DISTANCES, 1.0, 3.0)]
    residuals = [each.residual for each in found]
    assert residuals == sorted(residuals)
    excesses = [each.excess for each in found]
    assert excesses == sorted(excesses, reverse=True)


@pytest.mark.parametrize("shape", [(48, 48), (48, 144), (64, 256)])
def test_unrelated_weights_are_at_chance_in_every_draw(shape: tuple[int, int]) -> None:
    """60 pairs a shape; none may reach the threshold, and their mean must be 0 within five standard errors."""
    found = torch.tensor([measured(drawn(2 * i, *shape), drawn(2 * i + 1, *shape), i).excess for i in range(60)])
    assert float(found.max()) < ALIGNED_EXCESS / 1.5
    assert abs(float(found.mean())) < 5 * float(found.std()) / math.sqrt(60)


def test_chance_is_what_the_quarter_circle_gives() -> None:
    """8/(3π)·√(d/n) for n ≫ d, up to the 1/n corrections: d/n = 1/32 here."""
    found = measured(drawn(0, 32, 1024), drawn(1, 32, 1024))
    expected = 8 / (3 * math.pi) * math.sqrt(32 / 1024)
    assert found.chance == pytest.approx(expected, rel=0.05)
    assert found.similarity == pytest.approx(expected, rel=0.05)


def test_it_is_the_same_for_masked_weights() -> None:
    """What the provider measures in the clear is what a host gets under the key."""
    weights = drawn(3)
    ancestor = near(weights, 0.1, 4)
    key = make_key("orthogonal", D, MasterSecret.for_tests(1), "x")
    plain, masked = measured(ancestor, weights), measured(ancestor, key.mask_input_weight(weights))
    assert masked.similarity == pytest.approx(plain.similarity, abs=1e-10)
    assert masked.chance == pytest.approx(plain.chance, abs=1e-10)


def test_a_shape_that_fits_anything_tells_nothing() -> None:
    weights = drawn(5, 48, 4)
    assert measured(drawn(6, 48, 4), weights).similarity > 0.9
    found = measured(weights, weights)
    assert not found.is_telling
    assert not found.is_aligned


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_an_ancestor_is_found_in_every_block(family: str, distance: float) -> None:
    one = model("plain", same, family=family)
    found = checked(model(f"noise{distance}", noisy(distance), family=family, seed=1), one)
    assert found.verdict == "aligned"
    assert len(found.aligned) == len(found.keys) == 12
    assert "ALIGNED" in str(found)


@pytest.mark.parametrize("change", [low_rank, channels_permuted])
def test_a_tuned_and_a_permuted_descendant_are_found(change: Change) -> None:
    found = checked(model("plain", same), model(change.__name__, change))
    assert found.verdict == "aligned"
    assert len(found.aligned) == 12


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_unrelated_model_of_the_same_shape_is_not(family: str, seed: int) -> None:
    one = model("plain", same, family=family)
    found = checked(model("fresh", fresh, family=family, seed=seed), one)
    assert found.verdict == "not aligned"
    assert found.aligned == []
    assert "not ruled out" in str(found)


def test_one_aligned_key_is_enough() -> None:
    def but_one(name: str, value: Tensor, rng: torch.Generator) -> Tensor:
        return value if "layers.1.mlp.down" in name else fresh(name, value, rng)

    found = checked(model("but-one", but_one, seed=7), model("plain", same))
    assert (found.verdict, found.aligned) == ("aligned", ["block1.mlp.out"])


@pytest.mark.parametrize("other", [{"hidden": 32}, {"family": "gpt2"}])
def test_other_shapes_are_not_comparable_which_is_not_safe(other: dict[str, Any]) -> None:
    found = checked(model("plain", same, **other), model("plain", same))
    assert found.verdict == "not comparable"
    assert "does not make it safe" in str(found)
    assert len(found.not_compared) == 12


def test_a_shallower_ancestor_is_compared_as_far_as_it_goes() -> None:
    found = checked(model("plain", same, layers=2), model("plain", same))
    assert found.verdict == "aligned"
    assert sorted(found.not_compared) == [
        f"block2.{kind}" for kind in ("attention.in", "attention.out", "mlp.in", "mlp.out")
    ]


# --- before a session -------------------------------------------------------------------------------------------------


def provisioned(output: Path, design: str, **provider: Any) -> tuple[list[dict[str, Any]], Any]:
    events: list[dict[str, Any]] = []
    config = helpers.make_config(
        design, model("plain", same), output, provider=provider, session={"processes": False, "record": ["host"]}
    )
    outcome = helpers.run_with(
        config, Job(verb="provision"), lambda _, name, fields: events.append(fields) if name == "ancestor" else None
    )
    return events, outcome


@pytest.mark.parametrize("design", ["obfuscatune", "veil"])
def test_nothing_is_sent_to_a_host_of_a_descendant(design: str, tmp_path: Path) -> None:
    ancestor = model("noise0.1", noisy(0.1), seed=1)
    with pytest.raises(VeiltuneError, match="nothing was sent") as caught:
        provisioned(tmp_path / "run", design, public_ancestors=[ancestor])
    assert "allow_public_ancestor" in str(caught.value.hint)
    assert caught.value.exit_code == 2
    for path in (tmp_path / "run" / "transcript").glob("host*.vtt"):
        assert path.stat().st_size < 4096, "weights crossed"


@pytest.mark.parametrize("design", ["obfuscatune", "veil"])
def test_who_allows_it_is_warned_and_it_is_recorded(design: str, tmp_path: Path) -> None:
    ancestor = model("noise0.1", noisy(0.1), seed=1)
    events, outcome = provisioned(tmp_path / "run", design, public_ancestors=[ancestor], allow_public_ancestor=True)
    assert [each["verdict"] for each in events] == ["aligned"]
    assert outcome.figures["provider"]["public_ancestors"] == {ancestor: "aligned"}


def test_unrelated_models_stop_nothing(tmp_path: Path) -> None:
    ancestors = [model("fresh", fresh, seed=1), model("plain", same, hidden=32)]
    events, outcome = provisioned(tmp_path / "run", "obfuscatune", public_ancestors=ancestors)
    assert [each["verdict"] for each in events] == ["not aligned", "not comparable"]
    assert list(outcome.figures["provider"]["public_ancestors"].values()) == ["not aligned", "not comparable"]


def test_inspect_says_it_without_a_session(capsys: pytest.CaptureFixture[str]) -> None:
    veiltune = runner(capsys)
    one, ancestor = model("plain", same), model("noise0.1", noisy(0.1), seed=1)
    ran = veiltune("inspect", one, "--ancestor", ancestor, "--ancestor", model("fresh", fresh, seed=1), "--json")
    assert [each["verdict"] for each in ran.json["ancestors"]] == ["aligned", "not aligned"]
    assert "ALIGNED" in " ".join(veiltune("inspect", one, "--ancestor", ancestor).err.split())


# --- what a finished run revealed -------------------------------------------------------------------------------------


@cache
def finished() -> Path:
    from commands import write_config

    directory = helpers.scratch() / "disclosed"
    directory.mkdir()
    return write_config(directory, provider__public_ancestors=[model("fresh", fresh, seed=1)])


def test_a_run_says_who_had_what(capsys: pytest.CaptureFixture[str]) -> None:
    veiltune = runner(capsys)
    path = finished()
    output = path.parent / "out"
    if not output.exists():
        assert veiltune("tune", str(path)).code == 0
    record = json.loads((output / "result.json").read_text(encoding="utf-8"))
    assert list(record["labels"]["public_ancestors"].values()) == ["not comparable"]
    shown = veiltune("inspect", str(output), "--json").json
    by_name = {each["observer"]: each for each in shown["observers"]}
    assert set(by_name) == {"host", "provider", "owner", "enclave", "network"}
    host = by_name["host"]
    assert {each["kind"] for each in host["received"]} == set(record["cost"]["bytes"]["enclave->host"])
    assert host["revealed_param_share"] == record["cost"]["revealed_param_share"]["host"]
    assert any("Q, K and V" in line for line in host["besides"])
    assert not any(each["form"] in {"clear", "masked"} for each in by_name["provider"]["received"])
    total = sum(size for kinds in record["cost"]["bytes"].values() for size in kinds.values())
    assert sum(each["num_bytes"] for each in by_name["network"]["received"]) == total
    text = " ".join(veiltune("inspect", str(output)).err.split())
    assert "SIMULATED ENCLAVE" in text
    assert "no attack on what it saw was measured" in text
    assert "not encrypted" in text


def test_options_of_a_model_are_refused_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    veiltune = runner(capsys)
    directory = helpers.scratch() / "only-a-record"
    directory.mkdir()
    (directory / "result.json").write_text("{}", encoding="utf-8")
    ran = veiltune("inspect", str(directory), "--placement", "paper")
    assert ran.code == 2
    assert "is a run" in ran.err


def test_no_checkpoint_is_protected_that_an_ancestor_opens(tmp_path: Path) -> None:
    ancestor = model("noise0.1", noisy(0.1), seed=1)
    named = f'provider.public_ancestors=["{ancestor}"]'
    with pytest.raises(VeiltuneError, match="nothing was sent"):
        protect_model(model("plain", same), tmp_path / "made", overrides=[named])
    assert not (tmp_path / "made").exists()
    allowed = [named, "provider.allow_public_ancestor=true"]
    assert protect_model(model("plain", same), tmp_path / "made", overrides=allowed).shards > 0
