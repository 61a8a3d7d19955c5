"""What the host gets to see: nothing of the model or the text but what the design's table says, shown over recorded runs.

The detector looks at every row of every tensor in the host's transcript and files (both orientations of a matrix) and
reports the plain rows it equals, up to scale and sign, or up to the order of their entries. It is tried out on planted
copies, and on runs whose keys are the identity, where it must find what the real keys hide.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from helpers import (
    always_crosses,
    exported_adapter,
    make_config,
    model_directory,
    own_cache,
    peft_model,
    plain_model,
    plain_states,
    remove_keys,
    run,
    tensors_of,
    texts_of,
    transcripts,
    write_examples,
)
from veiltune.config import Config, LoraConfig
from veiltune.data import load_examples, tokenize
from veiltune.designs import DESIGNS
from veiltune.errors import VeiltuneError
from veiltune.models.adapters import initial_factors
from veiltune.models.random_weights import byte_tokenizer
from veiltune.parties.party import Job
from veiltune.secrets import MasterSecret
from veiltune.tee.sealing import SIMULATED_KEY_FILE, SealingKey
from veiltune.transport.messages import Factors, Message, TrunkShard

PROMPT = "Whisper this to nobody: the fish is green."
KEY_SEED = 11
SETTINGS = {
    "compact-enclave": ("gpt2", "compact", "enclave"),
    "compact-host": ("qwen3", "compact", "host"),
    "paper-enclave": ("llama-tied-biased", "paper", "enclave"),
    "paper-host": ("opt", "paper", "host"),
}
BLOCK = 64  # secret rows compared at a time
MIN_WIDTH = 16
"""Shorter rows are not compared: among a million pairs of rows of so many numbers none is alike by accident."""


# --- the detector -----------------------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's rows, and its columns if it is a matrix, each as (rows, width) in float64."""
    if tensor.dim() == 0 or not tensor.is_floating_point():
        return
    matrix = tensor.detach().double().reshape(-1, tensor.shape[-1])
    for candidate in (matrix, matrix.T) if tensor.dim() == 2 else (matrix,):
        if candidate.shape[1] >= MIN_WIDTH:
            yield candidate


def units(rows: Tensor) -> Tensor:
    """Rows of length 1, without zero rows."""
    norms = rows.norm(dim=1)
    return rows[norms > 0] / norms[norms > 0, None]


def stacked(tensors: Iterable[tuple[str, Tensor]]) -> dict[int, tuple[Tensor, list[str]]]:
    """All rows by width, and the name of each."""
    found: dict[int, list[tuple[Tensor, str]]] = {}
    for name, tensor in tensors:
        for rows in rows_of(tensor):
            found.setdefault(rows.shape[1], []).append((units(rows), name))
    return {
        width: (torch.cat([rows for rows, _ in parts]), [name for rows, name in parts for _ in range(len(rows))])
        for width, parts in found.items()
    }


