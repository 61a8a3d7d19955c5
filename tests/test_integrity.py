"""The enclave catches a host that computes something else than it was asked, and never accuses one that does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import make_config, run, tuned, write_examples
from veiltune.errors import IntegrityError
from veiltune.evaluation.record import result_of
from veiltune.models.rotated import RotatedTrunk
from veiltune.models.trunk import HostTrunk
from veiltune.parties.enclaved import HostSession
from veiltune.parties.enclaved.checks import Sampler, answers_to_catch
from veiltune.parties.enclaved.sealed_trunk import SealedTrunk
from veiltune.parties.party import Job
from veiltune.privacy.freivalds import LAMBDA, VECTORS, FactorProjections, Image, Lora, excess
from veiltune.secrets import MasterSecret
from veiltune.session.run import PartyFailure
from veiltune.transport.messages import FactorGradients

DTYPES = [torch.float32, torch.float64]
PAPER = {"placement": "paper"}
SEEDED = {"key_seed": 1}


# --- the check of a product -------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def image_of(weight: Tensor, bias: Tensor | None = None, *, seed: int = 9) -> Image:
    return Image(weight, drawn(weight.shape[1], VECTORS, seed=seed, dtype=torch.float64), bias)


def lora_of(fan_in: int, fan_out: int, dtype: torch.dtype) -> Lora:
    return Lora(drawn(3, fan_in, seed=4, dtype=dtype), drawn(fan_out, 3, seed=5, dtype=dtype), 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    rows=st.integers(1, 40),
    fan_in=st.integers(1, 200),
    fan_out=st.integers(1, 200),
    exponent=st.integers(-12, 12),
    mean=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_an_honest_product_is_never_refused(
    dtype: torch.dtype, rows: int, fan_in: int, fan_out: int, exponent: int, mean: float, seed: int
) -> None:
    """Of any shape and size; with a mean the roundings of long sums are largest."""
    x = ((drawn(rows, fan_in, seed=seed) + mean) * 10.0**exponent).to(dtype)
    weight = (drawn(fan_in, fan_out, seed=seed + 1) + mean).to(dtype)
    bias, lora = drawn(fan_out, seed=seed + 2, dtype=dtype), lora_of(fan_in, fan_out, dtype)
    y = x @ weight + bias + 2.0 * (x @ lora.down.T) @ lora.up.T
    assert excess(x, y, [(image_of(weight, bias), lora)]) < 0.5
    back = y @ weight.T + 2.0 * (y @ lora.up) @ lora.down
    assert excess(y, back, [(image_of(weight.T), lora.turned())]) < 0.5


def test_a_change_is_found_down_to_the_tolerance_that_is_stated() -> None:
    """The share that is missed against its bound, over fresh vectors."""
    x, weight, direction = drawn(1, 64, seed=1), drawn(64, 48, seed=2), drawn(1, 48, seed=3)
    y, trials, missed = x @ weight, 400, 0
    unit = torch.finfo(torch.float32).eps / 2
    size = 4 * LAMBDA * unit * float(x.norm() * image_of(weight).slack.mean())  # about four times τ
    changed = y + direction / direction.norm() * size
    for seed in range(trials):
        missed += excess(x, changed, [(image_of(weight, seed=seed), None)]) <= 1
    bound = (math.sqrt(2 / math.pi) / 4 * 1.3) ** VECTORS  # τ varies with the vectors by less than 30%
    assert missed / trials <= bound + 4 * math.sqrt(bound * (1 - bound) / trials)
    assert excess(x, y, [(image_of(weight), None)]) < 0.1


def test_what_is_left_out_of_a_product_is_missed_by_nobody() -> None:
    """Each of its parts, one row of many, a NaN; but no row that is too large to be judged."""
    x, weight, bias = drawn(30, 64, seed=1), drawn(64, 48, seed=2), drawn(48, seed=3)
    lora, image = lora_of(64, 48, torch.float32), image_of(weight, bias)
    update = 2.0 * (x @ lora.down.T) @ lora.up.T
    y = x @ weight + bias + update
    assert excess(x, y, [(image, lora)]) < 1
    for wrong in (y - update, y - bias, y * 1.01, y.roll(1, 0), y.where(torch.arange(30)[:, None] != 7, -y)):
        assert excess(x, wrong, [(image, lora)]) > 1
    assert excess(x, y.where(torch.arange(30)[:, None] != 7, torch.nan), [(image, lora)]) == math.inf
    assert excess(x, torch.full_like(y, torch.inf), [(image, lora)]) == math.inf
    assert excess(x * 1e35, torch.full_like(y, torch.inf), [(image, lora)]) == 0


def test_several_products_that_add_up_to_one_gradient_are_checked_together() -> None:
    vectors = drawn(16, VECTORS, seed=9, dtype=torch.float64)
    weights = [drawn(width, 16, seed=width) for width in (24, 8)]
    gradients = [drawn(10, width, seed=width + 1) for width in (24, 8)]
    parts: list[tuple[Image, Lora | None]] = [(Image(weight, vectors), None) for weight in weights]
    total = gradients[0] @ weights[0] + gradients[1] @ weights[1]
    assert excess(torch.cat(gradients, 1), total, parts) < 1
    assert excess(torch.cat(gradients, 1), gradients[0] @ weights[0], parts) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_factors_are_checked_over_several_passes(dtype: torch.dtype) -> None:
    lora = lora_of(40, 24, dtype)
    passes = [(drawn(3, 7, 40, seed=s, dtype=dtype), drawn(3, 7, 24, seed=s + 50, dtype=dtype)) for s in range(3)]
    projection = FactorProjections(
        drawn(24, VECTORS, seed=7, dtype=torch.float64), drawn(40, VECTORS, seed=8, dtype=torch.float64)
    )
    down, up = torch.zeros_like(lora.down), torch.zeros_like(lora.up)
    for x, g in passes:
        projection.add(x, g)
        flat_x, flat_g = x.reshape(-1, 40), g.reshape(-1, 24)
        up += 2.0 * flat_g.T @ (flat_x @ lora.down.T)
        down += 2.0 * (flat_g @ lora.up).T @ flat_x
    assert projection.excess(lora, down, up) < 0.5
    for wrong_down, wrong_up in ((down * 1.01, up), (down, up * 1.01), (down, -up), (down * math.nan, up)):
        assert projection.excess(lora, wrong_down, wrong_up) > 1
    single = up.clone()
    single[3, 1] *= 1.1
    assert projection.excess(lora, down, single) > 1


def test_what_is_secret_is_not_shown() -> None:
    image = image_of(drawn(4, 3, seed=1))
    assert "tensor" not in repr(image)
    assert "tensor" not in repr(Sampler(0.5, MasterSecret.for_tests(1)))


# --- which answers are checked ----------------------------------------------------------------------------------------


def test_the_share_that_is_drawn_is_the_share_that_is_asked_for() -> None:
    sampler = Sampler(0.1, MasterSecret.for_tests(2))
    drawn_ones = sum(sampler.chosen() for _ in range(4000))
    assert abs(drawn_ones - 400) < 5 * math.sqrt(4000 * 0.1 * 0.9)
    assert Sampler.of(0, None) is None
    assert all(Sampler(1, MasterSecret.generate()).chosen() for _ in range(100))


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_stated_number_of_answers_is_the_least_that_suffices(confidence: float) -> None:
    n = answers_to_catch(0.1, 0.01, confidence)
    assert 1 - (1 - 0.001) ** n >= confidence > 1 - (1 - 0.001) ** (n - 1)
    assert answers_to_catch(1, 1) == 1
    with pytest.raises(ValueError, match="nothing is ever caught"):
        answers_to_catch(0, 0.01)


# --- hosts that cheat -------------------------------------------------------------------------------------------------


class Cheat:
    """Changes a share of what a method of the host returns. ``calls``: how often it did."""

    def __init__(self, share: float, change: Callable[[Tensor], Tensor], seed: int = 0) -> None:
        self.share, self.change, self.calls = share, change, 0
        self.generator = torch.Generator().manual_seed(seed)

    def falsify(self, value: Tensor) -> Tensor:
        if float(torch.rand((), generator=self.generator)) >= self.share:
            return value
        self.calls += 1
        return self.change(value)

    def install(self, patch: pytest.MonkeyPatch, owner: type, method: str) -> None:
        honest = getattr(owner, method)

        def cheating(trunk: Any, request: Any) -> Any:
            answer = honest(trunk, request)
            if isinstance(answer, FactorGradients):
                return FactorGradients({name: self.falsify(value) for name, value in answer.tensors.items()})
            if isinstance(answer, tuple):
                return tuple(self.falsify(value) for value in answer)
            return None if answer is None else self.falsify(answer)

        patch.setattr(owner, method, cheating)


TRUNKS: dict[str, type] = {"obfuscatune": HostTrunk, "veil": RotatedTrunk}


def cheat_of_the_host_alone(cheat: Cheat, patch: pytest.MonkeyPatch, design: str, *methods: str) -> None:
    """The enclave computes by the same class, and is honest."""
    honest = TRUNKS[design]
    cheating = type("Cheating", (honest,), {method: getattr(honest, method) for method in methods})
    for method in methods:
        cheat.install(patch, cheating, method)
    patch.setattr(f"veiltune.designs.{design}.host.{honest.__name__}", cheating)


def half_more(value: Tensor) -> Tensor:
    return value * 1.5


def one_row_negated(value: Tensor) -> Tensor:
    changed = value.clone()
    changed.view(-1, changed.shape[-1])[0] *= -1
    return changed


def training(tmp_path: Path, design: str, model: str, steps: int, *, dtype: str = "float32", **options: Any) -> Any:
    data = write_examples(tmp_path / "train.jsonl", 8)
    train = {
        "steps": steps,
        "batch_size": 2,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "checkpoint_every": 1 if steps < 100 else 50,
    }
    tables = {design: {**SEEDED, **options}}
    return make_config(design, model, tmp_path / "run", dtype=dtype, data={"train": str(data)}, train=train, **tables)


def caught(config: Any) -> PartyFailure:
    with pytest.raises(PartyFailure) as found:
        run(config, "tune")
    assert (found.value.role, found.value.kind) == ("enclave", "IntegrityError")
    assert found.value.exit_code == IntegrityError.exit_code == 8
    assert "the host's" in str(found.value)
    assert "--resume" in str(found.value.hint)
    return found.value


def steps_done(output: Path) -> int:
    commit = output / "checkpoint.json"
    return int(json.loads(commit.read_text(encoding="utf-8"))["step"]) if commit.is_file() else 0


@pytest.mark.parametrize(
    ("owner", "method", "named"),
    [
        (HostTrunk, "forward", "output of"),
        (HostTrunk, "backward", "input gradient of"),
        (HostSession, "_gradients", "factor gradients of"),
    ],
)
@pytest.mark.parametrize("change", [half_more, one_row_negated])
def test_obfuscatune_finds_whatever_is_false_when_all_is_checked(
    owner: type, method: str, named: str, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheat = Cheat(1.0, change)
    cheat.install(monkeypatch, owner, method)
    failure = caught(training(tmp_path, "obfuscatune", "llama-tied-biased", 3, spot_checks=1.0, **PAPER))
    assert named in str(failure)
    assert steps_done(tmp_path / "run") <= 1  # factors B are 0 at first, and so are some gradients


@pytest.mark.parametrize("model", ["llama-tied-biased", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    ("method", "named"),
    [("forward", "output of"), ("backward", "input gradient of"), ("_gradients", "gradient of")],
)
@pytest.mark.parametrize("change", [half_more, one_row_negated])
def test_compact_segments_are_computed_again(
    model: str, method: str, named: str, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheat = Cheat(1.0, change)
    if method == "_gradients":
        cheat.install(monkeypatch, HostSession, method)
    else:
        cheat_of_the_host_alone(cheat, monkeypatch, "obfuscatune", method)
    failure = caught(training(tmp_path, "obfuscatune", model, 3, spot_checks=1.0))
    assert named in str(failure)
    assert steps_done(tmp_path / "run") <= 1


PRODUCTS_A_STEP = (
    2 * 7 + 7
)  # of two Llama blocks: q, k, v, o, gate, up, down; four input gradients a block, one of them not wanted


SEGMENTS_A_STEP = 4 + 3  # outputs, and gradients of all inputs but the first


@pytest.mark.parametrize(
    ("placement", "share", "answers"),
    [
        pytest.param("paper", 0.5, PRODUCTS_A_STEP, marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param("compact", 1.0, SEGMENTS_A_STEP, marks=[pytest.mark.slow, pytest.mark.ci]),
    ],
)
def test_obfuscatune_catches_a_host_that_falsifies_one_answer_in_a_hundred(
    placement: str, share: float, answers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the number of steps that the formula states for the share that is checked, at 99%."""
    steps = math.ceil(answers_to_catch(share, 0.01, 0.99) / answers)
    assert steps < 70
    cheat = Cheat(0.01, half_more)
    cheat_of_the_host_alone(cheat, monkeypatch, "obfuscatune", "forward", "backward")
    config = training(tmp_path, "obfuscatune", "llama", steps, spot_checks=share, placement=placement)
    failure = caught(config)
    assert cheat.calls >= 1
    done = steps_done(tmp_path / "run")
    assert done < steps, failure
    monkeypatch.undo()  # an honest host goes on from the last whole checkpoint
    history = tuned(config, resume=True)
    assert history["step"] == steps


