"""Protected equals plain: against `local`, and `local` against PEFT's own model. Tolerances as promised, from both sides."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from helpers import (
    FAMILY_NAMES,
    MODELS,
    PROBE_IDS,
    PROBE_STEPS,
    local_probe,
    make_config,
    plain_model,
    plain_states,
    relative_error,
    remove_keys,
    run,
    run_probe,
    transcripts,
    worst,
)
from veiltune.config import LoraConfig
from veiltune.designs import DESIGNS
from veiltune.models.adapters import initial_factors
from veiltune.models.families import find_family
from veiltune.parties.party import Job
from veiltune.privacy.bounds import error_bound, product_bound
from veiltune.privacy.orthogonal import make_key
from veiltune.secrets import MasterSecret
from veiltune.transport.messages import SegmentForward

PLACEMENTS = ("compact", "paper")
LIMITS = {
    "float32": {"logits": 1e-5, "loss": 1e-6, "gradients": 1e-4},
    "float64": {"logits": 1e-10, "loss": 1e-10, "gradients": 1e-10},
}
CLAIMS = [n for n, d in DESIGNS.items() if "placement" in d.options.model_fields and d.is_exact(d.options())]
CASES = [
    *itertools.product(CLAIMS, MODELS, PLACEMENTS, ["float32"]),
    *itertools.product(CLAIMS, FAMILY_NAMES, PLACEMENTS, ["float64"]),
]
GREEDY = {
    "do_sample": False,
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "max_new_tokens": 36,
    "min_new_tokens": 36,
}
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0, "seed": 5, "max_new_tokens": 36, "min_new_tokens": 36}
PROMPT = "A prompt that nobody but its owner should see."


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        "logits": max(relative_error(actual[name], expected[name]) for name in ("logits", "logits_tuned")),
        "loss": float(((actual["losses"] - expected["losses"]) / expected["losses"]).abs().max()),
        "gradients": worst(actual, expected, "gradient:"),
        "adapter": worst(actual, expected, "adapter:"),
    }


@pytest.mark.parametrize(("design", "model", "placement", "dtype"), CASES)
def test_a_design_that_claims_exactness_equals_local(
    design: str, model: str, placement: str, dtype: str, tmp_path: Path
) -> None:
    expected = local_probe(model, dtype, generate=8)
    actual = run_probe(design, model, tmp_path / "run", dtype=dtype, generate=8, **{design: {"placement": placement}})
    found = errors(actual, expected)
    for quantity, limit in LIMITS[dtype].items():
        assert found[quantity] <= limit, quantity
    assert found["adapter"] <= LIMITS[dtype]["gradients"]
    assert actual["tokens"].tolist() == expected["tokens"].tolist()
    assert actual["logits"].dtype == getattr(torch, dtype)
    # the comparison is of something that moved, and the second factors have had their gradients
    assert relative_error(expected["logits_tuned"], expected["logits"]) > 1e-3
    assert all(bool(value.any()) for name, value in expected.items() if name.startswith(("gradient:", "adapter:")))


# --- `local` against PEFT's own model ---------------------------------------------------------------------------------

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_twin(model: str, dtype: torch.dtype) -> Any:
    """The slow twin: PEFT wraps what `transformers` loaded; the first factors are those that the seed gives."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    config = PeftLoraConfig(
        r=4, lora_alpha=32, target_modules=TARGETS.get(model, LLAMA_TARGETS), fan_in_fan_out=model == "gpt2"
    )
    wrapped = get_peft_model(plain_model(model, dtype), config)
    layers = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): value
        for name, value in wrapped.named_parameters()
        if name.endswith("lora_A.default.weight")
    }
    inner: Any = wrapped.base_model.model
    fans = {path: (int(value.shape[1]), int(inner.get_submodule(path).out_features)) for path, value in layers.items()}
    first = initial_factors(fans, LoraConfig(rank=4, init_seed=1), dtype)
    with torch.no_grad():
        for path, value in layers.items():
            assert first[f"{path}.lora_A"].abs().max() <= value.abs().max() * 1.5  # PEFT's own range
            value.copy_(first[f"{path}.lora_A"])
    return wrapped


