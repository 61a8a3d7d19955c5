"""The table of designs: what each entry says, that channels enforce it, and one battery of jobs run over every design."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from helpers import (
    PROBE_IDS,
    SPECIAL_MODELS,
    local_probe,
    make_config,
    peft_model,
    plain_model,
    relative_error,
    run,
    run_probe,
    worst,
    write_examples,
)
from veiltune.data import collate, load_examples, tokenize
from veiltune.designs import DESIGNS
from veiltune.designs.obfuscatune import ObfuscaTuneOptions
from veiltune.designs.obfuscatune.host import Host
from veiltune.errors import ProtocolError
from veiltune.models.presets import PAD_ID
from veiltune.models.random_weights import byte_tokenizer
from veiltune.parties.party import Job
from veiltune.session import PartyFailure
from veiltune.session.launch import channel_options
from veiltune.transport.channel import memory_pair
from veiltune.transport.messages import MESSAGES, Factors, Forget, OptimizerStep, TrainBatch, TrunkShard

WIRE = {"activation_bits": 32, "gradient_bits": 32}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {}),
    "compact-enclave": ("obfuscatune", {"placement": "compact", "optimizer_at": "enclave"}),
    "compact-host": ("obfuscatune", {"placement": "compact", "optimizer_at": "host"}),
    "paper-enclave": ("obfuscatune", {"placement": "paper", "optimizer_at": "enclave"}),
    "paper-host": ("obfuscatune", {"placement": "paper", "optimizer_at": "host"}),
    "veil": ("veil", {}),
    "veil-bare": ("veil", {"enclave_layers": 0, "inner": False}),
    "split": ("split", {}),
    "split-recomputing": ("split", {"server": {"activations": "recompute"}}),
    "online": ("online", {"wire": WIRE, "decorrelation": {"alpha": 0.0}}),
    "gradfree": ("gradfree", {"wire": WIRE}),
    "offsite": ("offsite", {"emulator": {"layers": 1}}),
    "offline": (
        "offline",
        {"emulator": {"layers": 1, "compression": "none"}, "wire": WIRE, "decorrelation": {"alpha": 0.0}},
    ),
}
"""Every design, and every way it divides the work: a new design gets its lines here.

