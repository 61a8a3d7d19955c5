"""What several test modules share: tiny models, configurations, and whole sessions run in this process."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from veiltune.config import Config, load_config
from veiltune.designs import DESIGNS, option_tables
from veiltune.designs.base import OPENED_SERVICE
from veiltune.models.presets import random_config
from veiltune.models.random_weights import byte_tokenizer, write_random_weights
from veiltune.parties.party import Job
from veiltune.privacy.orthogonal import DenseKey, Key
from veiltune.secrets import MasterSecret
from veiltune.session import Outcome, Session, run_session
from veiltune.transport.messages import Message
from veiltune.transport.transcript import Record, read_transcript

SMALL = "2,32,4,259"
"""Layers, hidden width, heads, vocabulary of the tiny models."""

Variant = Callable[[Any], None]


# --- models -----------------------------------------------------------------------------------------------------------


def _with(**values: Any) -> Variant:
    def change(config: Any) -> None:
        for name, value in values.items():
            setattr(config, name, value)

    return change


MODELS: dict[str, tuple[str, Variant]] = {
    "gpt2": ("gpt2", _with()),
    "gpt2-untied": ("gpt2", _with(tie_word_embeddings=False)),
    "opt": ("opt", _with()),
    "opt-untied-bare": ("opt", _with(tie_word_embeddings=False, enable_bias=False)),
    "llama": ("llama", _with()),
    "llama-tied-biased": ("llama", _with(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", _with()),
    "mistral-window": ("mistral", _with(sliding_window=6)),
    "qwen2": ("qwen2", _with()),
    "qwen2-untied": ("qwen2", _with(tie_word_embeddings=False)),
    "qwen3": ("qwen3", _with()),
}
"""By name: a family of random models, and what is changed in its configuration.