def twin_probe(model: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """`run_probe` in plain PyTorch."""
    wrapped = peft_twin(model, dtype)
    ids = torch.tensor(PROBE_IDS)
    factors = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD(factors.values(), lr=0.1)
    with torch.no_grad():
        found = {"logits": wrapped(input_ids=ids).logits}
    losses: list[float] = []
    for _ in range(PROBE_STEPS):
        optimizer.zero_grad()
        logits = wrapped(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = {name: value.grad.clone() for name, value in factors.items()}
        optimizer.step()
    with torch.no_grad():
        found["logits_tuned"] = wrapped(input_ids=ids).logits
    for name, value in factors.items():
        flat = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        found |= {f"gradient:{flat}": gradients[name], f"adapter:{flat}": value.detach()}
    return found | {"losses": torch.tensor(losses, dtype=torch.float64)}


@pytest.mark.parametrize("model", FAMILY_NAMES)
def test_local_equals_pefts_own_model(model: str) -> None:
    expected, actual = twin_probe(model, torch.float64), local_probe(model, "float64", generate=8)
    found = errors({name: actual[name] for name in [*expected]}, expected)
    assert {name.partition(":")[0] for name in actual} - {"tokens"} == {name.partition(":")[0] for name in expected}
    assert sum(name.startswith("adapter:") for name in actual) == sum(name.startswith("adapter:") for name in expected)
    assert max(found.values()) < 1e-12, found


# --- generation with the cache ----------------------------------------------------------------------------------------


def generated(design: str, model: str, output: Path, settings: dict[str, Any], **tables: Any) -> list[int]:
    job = Job(verb="generate", prompt=PROMPT, settings=settings)
    return run(make_config(design, model, output, **tables), job).owner["generated"]["tokens"]


def plain_generation(model: str, settings: dict[str, Any]) -> list[int]:
    """`transformers` alone, with the prompt as the models' chat template renders it."""
    from transformers import AutoTokenizer

    plain = plain_model(model)
    tokenizer: Any = AutoTokenizer.from_pretrained(plain.name_or_path)
    turns = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    settings = {**settings, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if (seed := settings.pop("seed", None)) is not None:
        torch.manual_seed(seed)
    return plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model", [*FAMILY_NAMES, "mistral-window"])
def test_greedy_tokens_equal_those_of_transformers(model: str, placement: str, tmp_path: Path) -> None:
    expected = plain_generation(model, GREEDY)
    assert len(expected) == 36
    assert len(set(expected)) > 8, "a constant answer would prove little"
    actual = generated("obfuscatune", model, tmp_path / "run", GREEDY, obfuscatune={"placement": placement})
    assert actual == expected


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_sampled_tokens_are_those_of_the_seed(model: str, tmp_path: Path) -> None:
    expected = plain_generation(model, SAMPLED)
    assert len(expected) == 36
    assert generated("obfuscatune", model, tmp_path / "same", SAMPLED) == expected
    assert generated("local", model, tmp_path / "local", SAMPLED) == expected
    assert generated("obfuscatune", model, tmp_path / "other", {**SAMPLED, "seed": 6}) != expected


# --- bounds: what κ costs ---------------------------------------------------------------------------------------------

WIDE = "random:llama:2,256,4,259"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Errors of one kind of key on a model wide enough for a Gaussian matrix to be ill-conditioned."""
    directory = tmp_path_factory.mktemp("wide")
    expected = run_probe("local", WIDE, directory / "local")
    seen: dict[tuple[tuple[str, Any], ...], dict[str, float]] = {}

    def measure(**options: Any) -> dict[str, float]:
        key = tuple(sorted(options.items()))
        if key not in seen:
            output = directory / str(len(seen))
            seen[key] = errors(run_probe("obfuscatune", WIDE, output, obfuscatune={"key_seed": 3, **options}), expected)
        return seen[key]

    measure.largest_logit = float(expected["logits"].abs().max())  # type: ignore[attr-defined]
    measure.loss = float(expected["losses"].min())  # type: ignore[attr-defined]
    return measure


def bound(quantity: str, condition_number: float, wide: Any) -> float:
    product = product_bound(256, condition_number, torch.finfo(torch.float32).eps)
    return error_bound(quantity, product, products=8, largest_logit=wide.largest_logit, loss=wide.loss)


@pytest.mark.parametrize("matrix", ["orthogonal", "butterfly"])
@pytest.mark.parametrize("quantity", ["logits", "loss", "gradients"])
def test_orthogonal_keys_stay_within_the_derived_bound(matrix: str, quantity: str, wide: Any) -> None:
    assert wide(matrix=matrix)[quantity] <= bound(quantity, 1.0, wide)


@pytest.mark.parametrize("quantity", ["logits", "loss", "gradients"])
def test_a_conditioned_key_stays_within_its_own_bound(quantity: str, wide: Any) -> None:
    assert wide(matrix="conditioned", condition_number=128.0)[quantity] <= bound(quantity, 128.0, wide)


@pytest.mark.parametrize("quantity", ["logits", "gradients"])
def test_gaussian_and_conditioned_keys_fail_the_orthogonal_bound(quantity: str, wide: Any) -> None:
    assert wide(matrix="gaussian")[quantity] > bound(quantity, 1.0, wide)
    # κ = 128 costs less than its bound allows, so it is compared with what κ = 1 costs
    assert wide(matrix="conditioned", condition_number=128.0)[quantity] > 5 * wide(matrix="orthogonal")[quantity]


def test_the_gaussian_key_is_ill_conditioned_and_not_claimed_exact() -> None:
    secret = MasterSecret.for_tests(3)
    assert make_key("gaussian", 256, secret, "k").condition_number > 100
    design = DESIGNS["obfuscatune"]
    assert not design.is_exact(design.options(matrix="gaussian"))
    assert design.is_exact(design.options(matrix="orthogonal"))


def test_under_bfloat16_the_orthogonal_key_serves_and_the_gaussian_does_not(tmp_path: Path) -> None:
    """Rounded as bfloat16, `local` errs by a few of its eps = 2⁻⁷; a Haar key by as much again, a Gaussian by far more."""
    precise = run_probe("local", WIDE, tmp_path / "precise")["logits"]
    plain = run_probe("local", WIDE, tmp_path / "local", dtype="bfloat16")["logits"]
    error = {"plain": relative_error(plain, precise)}
    for matrix in ("orthogonal", "gaussian"):
        options = {"matrix": matrix, "key_seed": 3}
        probe = run_probe("obfuscatune", WIDE, tmp_path / matrix, dtype="bfloat16", obfuscatune=options)
        error[matrix] = relative_error(probe["logits"], precise)
    assert 2**-12 < error["plain"] < 0.1, "bfloat16 was not imitated, or it was not bfloat16"
    assert error["orthogonal"] < 3 * error["plain"]
    assert error["gaussian"] > 5 * error["orthogonal"]


# --- with the keys off, the host's inputs are the plain model's -------------------------------------------------------


def seen_by_host(model: str, placement: Any, output: Path) -> list[Tensor]:
    """Masked states of one forward pass without gradients: what entered each input-side operation."""
    options = {"session": {"record": ["host"]}, "obfuscatune": {"placement": placement}}
    run_probe("obfuscatune", model, output, **options)
    family = find_family(plain_model(model).config)
    operations = family.operations(2, placement)
    forwards = [message for _, message in transcripts(output, "host") if isinstance(message, SegmentForward)]
    first_pass = forwards[: len(operations)]
    assert [message.segment for message in first_pass] == list(range(len(operations)))
    return [m.hidden.flatten(0, -2) for m, o in zip(first_pass, operations, strict=True) if o.part != "output"]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model", ["gpt2", "opt", "qwen3"])
def test_masked_states_are_the_plain_ones_if_and_only_if_the_key_is_the_identity(
    model: str, placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = plain_states(plain_model(model), torch.tensor(PROBE_IDS))
    blocks = [name for name in states if name.startswith("normed:") and any(part.isdigit() for part in name.split("."))]
    normed = [states[name] for name in blocks]  # in the order they ran: attention and MLP of each block
    assert len(normed) == 4
    masked = seen_by_host(model, placement, tmp_path / "masked")
    with monkeypatch.context() as patch:
        remove_keys(patch)
        bare = seen_by_host(model, placement, tmp_path / "bare")
    for plain, hidden, shown in zip(normed, masked, bare, strict=True):
        assert relative_error(shown, plain) < 1e-5
        assert relative_error(hidden, plain) > 0.1
        # a rotation keeps the Gram matrix; that is stated in `reveals`, and shows that these are the same states
        assert relative_error(hidden @ hidden.T, plain @ plain.T) < 1e-4