The models have two blocks. Where they are cut, one is the trunk's, and the emulator that keeps all of it is the trunk itself.
"""

settings_of = pytest.mark.parametrize("setting", SETTINGS)


def tables(setting: str) -> dict[str, Any]:
    design, options = SETTINGS[setting]
    top = design == "gradfree"  # of which the top alone is trained
    found: dict[str, Any] = {"cut": {"bottom_layers": 0 if top else 1, "top_layers": 1 if top else 0}}
    return {**found, design: options} if options else found


def baseline(setting: str) -> dict[str, Any]:
    """Tables of `local` that train what the setting trains."""
    return {**tables(setting), "local": dict(DESIGNS[SETTINGS[setting][0]].baseline)}


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_design_is_in_the_battery() -> None:
    assert {design for design, _ in SETTINGS.values()} == DESIGNS.keys()
    assert all(name == design.name for name, design in DESIGNS.items())


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_tables_name_real_messages_and_real_parties(design: Any) -> None:
    assert design.reveals.keys() == design.roles.keys()
    assert {role for link in design.links for role in link} == design.roles.keys()
    assert design.data_plane in design.links
    assert design.trainer in design.roles
    assert design.enclaves <= design.roles.keys()
    for observer, table in design.reveals.items():
        assert table.keys() <= MESSAGES.keys(), observer
        assert all(reveal.what and reveal.form in {"public", "clear", "masked", "control"} for reveal in table.values())
        assert design.may_receive(observer) == frozenset(table)


def test_nothing_that_identifies_text_or_weights_is_listed_for_the_host() -> None:
    table = DESIGNS["obfuscatune"].reveals["host"]
    forbidden = {
        "TrainBatch",
        "EvalBatch",
        "ScoreBatch",
        "LogitsRequest",
        "GenerateRequest",
        "WeightShard",
        "AdapterTensors",
    }
    assert not forbidden & table.keys()
    assert forbidden - {"AdapterTensors"} <= DESIGNS["local"].reveals["host"].keys()  # where there is nothing to hide


def without(kind: str, observer: str) -> Any:
    design = DESIGNS["obfuscatune"]
    table = {name: reveal for name, reveal in design.reveals[observer].items() if name != kind}
    return dataclasses.replace(design, reveals={**design.reveals, observer: table})


@pytest.mark.parametrize("kind", ["SegmentForward", "TrunkShard", "Factors"])
def test_a_message_that_is_not_listed_stops_the_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DESIGNS, "obfuscatune", without(kind, "host"))
    with pytest.raises(PartyFailure, match=f"the enclave may not send {kind} to the host") as caught:
        run_probe("obfuscatune", "gpt2", tmp_path / "run")
    assert caught.value.kind == "ProtocolError"
    assert caught.value.exit_code == ProtocolError.exit_code


def test_both_ends_of_a_link_refuse_what_is_not_listed() -> None:
    full, short = DESIGNS["obfuscatune"], without("Factors", "host")
    batch = TrainBatch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), torch.zeros(1, 2), 1)

    def link(sender: Any, receiver: Any) -> tuple[Any, Any]:
        return memory_pair(
            "enclave",
            "host",
            a_options=channel_options(sender, "enclave", "host", ()),
            b_options=channel_options(receiver, "host", "enclave", ()),
        )

    enclave, host = link(full, full)
    enclave.send(Factors({"a": torch.ones(2)}))
    assert isinstance(host.recv(timeout=1), Factors)
    with pytest.raises(ProtocolError, match="the enclave may not send TrainBatch to the host"):
        enclave.send(batch)
    with pytest.raises(ProtocolError, match="the host may not send TrunkShard to the enclave"):
        host.send(TrunkShard({}))
    enclave.send(Forget(0))  # a refusal leaves the link usable
    assert isinstance(host.recv(timeout=1), Forget)

    enclave, host = link(short, full)
    with pytest.raises(ProtocolError, match="may not send Factors"):
        enclave.send(Factors({}))
    enclave, host = link(full, short)
    enclave.send(Factors({}))
    with pytest.raises(ProtocolError, match="the host may not receive Factors"):
        host.recv(timeout=1)


# --- one battery over every design ------------------------------------------------------------------------------------


@settings_of
def test_tuning_ends_with_an_adapter_that_gives_the_protected_models_logits(setting: str, tmp_path: Path) -> None:
    """On the plain model by PEFT alone, side by side and merged in; then the same run generates and is probed again."""
    model = "gpt2" if "compact" in setting else "qwen3"
    data = {"train": str(write_examples(tmp_path / "train.jsonl", 8))}
    train = {"steps": 4, "optimizer": "adamw", "learning_rate": 1e-2}
    output = tmp_path / "run"
    config = make_config(
        SETTINGS[setting][0], model, output, data=data, train=train, lora={"alpha": 12.0}, **tables(setting)
    )
    run(config, "tune")
    run(config, Job(verb="probe", probe={"input_ids": PROBE_IDS, "steps": 1}), resume=True)
    protected = load_file(output / "parties" / "owner" / "probe.safetensors")["logits"]
    ids = torch.tensor(PROBE_IDS)
    with torch.no_grad():
        joined = peft_model(model, output)(input_ids=ids).logits
        merged = peft_model(model, output).merge_and_unload()(input_ids=ids).logits
        plain = plain_model(model)(input_ids=ids).logits
    assert relative_error(joined, protected) < 1e-5
    assert relative_error(merged, protected) < 1e-5
    assert relative_error(plain, protected) > 1e-2, "the adapter does nothing, so this shows nothing"
    job = Job(verb="generate", prompt="Hi", settings={"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8})
    tokens = run(config, job, resume=True).owner["generated"]["tokens"]
    prompt = torch.tensor([list(b"user: Hi\nassistant: ")])
    with torch.no_grad():
        expected = peft_model(model, output).generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **job.settings
        )
    assert tokens == expected[0, prompt.shape[1] :].tolist()


@settings_of
@pytest.mark.parametrize(("model", "targets"), [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_proj",))])
def test_adapting_some_linears_is_as_exact(setting: str, model: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    lora = {"targets": list(targets)}
    expected = run_probe("local", model, tmp_path / "local", lora=lora, **baseline(setting))
    actual = run_probe(SETTINGS[setting][0], model, tmp_path / "run", lora=lora, **tables(setting))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in expected if "lora_" in name} == set(targets)
    assert relative_error(actual["logits_tuned"], expected["logits_tuned"]) < 1e-5
    assert worst(actual, expected, "gradient:") < 1e-4
    blocks = {part for name in expected if "lora_" in name for part in name.split(".") if part.isdigit()}
    design = SETTINGS[setting][0]
    whole = design in {"local", "obfuscatune", "veil"}
    assert blocks == ({"0", "1"} if whole else {"1"} if design == "gradfree" else {"0"})
    assert relative_error(expected["logits_tuned"], local_probe(model, "float32")["logits_tuned"]) > 1e-4


@settings_of
@pytest.mark.parametrize("model", SPECIAL_MODELS)
def test_a_models_own_dropout_acts_in_training_as_in_transformers_and_nowhere_else(
    setting: str, model: str, tmp_path: Path
) -> None:
    """Everything is dropped, so nothing is left to chance: training loses the branches, evaluation loses nothing."""
    path = write_examples(tmp_path / "examples.jsonl", 4)
    data = {"train": str(path), "validation": str(path)}
    train = {"steps": 1, "warmup_steps": 1, "evaluate_every": 1}  # the first rate of a warm-up is zero
    config = make_config(SETTINGS[setting][0], model, tmp_path / "run", data=data, train=train, **tables(setting))
    history = run(config, "tune").owner["history"]
    examples = [tokenize(example, byte_tokenizer(), 64) for example in load_examples(str(path))]
    batch = collate(examples, PAD_ID)
    plain = plain_model(model)
    expected = []
    for training in (True, False):
        plain.train(training)
        if (
            SETTINGS[setting][0] == "gradfree"
        ):  # below the top nothing is trained, and what it gives is kept for all epochs
            top = plain.get_submodule("transformer.h.1" if model.startswith("gpt2") else "model.decoder.layers.1")
            plain.eval()
            top.train(training)
        with torch.no_grad():
            logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        expected.append(float(functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())))
    assert abs(expected[0] - expected[1]) > 1e-3, "dropout does nothing here, so this shows nothing"
    assert history["loss"] == [pytest.approx(expected[0], rel=2e-6)]
    assert history["validation_loss"][0][1] == pytest.approx(expected[1], rel=2e-6)


@settings_of
def test_what_crosses_is_counted_and_nothing_else_crosses(setting: str, tmp_path: Path) -> None:
    design = DESIGNS[SETTINGS[setting][0]]
    config = make_config(design.name, "opt", tmp_path / "run", **tables(setting))
    outcome = run(config, Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 1}))
    linked = {f"{a}->{b}" for pair in design.links for a, b in (pair, pair[::-1])}
    assert outcome.traffic.keys() == linked
    for pair, kinds in outcome.traffic.items():
        assert kinds.keys() <= design.may_receive(pair.partition("->")[2]), pair
        assert all(counts["messages"] > 0 and counts["bytes"] >= 64 for counts in kinds.values())
    assert outcome.figures.keys() == design.roles.keys()
    assert outcome.owner.get("enclave") == ("simulated" if design.enclaves else None)
    json.dumps(outcome.figures)  # plain figures, ready for the record


def test_the_paper_placement_crosses_twice_as_often(tmp_path: Path) -> None:
    """Each way and pass: four operations a block instead of two."""
    counts = {}
    for placement in ("compact", "paper"):
        config = make_config("obfuscatune", "gpt2", tmp_path / placement, obfuscatune={"placement": placement})
        traffic = run(config, Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 1})).traffic
        counts[placement] = [
            traffic["enclave->host"][kind]["messages"] for kind in ("SegmentForward", "SegmentBackward")
        ]
    assert counts["paper"] == [2 * count for count in counts["compact"]]
    assert counts["compact"] == [3 * 2 * 2, 2 * 2]  # two blocks of two segments; logits, a step's forward, logits again


@settings_of
def test_provisioning_places_the_model_and_ends(setting: str, tmp_path: Path) -> None:
    design = DESIGNS[SETTINGS[setting][0]]
    outcome = run(make_config(design.name, "llama", tmp_path / "run", **tables(setting)), "provision")
    assert outcome.figures.keys() == design.roles.keys()
    crossed = {kind for kinds in outcome.traffic.values() for kind in kinds}
    assert "WeightShard" in crossed
    assert not crossed & {"TrainBatch", "LogitsRequest", "SegmentForward", "TrunkForward", "EmulatorShard"}


# --- obfuscatune's own ------------------------------------------------------------------------------------------------


def test_a_host_without_the_optimiser_refuses_to_step() -> None:
    host = object.__new__(Host)
    host.optimizer = None
    with pytest.raises(ProtocolError, match="has no optimiser"):
        host._step(OptimizerStep(0.1, 1.0))


@pytest.mark.parametrize("matrix", ["gaussian", "conditioned", "butterfly", "orthogonal"])
def test_exactness_is_claimed_for_every_key_but_the_naive_one(matrix: str) -> None:
    options = ObfuscaTuneOptions(matrix=matrix, condition_number=8.0 if matrix == "conditioned" else None)
    assert DESIGNS["obfuscatune"].is_exact(options) == (matrix != "gaussian")
    assert DESIGNS["local"].is_exact(DESIGNS["local"].options())
