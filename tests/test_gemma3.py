"""Gemma 3, text, under every kind of cut: sandwich norms, QK-norm, windows in turn with full attention, scaled embeddings."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import PROBE_IDS, make_config, relative_error, run, run_probe, scratch, worst
from veiltune.errors import ModelError
from veiltune.models.accounting import shares
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.presets import PRESETS, random_config
from veiltune.models.random_weights import byte_tokenizer, parameter_shapes, write_random_weights
from veiltune.models.skeleton import config_from_json, empty_model
from veiltune.parties.party import Job

LAYERS, WINDOW = 4, 8


@cache
def directory() -> str:
    """Four blocks, windows of 8 tokens in turn with full attention, so that both kinds are in every part of a cut."""
    config = random_config(f"random:gemma3:{LAYERS},32,4,259")
    config.sliding_window = WINDOW
    target = scratch() / "gemma3-four"
    target.mkdir()
    write_random_weights(config, target, torch.float32)
    byte_tokenizer().save_pretrained(target)
    return str(target)


TRAIN = {"learning_rate": 0.02}
"""Steps that move the logits by a hundredth, and do not yet amplify rounding."""


@cache
def plain_probe() -> dict[str, Tensor]:
    return run_probe("local", directory(), scratch() / "gemma3-local", generate=24, train=TRAIN)


def plain_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory(), dtype=torch.float32, attn_implementation="sdpa").eval()


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert max(relative_error(found[name], expected[name]) for name in ("logits", "logits_tuned")) < 1e-5
    assert worst(found, expected, "gradient:") < 1e-4
    assert worst(found, expected, "adapter:") < 1e-4
    assert found["tokens"].tolist() == expected["tokens"].tolist()
    assert relative_error(expected["logits_tuned"], expected["logits"]) > 1e-2, "nothing was trained"


def test_the_description_is_of_what_transformers_builds() -> None:
    config = random_config(f"random:gemma3:{LAYERS},32,4,259")
    family, model = find_family(config), empty_model(config)
    block = model.get_submodule(f"{family.blocks}.0")
    norms = {name for name, module in block.named_modules() if "Norm" in type(module).__name__}
    described = {path for segment in family.segments for path in (segment.norm, segment.post_norm, *segment.exposed)}
    assert described == norms
    embedding: Any = model.get_submodule("model.embed_tokens")
    assert float(embedding.embed_scale) == pytest.approx(32**0.5)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2


def test_local_equals_transformers_alone(tmp_path: Path) -> None:
    with torch.no_grad():
        expected = plain_model()(input_ids=torch.tensor(PROBE_IDS)).logits
    assert relative_error(run_probe("local", directory(), tmp_path / "run")["logits"], expected) < 1e-6
    assert len(PROBE_IDS[0]) > WINDOW, "no token is outside a window"


@pytest.mark.parametrize("placement", ["compact", "paper"])
def test_obfuscatune_equals_local(placement: str, tmp_path: Path) -> None:
    expected = plain_probe()
    options = {"placement": placement}
    compare(
        run_probe("obfuscatune", directory(), tmp_path / "run", generate=24, train=TRAIN, obfuscatune=options), expected
    )


@pytest.mark.parametrize(("bottom", "top"), [(1, 1), (2, 1), (0, 2)])
def test_split_equals_local(bottom: int, top: int, tmp_path: Path) -> None:
    cut = {"bottom_layers": bottom, "top_layers": top}
    expected = run_probe(
        "local", directory(), tmp_path / "local", generate=24, train=TRAIN, cut=cut, local={"layers": "owner"}
    )
    compare(run_probe("split", directory(), tmp_path / "run", generate=24, train=TRAIN, cut=cut), expected)


@pytest.mark.parametrize(("layers", "top", "inner"), [(0, 0, True), (1, 0, True), (1, 2, False)])
def test_veil_equals_local(layers: int, top: int, *, inner: bool, tmp_path: Path) -> None:
    expected = plain_probe()
    options = {"enclave_layers": layers, "enclave_top_layers": top, "inner": inner}
    compare(run_probe("veil", directory(), tmp_path / "run", generate=24, train=TRAIN, veil=options), expected)


@pytest.mark.parametrize("design", ["local", "obfuscatune", "split"])
def test_generation_beyond_the_window_equals_transformers(design: str, tmp_path: Path) -> None:
    prompt = "A prompt that is longer than a window."
    settings = {"do_sample": False, "repetition_penalty": 2.0, "max_new_tokens": 24, "min_new_tokens": 24}
    tokenizer = byte_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    plain = plain_model().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **ends)
    cut = {"bottom_layers": 1, "top_layers": 1}
    job = Job(verb="generate", prompt=prompt, settings=settings)
    found = run(make_config(design, directory(), tmp_path / "run", cut=cut), job).owner["generated"]["tokens"]
    assert found == plain[0, ids.shape[1] :].tolist()
    assert len(set(found)) > 4


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"use_bidirectional_attention": True}, "both ways"),
        ({"attn_logit_softcapping": 50.0}, "scores are soft-capped at 50"),
        ({"final_logit_softcapping": 30.0}, "logits are soft-capped at 30"),
    ],
)
def test_a_variant_that_is_not_described_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        find_family(config_from_json({"model_type": "gemma3_text", **values}))
    find_family(config_from_json({"model_type": "gemma3_text"}))


def test_the_model_with_pictures_is_refused() -> None:
    with pytest.raises(ModelError, match="unsupported architecture 'gemma3'"):
        find_family(config_from_json({"model_type": "gemma3"}))


# --- published shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "millions"), [("gemma3-270m", 268.1), ("gemma3-1b", 999.9)])
def test_published_shapes_have_the_published_number_of_parameters(preset: str, millions: float) -> None:
    shapes = parameter_shapes(random_config(preset))
    assert preset in PRESETS
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_it_is_accounted_for_as_any_other() -> None:
    counted = shares(random_config("gemma3-1b"), "compact", 1, 128)
    assert 0.2 < counted.param_share < 0.4  # a vocabulary of 262,144 rows
    assert counted.crossings == 4 * 26


def test_both_kinds_of_layer_are_in_every_part() -> None:
    config = config_from_json({"model_type": "gemma3_text", "num_hidden_layers": 12})
    assert Cut.of(config, 2, 2).trunk == range(2, 10)
    kinds = list(itertools.islice(config.layer_types, 6))
    assert kinds == ["sliding_attention"] * 5 + ["full_attention"]