def test_a_host_that_is_not_checked_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheat = Cheat(0.5, half_more)
    cheat.install(monkeypatch, HostTrunk, "forward")
    assert tuned(training(tmp_path, "obfuscatune", "llama", 2, **PAPER))["step"] == 2
    assert cheat.calls > 0


ALL_OF_A_COMPACT_STEP = {"gpt2": 2 * 8 + 7, "qwen3": 2 * 14 + 7}
"""Two factors of each linear, an output of each of four segments, and the gradient of all inputs but the first."""
HONEST: dict[str, tuple[str, str, dict[str, Any]]] = {
    "obfuscatune": ("obfuscatune", "gpt2", {"spot_checks": 1.0, **PAPER}),
    "obfuscatune-gaussian": ("obfuscatune", "qwen3", {"spot_checks": 1.0, "matrix": "gaussian", **PAPER}),
    "compact": ("obfuscatune", "gpt2", {"spot_checks": 0.5}),
    "compact-gaussian": ("obfuscatune", "qwen3", {"spot_checks": 0.5, "matrix": "gaussian"}),
    "veil": ("veil", "gpt2", {"canaries": 0.5}),
    "veil-all-inside": ("veil", "qwen3", {"canaries": 0.5, "enclave_layers": 0}),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("setting", HONEST)
def test_an_honest_host_is_not_accused_and_nothing_changes(setting: str, dtype: str, tmp_path: Path) -> None:
    """Training is the same to the last bit as without checks; figures say what they took."""
    design, model, options = HONEST[setting]
    steps = 5
    config = training(tmp_path, design, model, steps, dtype=dtype, **options)
    outcome = run(config, "tune")
    engine = outcome.owner["engine"]
    if options.get("placement") == "paper":
        # of each linear its output and two factors; of each operation but the first its gradient
        linears = {"gpt2": 8, "qwen3": 14}[model]
        assert engine["checks"] == steps * (3 * linears + 7)
    else:
        assert 0 < engine["checks"] < (steps if design == "veil" else ALL_OF_A_COMPACT_STEP[model] * steps)
    cost = result_of(config, outcome).cost.enclave
    assert (cost.checks, cost.check_seconds) == (engine["checks"], engine["check_seconds"])
    assert engine["check_seconds"] > 0
    assert not [path for kept in ("canaries", "checks") for path in (tmp_path / "run").rglob(kept)]
    (tmp_path / "plain").mkdir()
    unchecked = {name: value for name, value in options.items() if name not in {"spot_checks", "canaries"}}
    plain = run(training(tmp_path / "plain", design, model, steps, dtype=dtype, **unchecked), "tune")
    assert plain.owner["history"]["loss"] == outcome.owner["history"]["loss"]
    assert "checks" not in plain.owner["engine"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("setting", HONEST)
def test_an_honest_host_is_not_accused_in_two_hundred_steps(setting: str, dtype: str, tmp_path: Path) -> None:
    design, model, options = HONEST[setting]
    assert tuned(training(tmp_path, design, model, 200, dtype=dtype, **options))["step"] == 200


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("owner", "method", "named"),
    [
        (RotatedTrunk, "forward", "output of the trunk"),
        (RotatedTrunk, "backward", "gradient of the trunk's input"),
        (HostSession, "_gradients", "gradient of"),
    ],
)
def test_veil_finds_whatever_is_false_in_a_canary(
    model: str, owner: type, method: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheat = Cheat(1.0, half_more)
    if owner is RotatedTrunk:
        cheat_of_the_host_alone(cheat, monkeypatch, "veil", method)
    else:
        cheat.install(monkeypatch, owner, method)
    failure = caught(training(tmp_path, "veil", model, 3, canaries=1.0))
    assert named in str(failure)
    assert steps_done(tmp_path / "run") <= 1


def test_veil_catches_a_host_that_falsifies_one_row_in_a_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step has a false row then, so the step that is drawn first is the last."""
    cheat = Cheat(1.0, one_row_negated)  # of about 2·48 rows
    cheat_of_the_host_alone(cheat, monkeypatch, "veil", "forward")
    steps = answers_to_catch(0.3, 1.0, 0.99)
    assert steps == 13
    caught(training(tmp_path, "veil", "llama", steps, canaries=0.3))
    assert steps_done(tmp_path / "run") < steps


def test_evaluation_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes without a backward; what was altered on the enclave's disk does not pass for the trunk."""
    job = Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 0})
    config = make_config("veil", "llama", tmp_path / "honest", veil={"canaries": 1.0})
    assert run(config, job).owner["engine"]["checks"] == 2
    cheat_of_the_host_alone(Cheat(1.0, half_more), monkeypatch, "veil", "forward")
    with pytest.raises(PartyFailure, match="output of the trunk in pass 1 is not what it was asked for"):
        run(make_config("veil", "llama", tmp_path / "false", veil={"canaries": 1.0}), job)
    sealed = SealedTrunk(tmp_path / "sealed")
    sealed.keep(0, {"a": torch.ones(3)})
    sealed.keep(0, {"b": torch.zeros(2)})
    assert set(sealed.read(0)) == {"a", "b"}
    path = next((tmp_path / "sealed").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match="does not open"):
        sealed.read(0)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("setting", ["compact", "veil"])