def leaks(seen: Iterable[tuple[str, Tensor]], secrets: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Names of the secret tensors of which a row was seen: scaled (|cosine| > 0.9999), or with its entries in another order.

    For the latter sorted rows are compared. Sorted rows of one distribution are all alike (cosine 0.99), so what counts
    is equality to a thousandth.
    """
    views, names = stacked(seen), set()
    for width, (wanted, labels) in stacked(secrets).items():
        if width not in views:
            continue
        rows = torch.unique(views[width][0], dim=0)
        orders = rows.sort(1).values
        for start in range(0, len(wanted), BLOCK):
            part = wanted[start : start + BLOCK]
            ordered = part.sort(1).values
            hit = (part @ rows.T).abs().amax(1) > 0.9999
            for arranged in (ordered, -ordered.flip(1)):
                hit |= (arranged @ orders.T).amax(1) > 1 - 5e-7  # ‖a - b‖² = 2 - 2·cosine: a distance of 1e-3
            names |= {labels[start + i] for i in torch.nonzero(hit).flatten().tolist()}
    return names


@pytest.mark.parametrize(
    "plant",
    [
        lambda x: x,
        lambda x: -3.0 * x,
        lambda x: x * torch.linspace(1, 2, len(x), dtype=x.dtype)[:, None],
        lambda x: x[torch.randperm(len(x))],
        lambda x: x[:, torch.randperm(x.shape[1])],
        lambda x: -x[:, torch.randperm(x.shape[1])] * 7,
        lambda x: x.T,
        lambda x: torch.cat([torch.randn(5, x.shape[1]), x[3:4]]).reshape(2, 3, -1),
        lambda x: x + 1e-3 * x.abs().mean() * torch.randn_like(x),
    ],
    ids=["copy", "scaled", "row by row", "rows", "columns", "columns and scale", "transposed", "one row", "noisy"],
)
def test_the_detector_finds_planted_copies(plant: Callable[[Tensor], Tensor]) -> None:
    secret = torch.randn(40, 32)
    assert leaks([("seen", plant(secret))], [("secret", secret)]) == {"secret"}


def test_the_detector_is_silent_about_rotations_products_and_strangers() -> None:
    secret = torch.randn(400, 32)
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    strangers = [
        ("rotated", secret @ rotation),
        ("other", torch.randn(4000, 32)),
        ("gram", secret[:32] @ secret[:32].T),
    ]
    assert leaks(strangers, [("secret", secret)]) == set()


# --- recorded runs ----------------------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """A run with everything its host saw, and what it must not see."""

    model: str
    placement: str
    optimizer_at: str
    config: Config
    output: Path
    messages: list[Message]
    seen: list[tuple[str, Tensor]]

    @property
    def texts(self) -> list[str]:
        return [*texts_of(self.output.parent / "train.jsonl"), *texts_of(self.output.parent / "held_out.jsonl"), PROMPT]


def record(name: str, directory: Path) -> Recorded:
    """Tune with evaluation and a checkpoint, then generate from the checkpoint; the host's view of both."""
    model, placement, optimizer_at = SETTINGS[name]
    write_examples(directory / "train.jsonl", 12)
    write_examples(directory / "held_out.jsonl", 4, seed=9)
    output = directory / "run"
    config = make_config(
        "obfuscatune",
        model,
        output,
        data={"train": str(directory / "train.jsonl"), "validation": str(directory / "held_out.jsonl")},
        train={"optimizer": "adamw", "learning_rate": 1e-2, "steps": 3, "evaluate_every": 2, "accumulate": 2},
        evaluate={"tasks": [str(write_task(directory))], "limit": 2},
        session={"record": ["host", "owner"]},
        obfuscatune={"placement": placement, "optimizer_at": optimizer_at, "key_seed": KEY_SEED},
    )
    run(config, "tune")
    run(config, Job(verb="generate", prompt=PROMPT, settings={"do_sample": False, "max_new_tokens": 6}), resume=True)
    messages = [message for _, message in transcripts(output, "host")]
    seen = [(type(message).__name__, value) for message in messages for _, value in tensors_of(message)]
    for path in (output / "parties" / "host").glob("*.safetensors"):
        seen += [(f"file:{tensor}", value) for tensor, value in load_file(path).items()]
    seen += [(f"product:{n}", v) for m in messages if isinstance(m, Factors) for n, v in products(m.tensors)]
    return Recorded(model, placement, optimizer_at, config, output, messages, seen)


def write_task(directory: Path) -> Path:
    """A multiple-choice task in the harness's own format."""
    rows = [{"question": f"What is {n}?", "options": ["a number", "a colour"], "answer": 0} for n in range(3)]
    (directory / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "tiny_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    path = directory / "tiny_choices.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")
    return path


def products(factors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The update that each pair of factors makes, as rows along the side that meets the key, and as one long row.

    Along the other side every row is a sum of the ``rank`` rows of the factor that is in the clear: four of them span so
    little that some are alike by accident.
    """
    for name, value in factors.items():
        path, _, which = name.removesuffix(".weight").rpartition(".")
        second = factors[name.replace("lora_A", "lora_B")]
        if which == "lora_A" and bool(second.any()):
            product = second.double() @ value.double()
            yield path, (product if is_input_side(path) else product.T)[None]
            yield path, product.flatten()[None, None]


@pytest.fixture(scope="module", params=SETTINGS)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=SETTINGS)
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The same run with keys that hide nothing."""
    with pytest.MonkeyPatch.context() as patch:
        remove_keys(patch)
        return record(request.param, tmp_path_factory.mktemp("bare-" + request.param))


def is_input_side(path: str) -> bool:
    """Which side of the cut a linear is on, by the names people know."""
    return path.rpartition(".")[2] in {
        "c_attn", "c_fc", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1",
    }  # fmt: skip


def linear_names(model: Any) -> set[str]:
    """Paths of the linears inside the blocks of a plain model."""
    return {
        path
        for path, module in model.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D"} and any(part.isdigit() for part in path.split("."))
    }


def secret_tensors(run: Recorded) -> list[tuple[str, Tensor]]:
    """What the host must not see: weights, states, their gradients, the adapter. Names begin with the kind."""
    plain, adapted = plain_model(run.model), peft_model(run.model, run.output)
    found = [(f"weight:{name}", value) for name, value in plain.named_parameters() if value.dim() == 2]
    with own_cache():
        train = load_examples(str(run.output.parent / "train.jsonl"))
        held_out = load_examples(str(run.output.parent / "held_out.jsonl"))
    tokenizer = byte_tokenizer()
    for number, example in enumerate([train[0], train[5], held_out[0]]):
        ids = torch.tensor([tokenize(example, tokenizer, 64).input_ids])
        for model in (plain, adapted):  # the first step's states, and those at the end
            states = plain_states(model, ids, gradients=number == 0)
            found += states.items()
    final = {n.removeprefix("base_model.model."): v for n, v in exported_adapter(run.output).items()}
    fans = {
        n.removesuffix(".lora_A.weight"): (v.shape[1], final[n.replace("lora_A", "lora_B")].shape[0])
        for n, v in final.items()
        if "lora_A" in n
    }
    first = initial_factors(fans, LoraConfig(rank=4, init_seed=1), torch.float32)
    for factors in (first, final):
        for name, value in factors.items():
            if is_input_side(name.partition(".lora_")[0]) == ("lora_A" in name) and bool(value.any()):
                found.append((f"factor:{name}", value))
    found += [(f"product:{path}", value) for path, value in products(final)]
    return found


def kinds(names: Iterable[str]) -> set[str]:
    return {name.partition(":")[0] for name in names}


def test_the_host_sees_no_plain_state_weight_or_adapter(recorded: Recorded) -> None:
    secrets = secret_tensors(recorded)
    assert kinds(name for name, _ in secrets) == {
        "weight", "embedding", "residual", "normed", "branch", "gradient", "factor", "product",
    }  # fmt: skip
    assert {type(message).__name__ for message in recorded.messages} >= {
        "SegmentForward",
        "SegmentBackward",
        "TrunkShard",
    }
    assert leaks(recorded.seen, secrets) == set()


def test_with_identity_keys_the_detector_finds_them_all(bare: Recorded) -> None:
    """Embeddings and residual states never enter a linear, so they stay hidden even then."""
    secrets = secret_tensors(bare)
    found = leaks(bare.seen, secrets)
    assert kinds(found) == {"weight", "normed", "branch", "gradient", "factor", "product"}
    for path in linear_names(plain_model(bare.model)):
        assert {f"weight:{path}.weight", f"product:{path}"} <= found, path


def test_of_the_vectors_the_host_sees_those_that_reveals_lists(recorded: Recorded) -> None:
    """In the clear: input-side biases, and QK-norm gains when compact. Not: output-side biases and the norms' gains."""
    plain = plain_model(recorded.model)
    vectors = {name: value for name, value in plain.named_parameters() if value.dim() == 1}
    expected = {name for name in vectors if name.endswith(".bias") and is_input_side(name.rpartition(".")[0])}
    if recorded.placement == "compact":
        expected |= {name for name in vectors if "q_norm" in name or "k_norm" in name}
    assert leaks(recorded.seen, ((name, value[None]) for name, value in vectors.items())) == expected
    assert (recorded.model != "qwen3") == any(name.endswith(".bias") for name in expected)
    listed = DESIGNS["obfuscatune"].reveals["host"]["TrunkShard"].what
    assert "input-side biases" in listed
    assert "QK-norm gains" in listed


def test_of_each_pair_the_host_sees_the_factor_that_reveals_lists(recorded: Recorded) -> None:
    final = {n.removeprefix("base_model.model."): v for n, v in exported_adapter(recorded.output).items()}
    clear = {n for n in final if is_input_side(n.partition(".lora_")[0]) == ("lora_B" in n)}
    assert len(clear) == len(final) / 2
    held = [message.tensors for message in recorded.messages if isinstance(message, Factors)]
    for name, value in final.items():
        seen = [tensors[name.removesuffix(".weight")] for tensors in held]
        assert any(torch.allclose(each, value, rtol=1e-4, atol=1e-6) for each in seen) == (name in clear), name


# --- bytes ------------------------------------------------------------------------------------------------------------


def holds(data: bytes, needles: Iterable[bytes]) -> bool:
    """Whether any of the needles (8 bytes or more) occurs in the data, at whatever offset."""
    wanted: dict[int, list[bytes]] = {}
    for needle in needles:
        wanted.setdefault(int.from_bytes(needle[:8], "little"), []).append(needle)
    heads = np.array(sorted(wanted), dtype="<u8")
    for offset in range(8):
        words = np.frombuffer(data, "<u8", count=(len(data) - offset) // 8, offset=offset)
        for index in np.flatnonzero(np.isin(words, heads)):
            at = offset + 8 * int(index)
            if any(data[at : at + len(needle)] == needle for needle in wanted[int(words[index])]):
                return True
    return False


def windows(values: bytes, size: int, step: int) -> Iterator[bytes]:
    yield from (values[i : i + size] for i in range(0, len(values) - size + 1, step))


def encodings(texts: Iterable[str]) -> Iterator[bytes]:
    """The texts as they might stand in a file: runs of 12 bytes of text, and of 6 token ids in any width."""
    for text in texts:
        raw = text.encode()
        yield from windows(raw, 12, 1)
        ids = torch.tensor(list(raw))
        for dtype in (torch.int64, torch.int32, torch.int16):
            size = dtype.itemsize
            yield from windows(ids.to(dtype).numpy().tobytes(), 6 * size, size)


def weight_bytes(model: Any) -> Iterator[bytes]:
    """Four numbers from the start of each row of each matrix."""
    for value in model.parameters():
        if value.dim() == 2:
            yield from (row[:4].numpy().tobytes() for row in value.detach())


def host_files(run: Recorded) -> Iterator[Path]:
    yield from (run.output / "transcript").glob("host*.vtt")
    yield from (path for path in (run.output / "parties" / "host").rglob("*") if path.is_file())


def test_no_byte_of_text_token_weight_or_key_is_among_what_the_host_has(recorded: Recorded) -> None:
    secret = MasterSecret.for_tests(KEY_SEED).reveal()
    sealing = (recorded.output / "parties" / "enclave" / SIMULATED_KEY_FILE).read_bytes()
    needles = [
        *encodings(recorded.texts), *weight_bytes(plain_model(recorded.model)),
        secret, secret.hex().encode(), sealing, sealing.hex().encode(),
    ]  # fmt: skip
    paths = list(host_files(recorded))
    assert {path.suffix for path in paths} == {".vtt", ".safetensors"}
    for path in paths:
        assert not holds(path.read_bytes(), needles), path.name
    # the same search finds the text in the owner's transcript, so it can find something
    owner = b"".join(path.read_bytes() for path in (recorded.output / "transcript").glob("owner*.vtt"))
    assert holds(owner, encodings(recorded.texts[:1]))
    weights = b"".join(p.read_bytes() for p in Path(model_directory(recorded.model)).glob("*.safetensors"))
    assert holds(weights, weight_bytes(plain_model(recorded.model)))


def test_the_host_gets_no_integers(recorded: Recorded) -> None:
    """Token ids are integers, and so are labels: no tensor of whole numbers crosses but masks of zeros and ones."""
    for kind, value in recorded.seen:
        if not value.is_floating_point():
            assert kind in {"PassContext", "file:rng"}
            assert kind != "PassContext" or value.dtype == torch.bool
        elif value.numel() > 8:
            assert not torch.equal(value, value.round()) or not bool((value.abs() > 1).any()), kind


def test_enclave_state_on_disk_is_sealed(recorded: Recorded) -> None:
    directory = recorded.output / "parties" / "enclave"
    files = {path.name for path in directory.iterdir()}
    assert files == {"step-00000003.sealed", SIMULATED_KEY_FILE}
    sealed = (directory / "step-00000003.sealed").read_bytes()
    assert not holds(sealed, [MasterSecret.for_tests(KEY_SEED).reveal(), SealingKey.load_or_create(directory).reveal()])
    assert b"lora_A" not in sealed


# --- the table of what is revealed ------------------------------------------------------------------------------------


def test_everything_that_crossed_is_listed_and_everything_listed_crosses(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Over a run with each place for the optimiser and a probe, the host gets every kind of its table, and no other."""
    reveals = DESIGNS["obfuscatune"].reveals
    met: dict[str, set[str]] = {role: set() for role in reveals}
    directories = [tmp_path / name for name in ("compact-enclave", "compact-host")]
    for directory in directories:
        directory.mkdir()
        traffic = record(directory.name, directory)
        for observer in ("host", "owner"):
            for entry, message in transcripts(traffic.output, observer):
                met[observer if entry.direction == "received" else entry.peer].add(type(message).__name__)
    config = make_config("obfuscatune", "gpt2", tmp_path / "probe")
    probe = Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 1})
    for pair, kinds_of_pair in run(config, probe).traffic.items():
        met[pair.partition("->")[2]] |= kinds_of_pair.keys()
    for observer, seen in met.items():
        assert seen <= reveals[observer].keys(), observer
        assert seen == always_crosses("obfuscatune", observer), observer


# --- secrets that are drawn anew --------------------------------------------------------------------------------------


def first_of(kind: type[Message], output: Path) -> dict[str, Tensor]:
    return next(m for _, m in transcripts(output, "host") if isinstance(m, kind)).tensors  # type: ignore[attr-defined]


@pytest.mark.parametrize("seeded", [False, True])
def test_first_factors_and_keys_are_drawn_anew_unless_seeded(tmp_path: Path, *, seeded: bool) -> None:
    """A host that knew A would have known rows under the key of each input side; a host that knew the key, everything."""
    options = {"key_seed": 3} if seeded else {}
    lora = {"init_seed": 5 if seeded else None}
    outputs = [tmp_path / "first", tmp_path / "second"]
    for output in outputs:
        config = make_config(
            "obfuscatune", "llama", output, lora=lora, session={"record": ["host"]}, obfuscatune=options
        )
        run(config, Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 1}))
    one, two = (first_of(Factors, output) for output in outputs)
    for name, value in one.items():
        if "lora_A" in name:
            assert torch.equal(value, two[name]) == seeded, name
            cosines = functional.cosine_similarity(value, two[name])
            assert seeded or float(cosines.abs().max()) < 0.9, name
    shards = [first_of(TrunkShard, output) for output in outputs]
    for name in shards[0]:
        assert torch.equal(shards[0][name], shards[1][name]) == seeded, name


def test_a_simulated_enclave_must_be_allowed(tmp_path: Path) -> None:
    config = make_config(
        "obfuscatune", "gpt2", tmp_path / "run", enclave={"allow_simulated": False}, session={"record": ["host"]}
    )
    with pytest.raises(VeiltuneError, match="the enclave is simulated") as caught:
        run(config, Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 1}))
    assert "allow_simulated" in str(caught.value.hint)
    assert caught.value.exit_code == 2
    assert not transcripts(tmp_path / "run", "host"), "something was sent before the enclave had proved itself"