As made, GPT-2 and OPT are tied and have biases everywhere, Llama and Mistral are neither tied nor have biases, Qwen2 is tied with
biases on Q, K and V, and Qwen3 is tied with QK-norm and heads wider than the hidden state.
"""

SPECIAL_MODELS: dict[str, tuple[str, Variant]] = {
    "gpt2-all-dropped": ("gpt2", _with(resid_pdrop=1.0)),
    "gpt2-attention-dropped": ("gpt2", _with(attn_pdrop=1.0)),
    "opt-all-dropped": ("opt", _with(dropout=1.0)),
}
"""Models whose training differs from their inference: all of a branch is dropped, so no draw is left to chance."""

FAMILY_NAMES = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3")


@cache
def scratch() -> Path:
    """A directory for models and the package's cache, shared by the whole run and removed at its end."""
    directory = Path(tempfile.mkdtemp(prefix="veiltune-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def own_cache() -> AbstractContextManager[Any]:
    """Keep what the package caches out of the user's home."""
    return mock.patch.dict(os.environ, {"VEILTUNE_CACHE": str(scratch() / "cache")})


@cache
def model_directory(name: str) -> str:
    """The folder of a tiny random model of `MODELS`."""
    family, change = (MODELS | SPECIAL_MODELS)[name]
    config = random_config(f"random:{family}:{SMALL}")
    change(config)
    directory = scratch() / name
    directory.mkdir()
    write_random_weights(config, directory, torch.float32)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def plain_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model as `transformers` loads it, without anything of ours."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory(name), dtype=dtype, attn_implementation="sdpa")
    return model.eval()


# --- configurations and sessions --------------------------------------------------------------------------------------


def make_config(design: str, model: str, output: Path, **tables: Any) -> Config:
    """A configuration for tests: threads, the simulated enclave allowed, tables merged over small defaults."""
    values: dict[str, Any] = {
        "design": design,
        "model": model_directory(model) if model in MODELS | SPECIAL_MODELS else model,
        "output": str(output),
        "device": "cpu",
        "data": {"max_length": 64},
        "lora": {"rank": 4, "init_seed": 1},
        "train": {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 4},
        "enclave": {"allow_simulated": True},
        "session": {"processes": False},
        "veil": {"sandwich_norms": "open"},
    }
    for name, value in tables.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
    return load_config(values, options=option_tables())


def run(config: Config, job: Job | str, **arguments: Any) -> Outcome:
    """Run one session; a string is a job's verb."""
    with own_cache():
        return run_session(config, Job(verb=job) if isinstance(job, str) else job, **arguments)  # pyrefly: ignore


def run_with(config: Config, job: Job, on_event: Callable[[Session, str, dict[str, Any]], None]) -> Outcome:
    """Run one session whose observer is handed the session too."""
    from veiltune.session.run import prepare_output

    with own_cache():
        prepare_output(config, resume=False, overwrite=False)
        session = Session(config, job, lambda name, fields: on_event(session, name, fields))
        return session.run()


def token_ids(batch: int, length: int, *, seed: int = 0, below: int = 256) -> list[list[int]]:
    """Pseudo-random token ids."""
    draw = random.Random(seed)
    return [[draw.randrange(below) for _ in range(length)] for _ in range(batch)]


PROBE_IDS = token_ids(2, 12)
PROBE_STEPS = 3


def run_probe(design: str, model: str, output: Path, *, generate: int = 0, **tables: Any) -> dict[str, Tensor]:
    """Logits, losses and gradients over a few SGD steps, the adapter, and greedy tokens, under one design."""
    config = make_config(design, model, output, **tables)
    job = Job(verb="probe", probe={"input_ids": PROBE_IDS, "steps": PROBE_STEPS, "generate": generate})
    run(config, job)
    return load_file(output / "parties" / "owner" / "probe.safetensors")


@cache
def local_probe(model: str, dtype: str, generate: int = 0) -> dict[str, Tensor]:
    """What `local` gives for `run_probe`'s defaults: the yardstick of many tests, computed once."""
    output = scratch() / f"local-{model}-{dtype}-{generate}"
    return run_probe("local", model, output, generate=generate, dtype=dtype)


def tuned(config: Config, **arguments: Any) -> dict[str, Any]:
    """Run ``tune`` and return the owner's history."""
    return run(config, "tune", **arguments).owner["history"]


def exported_adapter(output: Path) -> dict[str, Tensor]:
    """The adapter a run left, by PEFT's names."""
    return load_file(output / "adapter" / "adapter_model.safetensors")


def peft_model(name: str, output: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The plain model with the adapter that a run exported, put together by PEFT alone."""
    from peft import PeftModel

    return PeftModel.from_pretrained(plain_model(name, dtype), str(output / "adapter")).eval()


def always_crosses(design: str, observer: str) -> set[str]:
    """Kinds of message that an observer gets in a session of this machine, whatever was agreed on.

    Services open sessions with words of their own (test_enclave_services); who gets the adapter is agreed on
    (test_adapter_release); a key crosses where the enclave has a sealed copy of the weights (test_sealed_copy).
    """
    by_choice = {"provider": {"AdapterTensors"}, "enclave": {"HandOver", "ModelKey"}}.get(observer, set())
    return set(DESIGNS[design].reveals[observer]) - OPENED_SERVICE.keys() - by_choice


# --- data -------------------------------------------------------------------------------------------------------------

_COLOURS = ("red", "green", "blue", "white", "black")
_THINGS = ("cat", "dog", "bird", "fish", "horse", "mouse")


def write_examples(path: Path, count: int = 24, *, seed: int = 0) -> Path:
    """A learnable task: the answer names the colour that the sentence gives the animal. One JSON object a line."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            colour, thing = draw.choice(_COLOURS), draw.choice(_THINGS)
            row = {"prompt": f"The {thing} is {colour}. What colour is it?", "completion": f" {colour}"}
            file.write(json.dumps(row) + "\n")
    return path


def texts_of(path: Path) -> list[str]:
    """Every text of a file of `write_examples`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] for row in rows]


# --- keys and transcripts ---------------------------------------------------------------------------------------------


class IdentityKey(DenseKey):
    """A key that hides nothing: the control of every test of secrecy."""

    kind = "identity"

    def _draw(self) -> tuple[Tensor, ...]:
        return (torch.eye(self.dim, dtype=torch.float64),)


def identity_key(_kind: str, dim: int, secret: MasterSecret, label: str, _condition: float | None = None) -> Key:
    """Stands in for `make_key`."""
    return IdentityKey(dim, secret, label)


def remove_keys(monkeypatch: Any) -> None:
    """From here on the enclave of `obfuscatune` masks by the identity."""
    from veiltune.designs.obfuscatune import enclave

    monkeypatch.setattr(enclave, "make_key", identity_key)


def transcripts(output: Path, observer: str) -> list[tuple[Record, Message]]:
    """Everything an observer saw in the runs of this output directory, in order."""
    paths = sorted((output / "transcript").glob(f"{observer}*.vtt"), key=lambda path: (len(path.name), path.name))
    return [entry for path in paths for entry in read_transcript(path)]


def tensors_of(message: Message) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a message, with the name of its field (and its own name, where it has one)."""
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
        elif isinstance(value, tuple):
            yield from ((f"{field.name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, Tensor))
        elif isinstance(value, Mapping):
            yield from ((f"{field.name}[{n}]", item) for n, item in value.items() if isinstance(item, Tensor))


OUTPUT_SIDE = ("c_proj", "out_proj", "o_proj", "down_proj", "fc2")


def _kind_of_state(path: str, module: Any) -> str | None:
    """What the output of a module is to the residual stream, told by names that know nothing of our cuts."""
    leaf = path.rpartition(".")[2]
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if leaf.isdigit():
        return "residual"
    if "Norm" in type(module).__name__ and leaf not in {"q_norm", "k_norm"}:
        return "normed"
    return "branch" if leaf in OUTPUT_SIDE else None


def _keep_states(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    """A forward hook: the output under ``name``; for a block also its input, for a branch also what it is without its bias."""

    def hook(module: Any, inputs: Any, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output
        if name.startswith("residual"):
            found[f"{name}:in"] = inputs[0]
        if name.startswith("branch") and getattr(module, "bias", None) is not None:
            found[f"{name}:unbiased"] = found[name].detach() - module.bias.detach()
        for state in (found[name], *inputs[:1]):
            if state.requires_grad:
                state.retain_grad()

    return hook


def plain_states(model: Any, ids: Tensor, *, gradients: bool = False) -> dict[str, Tensor]:
    """Every state of the residual stream's width that a plain model makes of these tokens.

    Names begin with what they are: ``embedding``, ``residual`` (before and after each block), ``normed``, ``branch`` (what is
    added to the stream), and with ``gradients`` also ``gradient`` of each of these under a loss on every token.
    """
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(_keep_states(found, f"{kind}:{path}"))
        for path, module in model.named_modules()
        if (kind := _kind_of_state(path, module)) is not None
    ]
    model.requires_grad_(gradients)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    states = {name: value.detach().flatten(0, -2) for name, value in found.items()}
    if gradients:
        output.loss.backward()
        states |= {f"gradient:{n}": v.grad.flatten(0, -2) for n, v in found.items() if v.grad is not None}
    return states


# --- comparison -------------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value (0 where both are zero)."""
    assert actual.shape == expected.shape
    difference = float((actual.double() - expected.double()).abs().max())
    largest = float(expected.double().abs().max())
    return 0.0 if difference == 0.0 else difference / largest if largest else float("inf")


def worst(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str) -> float:
    """The largest `relative_error` over the tensors whose names begin with ``prefix``."""
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    assert names == [name for name in actual if name.startswith(prefix)]
    return max(relative_error(actual[name], expected[name]) for name in names)


def close_sequences(actual: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference of two sequences of equal length."""
    assert len(actual) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True))


def flipped(data: bytes, at: int, mask: int = 1) -> bytes:
    """The bytes with some bits of one of them turned over."""
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