def test_generations_are_checked_at_their_end(
    setting: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pass by pass through a KV cache; an honest host's tokens are those without checks, a false one is named."""
    design, option = {"compact": ("obfuscatune", "spot_checks"), "veil": ("veil", "canaries")}[setting]
    greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    job = Job(verb="generate", prompt="Hi there", settings=greedy)

    def answered(name: str, share: float) -> dict[str, Any]:
        return run(make_config(design, model, tmp_path / name, **{design: {**SEEDED, option: share}}), job).owner

    checked, believed = answered("checked", 1.0), answered("believed", 0.0)
    assert checked["generated"]["tokens"] == believed["generated"]["tokens"]
    # all passes of two attentions, and of two MLPs; or all passes of the trunk
    assert checked["engine"]["checks"] == {"compact": 4 * 6, "veil": 1}[setting]
    cheat = LaterCheat(1.0, half_more)
    cheat_of_the_host_alone(cheat, monkeypatch, design, "forward")
    with pytest.raises(PartyFailure, match="the host's output of") as found:
        answered("false", 1.0)
    assert found.value.kind == "IntegrityError"
    assert answered("false and believed", 0.0)["generated"]["text"] is not None


class LaterCheat(Cheat):
    """Honest in the prompt's pass."""

    def falsify(self, value: Tensor) -> Tensor:
        return value if value.shape[1] > 1 else super().falsify(value)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "options", "tables", "message"),
    [
        ("obfuscatune", {"spot_checks": 0.1, "optimizer_at": "host"}, {}, "only the host knows"),
        ("obfuscatune", {"spot_checks": 0.1, "optimizer_at": "host", **PAPER}, {}, "only the host knows"),
        ("obfuscatune", {"spot_checks": 0.1}, {"lora": {"dropout": 0.1}}, r"lora.dropout = 0.1"),
        ("obfuscatune", {"spot_checks": 0.1, **PAPER}, {"lora": {"dropout": 0.1}}, r"lora.dropout = 0.1"),
        ("obfuscatune", {"spot_checks": 0.1, **PAPER}, {"dtype": "bfloat16"}, "bfloat16"),
        ("veil", {"canaries": 0.1, "optimizer_at": "host"}, {}, "only the host knows"),
        ("veil", {"canaries": 0.1, "dropout": "rotated"}, {"lora": {"dropout": 0.1}}, r"lora.dropout = 0.1"),
        ("veil", {"canaries": 0.1}, {"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_what_cannot_be_checked_soundly_is_refused(
    design: str, options: dict[str, Any], tables: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = "llama"
    config = make_config(design, model, tmp_path / "run", **{design: options}, **tables)
    job = Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 1})
    with pytest.raises(PartyFailure, match=message) as found:
        run(config, job)
    assert found.value.exit_code == 2
    assert found.value.hint
