"""The five designs that cut the model: that they compute what they claim to, cross what they may, and leave what is usable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import helpers
from cutting import CUT, EXACT, KEEP_ALL, TRUNK, WIRE, cut_config, deep_model, plain, plainly, probed
from helpers import exported_adapter, relative_error, run, transcripts, tuned, write_examples
from veiltune.designs import DESIGNS
from veiltune.errors import ConfigError, PeerLostError
from veiltune.models.emulators import build
from veiltune.models.families import find_family
from veiltune.parties.party import Job, Party
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.session import PartyFailure
from veiltune.transport.messages import Message, TrunkForward, TrunkOutput

DESIGN_NAMES = tuple(EXACT)
STEPS = 20
TRAIN: dict[str, Any] = {"steps": STEPS, "optimizer": "adamw", "learning_rate": 3e-3, "batch_size": 4}
PROMPT = "The cat is red. What colour is it?"
GREEDY = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
every_design = pytest.mark.parametrize("design", DESIGN_NAMES)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    return {"train": str(write_examples(path, 12))}


def largest_difference(actual: list[float], expected: list[float]) -> float:
    assert len(actual) == len(expected)
    return max(abs(a - b) for a, b in zip(actual, expected, strict=True))


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def result(output: Path, method: str = "lora") -> dict[str, Tensor]:
    return exported_adapter(output) if method == "lora" else load_file(output / "layers" / "layers.safetensors")


# --- exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "family"),
    [*(("split", family) for family in ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3")), ("gradfree", "opt")],
)
def test_logits_losses_gradients_and_tokens_are_those_of_local(design: str, family: str, tmp_path: Path) -> None:
    model = deep_model(family)
    expected = probed(plainly(design, tmp_path / "local", model), generate=8)
    actual = probed(cut_config(design, tmp_path / "cut", model), generate=8)
    assert actual.keys() == expected.keys()
    assert torch.equal(actual["tokens"], expected["tokens"])
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-5, name
    blocks = {part for name in expected if "lora_" in name for part in name.split(".") if part.isdigit()}
    assert blocks == ({"4"} if design == "gradfree" else {"0", "4"})
    assert relative_error(expected["logits"], expected["logits_tuned"]) > 1e-3, "nothing is learnt, so nothing is shown"


@pytest.mark.parametrize(
    ("optimizer", "method", "accumulate", "steps"),
    [
        ("adamw", "lora", 1, 50),
        ("sgd", "lora", 1, STEPS),
        ("adamw", "full", 1, STEPS),
        ("sgd", "full", 2, STEPS),
        ("adamw", "lora", 2, STEPS),
    ],
)
def test_split_is_local_training_of_the_same_layers(
    optimizer: str, method: str, accumulate: int, steps: int, tmp_path: Path, text: dict[str, str]
) -> None:
    rate = 3e-3 if optimizer == "adamw" else 0.05
    train = {**TRAIN, "optimizer": optimizer, "method": method, "accumulate": accumulate, "learning_rate": rate}
    train["steps"] = steps
    expected = tuned(plainly("split", tmp_path / "local", data=text, train=train))["loss"]
    losses = tuned(cut_config("split", tmp_path / "split", data=text, train=train))["loss"]
    assert len(losses) == steps
    assert largest_difference(losses, expected) < 1e-5
    assert losses[-1] < losses[0] - 0.01, "nothing is learnt, so nothing is shown"
    theirs, mine = result(tmp_path / "local", method), result(tmp_path / "split", method)
    assert mine.keys() == theirs.keys()
    # AdamW divides by a gradient's own size, so where one is rounding noise it makes a step of that noise.
    assert max(relative_error(mine[name], value) for name, value in theirs.items()) < 2e-3


@pytest.mark.parametrize("design", ["online", "offsite", "offline"])
def test_with_protection_off_it_is_split_bit_for_bit(design: str, tmp_path: Path, text: dict[str, str]) -> None:
    """A wire of 32 bits and no decorrelation; the emulator that keeps every layer is the trunk itself."""
    expected = tuned(cut_config("split", tmp_path / "split", data=text, train=TRAIN))["loss"]
    losses = tuned(cut_config(design, tmp_path / design, data=text, train=TRAIN))["loss"]
    assert losses == expected
    assert same_bits(result(tmp_path / design), result(tmp_path / "split"))


@pytest.mark.parametrize(
    "options",
    [
        {"wire": {"activation_bits": 8, "gradient_bits": 32}},
        {"wire": {"activation_bits": 32, "gradient_bits": 4}},
        {"decorrelation": {"alpha": 1.0}},
    ],
    ids=["int8 states", "int4 gradients", "decorrelated"],
)
def test_each_protection_changes_what_crosses_and_what_is_learnt(
    options: dict[str, Any], tmp_path: Path, text: dict[str, str]
) -> None:
    seen = {}
    for name, table in {"off": {}, "on": options}.items():
        config = cut_config(
            "online",
            tmp_path / name,
            data=text,
            train={**TRAIN, "steps": 4},
            online=table,
            session={"record": ["provider"]},
        )
        losses = tuned(config)["loss"]
        messages = [message for _, message in transcripts(tmp_path / name, "provider")]
        crossed = [tensor for message in messages for _, tensor in helpers.tensors_of(message)]
        seen[name] = losses, crossed
    assert seen["off"][0][-1] != seen["on"][0][-1]
    assert len(seen["off"][1]) == len(seen["on"][1]) > 8
    assert not all(torch.equal(a, b) for a, b in zip(seen["off"][1], seen["on"][1], strict=True))
    assert abs(seen["off"][0][-1] - seen["on"][0][-1]) < 0.2, "a protection, not a wreck"


@pytest.mark.parametrize("design", ["online", "offline"])
def test_decorrelation_is_recorded_and_lowers_the_correlation(
    design: str, tmp_path: Path, text: dict[str, str]
) -> None:
    """Against the same run with a term too weak to matter; `offline` on its emulator, in the trunk's place."""
    means = {}
    for alpha in (1e-9, 20.0):
        config = cut_config(
            design, tmp_path / str(alpha), None, data=text, train={**TRAIN, "learning_rate": 1e-2},
            **{design: {"decorrelation": {"alpha": alpha}}},
        )  # fmt: skip
        trace = run(config, "tune").owner["decorrelation"]
        assert len(trace) == STEPS
        assert all(0 <= value <= 1 for value in trace)
        means[alpha] = sum(trace[-5:]) / 5
    assert means[20.0] < means[1e-9] - 0.01


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradfree_is_local_training_of_the_top(method: str, tmp_path: Path, text: dict[str, str]) -> None:
    train = {**TRAIN, "method": method}
    expected = tuned(plainly("gradfree", tmp_path / "local", data=text, train=train))["loss"]
    losses = tuned(cut_config("gradfree", tmp_path / "gradfree", data=text, train=train))["loss"]
    assert largest_difference(losses, expected) < 1e-5
    assert losses[-1] < losses[0] - 0.01
    mine = result(tmp_path / "gradfree", method)
    assert mine.keys() == result(tmp_path / "local", method).keys()
    assert all(".4." in name for name in mine), "the last block alone"


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.0), ("gpt2", 0.3)])
def test_recomputed_activations_change_no_bit(
    family: str, dropout: float, tmp_path: Path, text: dict[str, str]
) -> None:
    """With dropout in the trunk the second forward draws what the first one drew."""
    model, found = deep_model(family, dropout), {}
    for activations in ("keep", "recompute"):
        options = {"server": {"activations": activations}}
        config = cut_config("split", tmp_path / activations, model, data=text, train=TRAIN, split=options)
        found[activations] = tuned(config)["loss"], result(tmp_path / activations)
    assert found["keep"][0] == found["recompute"][0]
    assert same_bits(found["keep"][1], found["recompute"][1])
    if dropout:
        calm = tuned(cut_config("split", tmp_path / "calm", deep_model(family), data=text, train=TRAIN))["loss"]
        assert largest_difference(calm, found["keep"][0]) > 1e-3, "dropout does nothing here, so this shows nothing"


@pytest.mark.parametrize(
    ("design", "bottom", "top", "tables", "words"),
    [
        ("split", 0, 0, {}, "leave the owner no layer to train"),
        ("gradfree", 2, 0, {}, "cut.bottom_layers = 2 and cut.top_layers = 0 leave the owner no layer to train"),
        ("gradfree", 0, 2, {"gradfree": {"warm_up": {"steps": 2}}}, "no bottom layer to warm up"),
        ("split", 3, 2, {}, "leave no trunk in a model of 5 blocks"),
    ],
)
def test_a_cut_that_leaves_somebody_nothing_is_refused(
    design: str, bottom: int, top: int, tables: dict[str, Any], words: str, tmp_path: Path, text: dict[str, str]
) -> None:
    cut = {"bottom_layers": bottom, "top_layers": top}
    with pytest.raises(PartyFailure, match=words) as caught:
        tuned(cut_config(design, tmp_path / "run", data=text, train={"steps": 2}, cut=cut, **tables))
    assert caught.value.kind == "ConfigError"
    assert caught.value.hint


@pytest.mark.parametrize(("bottom", "top"), [(0, 2), (3, 0), (2, 2)])
def test_any_cut_is_local_training_of_its_layers(bottom: int, top: int, tmp_path: Path, text: dict[str, str]) -> None:
    cut = {"bottom_layers": bottom, "top_layers": top}
    train = {**TRAIN, "steps": 5}
    expected = tuned(plainly("split", tmp_path / "local", data=text, train=train, cut=cut))["loss"]
    losses = tuned(cut_config("split", tmp_path / "run", data=text, train=train, cut=cut))["loss"]
    assert largest_difference(losses, expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_owners_layers_alone_are_the_model_without_the_others(family: str, tmp_path: Path) -> None:
    """`local.layers = "alone"` against a shorter model: logits, training and generation with a KV cache."""
    model = plain(deep_model(family))
    blocks = model.get_submodule(find_family(model.config).blocks)
    del blocks[3:]
    model.config.num_hidden_layers = 3
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:3]
    shorter = tmp_path / "shorter"
    model.save_pretrained(shorter)
    helpers.byte_tokenizer().save_pretrained(shorter)
    cut = {"bottom_layers": 3, "top_layers": 0}
    expected = probed(cut_config("local", tmp_path / "local", str(shorter), cut=CUT), generate=8)
    alone = cut_config("local", tmp_path / "alone", deep_model(family), cut=cut, local={"layers": "alone"})
    actual = probed(alone, generate=8)
    assert same_bits(actual, expected)
    whole = probed(plainly("split", tmp_path / "whole", deep_model(family), cut=cut))
    assert relative_error(whole["logits"], expected["logits"]) > 1e-3, "the trunk does nothing"


@every_design
def test_one_configuration_runs_every_design(design: str, tmp_path: Path, text: dict[str, str]) -> None:
    """Only ``design`` changes: a file may hold the tables of all. Defaults throughout; the loss falls."""
    tables: dict[str, Any] = {name: {} for name in DESIGN_NAMES} | {"local": {"layers": "owner"}}
    config = helpers.make_config(design, deep_model(), tmp_path / "run", cut=CUT, data=text, train=TRAIN, **tables)
    losses = tuned(config)["loss"]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.01


# --- generation ---------------------------------------------------------------------------------------------------------


def rejoined(model: str, output: Path) -> Any:
    """The plain model with the adapter that a run exported, put together by PEFT alone."""
    from peft import PeftModel

    return PeftModel.from_pretrained(plain(model), str(output / "adapter")).eval()


@every_design
def test_exports_are_the_tuned_model_and_it_generates_the_same_through_the_trunk(
    design: str, tmp_path: Path, text: dict[str, str]
) -> None:
    model, output = deep_model("qwen3"), tmp_path / "run"
    config = cut_config(design, output, model, data=text, train={**TRAIN, "steps": 5, "learning_rate": 1e-2})
    tuned(config)
    protected = probed(config, steps=0, resume=True)["logits"]
    expected = rejoined(model, output)
    ids = torch.tensor(helpers.PROBE_IDS)
    with torch.no_grad():
        assert relative_error(protected, expected(input_ids=ids).logits) < 1e-5
        assert relative_error(plain(model)(input_ids=ids).logits, protected) > 1e-2, "the adapter does nothing"
    pieces: list[str] = []

    def on_event(name: str, fields: dict[str, Any]) -> None:
        if name == "text":
            pieces.append(fields["text"])

    job = Job(verb="generate", prompt=PROMPT, settings=GREEDY)
    outcome = run(config, job, resume=True, on_event=on_event)
    answer = outcome.owner["generated"]
    prompt = torch.tensor([list(f"user: {PROMPT}\nassistant: ".encode())])
    with torch.no_grad():
        whole = expected.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    assert answer["tokens"] == whole[0, prompt.shape[1] :].tolist()
    assert "".join(pieces) == answer["text"]
    assert len(pieces) > 1 or not answer["text"], "the answer came in one piece"
    # The prompt, then a token each; all but the last, which is asked for nothing.
    assert outcome.traffic["owner->provider"]["TrunkForward"]["messages"] == len(answer["tokens"])


@every_design
def test_trained_layers_load_into_the_plain_model(design: str, tmp_path: Path, text: dict[str, str]) -> None:
    output = tmp_path / "run"
    config = cut_config(design, output, data=text, train={**TRAIN, "steps": 3, "method": "full"})
    tuned(config)
    protected = probed(config, steps=0, resume=True)["logits"]
    model = plain(deep_model())
    layers = result(output, "full")
    missing, unexpected = model.load_state_dict(layers, strict=False)
    assert unexpected == []
    assert missing, "the trunk is not the owner's to export"
    with torch.no_grad():
        assert relative_error(protected, model(input_ids=torch.tensor(helpers.PROBE_IDS)).logits) < 1e-5
    moved = [name for name, value in layers.items() if not torch.equal(value, plain(deep_model()).state_dict()[name])]
    blocks = {name.split(".")[2] for name in moved}
    assert blocks == ({"4"} if design == "gradfree" else {"0", "4"})


@pytest.mark.parametrize("bits", [8, 4])
def test_generation_over_a_rounded_wire(bits: int, tmp_path: Path) -> None:
    """It works, what crosses is rounded, and the first token's states are that much smaller."""
    job = Job(verb="generate", prompt=PROMPT, settings=GREEDY)
    sizes = {}
    for width in (32, bits):
        output = tmp_path / str(width)
        wire = {"activation_bits": width, "gradient_bits": 32}
        config = cut_config("online", output, online={"wire": wire}, session={"record": ["provider"]})
        answer = run(config, job).owner["generated"]
        assert len(answer["tokens"]) == 10
        forwards = [m for _, m in transcripts(output, "provider") if isinstance(m, TrunkForward)]
        assert [forward.cache_id > 0 for forward in forwards] == [True] * 10
        sizes[width] = sum(forward.hidden.numel() for forward in forwards)
    assert sizes[bits] < sizes[32] * (0.5 if bits == 8 else 0.4)


# --- gradfree -------------------------------------------------------------------------------------------------------------


def crossed(traffic: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Messages and bytes by pair and kind, but for what tells nothing of training."""
    return {
        f"{pair} {kind}": (count["messages"], count["bytes"])
        for pair, kinds in traffic.items()
        for kind, count in kinds.items()
    }


def test_gradfree_has_no_gradient_message_and_sends_none(tmp_path: Path, text: dict[str, str]) -> None:
    design = DESIGNS["gradfree"]
    gradient = {"TrunkBackward", "TrunkGradient", "EmulatorShard", "PlugIn"}
    assert not any(gradient & table.keys() for table in design.reveals.values())
    assert gradient & DESIGNS["split"].reveals["provider"].keys(), "where there is one, it is listed"
    config = cut_config("gradfree", tmp_path / "run", data=text, train=TRAIN, session={"record": ["provider", "owner"]})
    tuned(config)
    for observer in ("provider", "owner"):
        kinds: dict[str, list[Message]] = {}
        for _, message in transcripts(tmp_path / "run", observer):
            kinds.setdefault(type(message).__name__, []).append(message)
        assert not gradient & kinds.keys()
        with_tensors = {kind for kind, found in kinds.items() if any(dict(helpers.tensors_of(m)) for m in found)}
        assert with_tensors == {"TrunkForward", "TrunkOutput", "WeightShard", "TokenizerFiles"}
        assert not any(getattr(forward, "keep") for forward in kinds["TrunkForward"])  # noqa: B009
        assert len(kinds["TrunkForward"]) == len(kinds["TrunkOutput"])


def distinct_texts(path: str) -> int:
    return len(set(Path(path).read_text(encoding="utf-8").splitlines()))


def test_gradfrees_traffic_does_not_grow_with_epochs(tmp_path: Path, text: dict[str, str]) -> None:
    found = {}
    for epochs in (1, 3):
        config = cut_config(
            "gradfree", tmp_path / str(epochs), data={**text, "validation": text["train"]},
            train={"epochs": epochs, "batch_size": 4, "optimizer": "adamw"}, session={"record": ["owner"]},
        )  # fmt: skip
        outcome = run(config, "tune")
        assert outcome.owner["history"]["step"] == 3 * epochs
        found[epochs] = crossed(outcome.traffic)
        codec = WireCodec.for_activations(WireOptions(activation_bits=8).model_copy(update=WIRE))
        outputs = [m for _, m in transcripts(tmp_path / str(epochs), "owner") if isinstance(m, TrunkOutput)]
        rows = sum(codec.decode(output.hidden).shape[0] for output in outputs)
        assert rows == distinct_texts(text["train"]), "each distinct text once, validation included"
        kept = list((tmp_path / str(epochs) / "parties" / "owner" / "trunk-outputs").iterdir())
        assert len(kept) == rows
    assert found[1] == found[3]


def test_an_owner_without_room_is_refused_before_anything_crosses(tmp_path: Path, text: dict[str, str]) -> None:
    config = cut_config(
        "gradfree",
        tmp_path / "run",
        data=text,
        gradfree={"cache": {"max_bytes": 5000}},
        session={"record": ["provider"]},
    )
    with pytest.raises(PartyFailure, match=r"cache of trunk outputs would take \d+ bytes") as caught:
        run(config, "tune")
    assert caught.value.kind == "ConfigError"
    assert caught.value.exit_code == ConfigError.exit_code
    assert "TrunkForward" not in {type(m).__name__ for _, m in transcripts(tmp_path / "run", "provider")}
    assert "gradfree.cache.max_bytes allows 5000" in caught.value.message
    needed = str(caught.value.hint).split("at least ")[1].split(",")[0]
    assert "set gradfree.cache.max_bytes to at least" in str(caught.value.hint)
    enough = {"cache": {"max_bytes": int(needed)}}
    config = cut_config("gradfree", tmp_path / "enough", data=text, train={"steps": 4}, gradfree=enough)
    assert len(tuned(config)["loss"]) == 4, "what it asks for is enough"


def test_a_sealed_cache_holds_nothing_that_can_be_read(tmp_path: Path, text: dict[str, str]) -> None:
    found = {}
    for sealed in (False, True):
        output = tmp_path / str(sealed)
        config = cut_config(
            "gradfree",
            output,
            data=text,
            train=TRAIN,
            gradfree={"cache": {"sealed": sealed}},
            session={"record": ["owner"]},
        )
        losses = tuned(config)["loss"]
        codec = WireCodec.for_activations(WireOptions(activation_bits=8).model_copy(update=WIRE))
        outputs = [m for _, m in transcripts(output, "owner") if isinstance(m, TrunkOutput)]
        row = codec.decode(outputs[0].hidden)[0, 0].numpy().tobytes()
        files = {path: path.read_bytes() for path in (output / "parties" / "owner" / "trunk-outputs").iterdir()}
        found[sealed] = losses, {path.name for path in files}, any(row in content for content in files.values())
        assert any(b"hidden" in content for content in files.values()) is not sealed
    assert found[True][0] == found[False][0]
    assert not found[True][1] & found[False][1], "names tell nothing either"
    assert found[False][2], "the control: in the clear the very numbers are there"
    assert not found[True][2]


def test_gradfree_resumes_from_its_cache(tmp_path: Path, text: dict[str, str]) -> None:
    """A checkpoint of the middle: what was kept before does not cross again."""
    train = {**TRAIN, "checkpoint_every": 5, "steps": 10}
    whole = tuned(cut_config("gradfree", tmp_path / "whole", data=text, train=train))
    config = cut_config("gradfree", tmp_path / "run", data=text, train=train)
    stop_at(config, 5)
    kept = len(list((tmp_path / "run" / "parties" / "owner" / "trunk-outputs").iterdir()))
    assert kept == distinct_texts(text["train"])
    outcome = run(config, "tune", resume=True)
    assert outcome.owner["history"]["loss"] == whole["loss"]
    assert "TrunkForward" not in outcome.traffic["owner->provider"]


def stop_at(config: Any, step: int) -> None:
    """Run ``tune`` until Ctrl-C after a step."""

    def on_event(session: Any, name: str, fields: dict[str, Any]) -> None:
        if name == "step" and fields["step"] == step:
            session._interrupt()

    outcome = helpers.run_with(config, Job(verb="tune"), on_event)
    assert outcome.interrupted


@pytest.mark.parametrize(
    ("design", "method"), [*((design, "lora") for design in DESIGN_NAMES), ("split", "full"), ("gradfree", "full")]
)
def test_a_stopped_run_goes_on_with_another_provider_as_if_nothing_had_been(
    design: str, method: str, tmp_path: Path, text: dict[str, str]
) -> None:
    """Each run starts the provider anew: it keeps nothing that a resumed run needs. Dropout is the owner's own, of LoRA."""
    train = {**TRAIN, "steps": 25, "method": method}
    tables = {"data": text, "train": train, "lora": {"init_seed": 1, "dropout": 0.2}}
    whole = tuned(cut_config(design, tmp_path / "whole", **tables))
    config = cut_config(design, tmp_path / "run", **tables)
    stop_at(config, 3)
    done = json.loads((tmp_path / "run" / "checkpoint.json").read_text(encoding="utf-8"))["step"]
    assert 3 <= done < 25
    history = tuned(config, resume=True)
    assert history["loss"] == whole["loss"], "bit for bit"
    assert same_bits(result(tmp_path / "whole", method), result(tmp_path / "run", method))


def test_decorrelation_resumes_where_it_was(tmp_path: Path, text: dict[str, str]) -> None:
    tables: dict[str, Any] = {
        "data": text,
        "train": {**TRAIN, "steps": 20},
        "online": {"decorrelation": {"alpha": 2.0, "samples": 16}},
    }
    whole = tuned(cut_config("online", tmp_path / "whole", **tables))
    config = cut_config("online", tmp_path / "run", **tables)
    stop_at(config, 4)
    assert tuned(config, resume=True)["loss"] == whole["loss"]


def test_a_warm_up_decorrelates_the_bottom_which_is_then_frozen(tmp_path: Path, text: dict[str, str]) -> None:
    warm_up = {"steps": 12, "alpha": 1.0, "learning_rate": 3e-3}
    exported = {}
    for steps in (1, 6):
        config = cut_config(
            "gradfree", tmp_path / str(steps), data=text, train={**TRAIN, "steps": steps}, gradfree={"warm_up": warm_up}
        )
        figures = run(config, "tune").owner["warm_up"]
        assert figures["correlation_last"] < figures["correlation_first"] - 0.005
        assert 0 < figures["displacement_last"] < 0.5
        exported[steps] = exported_adapter(tmp_path / str(steps))
    bottom = [name for name in exported[1] if ".0." in name.split("layers")[1][:3]]
    top = [name for name in exported[1] if name not in bottom]
    assert bottom
    assert top
    assert any(exported[1][name].abs().max() > 0 for name in bottom if "lora_B" in name), "warmed factors are exported"
    assert all(torch.equal(exported[1][name], exported[6][name]) for name in bottom), "and not trained any further"
    assert not all(torch.equal(exported[1][name], exported[6][name]) for name in top)
    protected = probed(config, steps=0, resume=True)["logits"]
    with torch.no_grad():
        expected = rejoined(deep_model(), tmp_path / "6")(input_ids=torch.tensor(helpers.PROBE_IDS)).logits
    assert relative_error(protected, expected) < 1e-5


def test_a_warmed_run_resumes_without_warming_up_again(tmp_path: Path, text: dict[str, str]) -> None:
    tables: dict[str, Any] = {
        "data": text,
        "train": {**TRAIN, "steps": 20},
        "gradfree": {"warm_up": {"steps": 3}},
    }
    whole = tuned(cut_config("gradfree", tmp_path / "whole", **tables))
    config = cut_config("gradfree", tmp_path / "run", **tables)
    stop_at(config, 4)
    outcome = run(config, "tune", resume=True)
    assert outcome.owner["history"]["loss"] == whole["loss"]
    assert "warm_up" not in outcome.owner
    assert "TrunkForward" not in outcome.traffic["owner->provider"], "what it kept is still of use"


def test_quantised_outputs_are_kept_as_they_came(tmp_path: Path, text: dict[str, str]) -> None:
    """Over a rounded wire an example's first and later epochs see the same numbers: the loss falls as in one go."""
    wire = {"activation_bits": 8, "gradient_bits": 32}
    train = {**TRAIN, "learning_rate": 1e-12, "steps": 9, "schedule": "constant"}
    losses = tuned(cut_config("gradfree", tmp_path / "run", data=text, train=train, gradfree={"wire": wire}))["loss"]
    whole = tuned(cut_config("gradfree", tmp_path / "exact", data=text, train=train))["loss"]
    assert sum(losses[:3]) != sum(whole[:3]), "it is rounded"
    assert abs(sum(losses[:3]) - sum(losses[6:])) < 0.2, "each epoch has the same examples"


# --- offsite, offline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["offsite", "offline"])
def test_tuning_on_an_emulator_crosses_nothing(design: str, tmp_path: Path, text: dict[str, str]) -> None:
    found = []
    for steps in (2, 12):
        config = helpers.make_config(
            design, deep_model(), tmp_path / str(steps), cut=CUT, data={**text, "validation": text["train"]},
            train={**TRAIN, "steps": steps, "evaluate_every": 2},
        )  # fmt: skip
        outcome = run(config, "tune")
        counts = {key: messages for key, (messages, _) in crossed(outcome.traffic).items()}
        found.append(counts)
        assert outcome.owner["engine"]["crossings_per_step"] == 0
        assert not {kind for key in counts for kind in [key.split()[1]]} & {
            "TrunkForward",
            "TrunkBackward",
            "TrunkOutput",
        }
        assert set(outcome.owner["emulator"]["kept"]) <= {1, 2, 3}
        assert 0 < outcome.owner["emulator"]["byte_share"] <= 1
    assert found[0] == found[1]
    assert found[0]["provider->owner EmulatorShard"] >= 1


def plugged(output: Path) -> Any:
    """The provider's merged model, as `transformers` loads it."""
    return plain(str(output / "parties" / "provider" / "plug-in"))


@pytest.mark.parametrize("design", ["offsite", "offline"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_plugged_in_model_is_that_of_split_inference(
    design: str, method: str, tmp_path: Path, text: dict[str, str]
) -> None:
    output = tmp_path / "run"
    tables: dict[str, Any] = {design: {"plug_in": True, "emulator": {"layers": 1}}}
    config = cut_config(
        design,
        output,
        data=text,
        train={**TRAIN, "steps": 4, "learning_rate": 1e-2, "method": method},
        **tables,
    )
    assert "PlugIn" in run(config, "tune").traffic["owner->provider"]
    protected = probed(config, steps=0, resume=True)["logits"]
    ids = torch.tensor(helpers.PROBE_IDS)
    with torch.no_grad():
        logits = plugged(output)(input_ids=ids).logits
        untuned = plain(deep_model())(input_ids=ids).logits
    assert relative_error(logits, protected) < 1e-5
    assert relative_error(untuned, protected) > 1e-2
    assert (output / "parties" / "provider" / "plug-in" / "tokenizer_config.json").is_file()


def test_nothing_is_returned_that_was_not_agreed_on(tmp_path: Path, text: dict[str, str]) -> None:
    config = cut_config("offline", tmp_path / "run", data=text, train={**TRAIN, "steps": 2})
    assert "PlugIn" not in run(config, "tune").traffic["owner->provider"]
    assert not (tmp_path / "run" / "parties" / "provider" / "plug-in").exists()


KINDS: dict[str, dict[str, Any]] = {
    "layerdrop": {"kind": "layerdrop", "layers": 2},
    "lowrank": {"kind": "lowrank", "rank": 0.5},
    "quantised": {"kind": "quantised", "bits": 4, "group": 16},
    "distilled": {
        "kind": "distilled", "layers": 1, "distil_steps": 4, "distil_batch": 2, "distil_length": 16,
        "distil_checkpoint_every": 2,
    },
    "dropped and quantised": {"kind": "layerdrop", "layers": 2, "compression": "quantised", "group": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_emulator_is_built_once_and_tuned_against(
    kind: str, tmp_path: Path, text: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = tuned(cut_config("offsite", tmp_path / "exact", data=text, train={**TRAIN, "steps": 4}))["loss"]
    own_cache = mock.patch.dict(os.environ, {"VEILTUNE_CACHE": str(tmp_path / "cache")})
    monkeypatch.setattr(helpers, "own_cache", lambda: own_cache)
    events: list[str] = []
    emulator = {**({"compression": "none"} if "compression" not in KINDS[kind] else {}), **KINDS[kind]}
    config = helpers.make_config(
        "offsite", deep_model(), tmp_path / "run", cut=CUT, data=text, train={**TRAIN, "steps": 4},
        offsite={"emulator": emulator},
    )  # fmt: skip
    first = run(config, "tune", on_event=lambda name, _: events.append(name))
    assert all(math.isfinite(loss) for loss in first.owner["history"]["loss"])
    assert first.owner["history"]["loss"] != exact, "it is not the trunk itself"
    assert ("emulating" in events) == (kind != "layerdrop"), "progress, but where nothing takes long"
    built = emulator_files(tmp_path / "cache")
    assert built

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("built a second time")

    monkeypatch.setattr(build, "_built", again)
    again_outcome = run(config, Job(verb="tune"), resume=True)
    assert again_outcome.owner["history"]["loss"] == first.owner["history"]["loss"]
    assert emulator_files(tmp_path / "cache") == built, "untouched"


def emulator_files(cache: Path) -> dict[str, int]:
    """What a provider has built, with the times it was written."""
    return {str(path): path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def test_utility_is_measured_on_the_emulator_and_through_the_trunk(
    tmp_path: Path, text: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of emulator and plug-in are two, from two computations."""
    from veiltune.parties.split.tuners import EmulatedTuner

    where: list[tuple[str, bool]] = []

    def measure(self: Any, when: str) -> None:
        tuner: EmulatedTuner = self.split_tuner
        assert tuner._emulator is not None
        where.append((when, self.stub.port is tuner._emulator))
        assert (self.stub.port is tuner.port) is (when == "after")

    monkeypatch.setattr("veiltune.parties.split.owner.SplitOwner.measure", measure)
    run(cut_config("offsite", tmp_path / "run", data=text, train={**TRAIN, "steps": 2}), "tune")
    assert where == [("emulator", True), ("after", False)]


# --- bounds on what crosses ---------------------------------------------------------------------------------------------


def test_int8_and_int4_keep_to_their_share_of_the_bytes(tmp_path: Path, text: dict[str, str]) -> None:
    """At width 32 scales and headers weigh more than at a real width: of states and gradients 8 bits take under 0.36."""
    sizes = {}
    for bits in (32, 8, 4):
        wire = {"activation_bits": bits, "gradient_bits": bits, "first_position": "quantised"}
        config = cut_config(
            "online", tmp_path / str(bits), data=text, train={**TRAIN, "steps": 3}, online={"wire": wire}
        )
        sizes[bits] = run(config, "tune").owner["engine"]["border_bytes_per_step"]
    assert 0.2 < sizes[8] / sizes[32] < 0.36
    assert 0.1 < sizes[4] / sizes[32] < 0.24


def test_trunk_of_the_cut_is_what_the_tests_think() -> None:
    assert KEEP_ALL["layers"] == TRUNK


@pytest.mark.parametrize(
    "event",
    [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.ci]) for name in ("border", "checkpoint")] + ["step"],
)
def test_a_supervisor_that_is_gone_leaves_no_state_of_another_step(
    event: str, tmp_path: Path, text: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the owner was about to tell it: what was trained and what is counted are of one step."""
    train = {"steps": 8, "batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-2, "checkpoint_every": 2}
    whole, cut_off = (cut_config("online", tmp_path / name, data=text, train=train) for name in ("whole", "cut"))
    expected = tuned(whole)["loss"]
    report, told = Party.report, []

    def gone(self: Party, name: str, fields: dict[str, Any] | None = None) -> None:
        if self.role == "owner" and name == event:
            told.append(name)
            if len(told) == (6 if event != "checkpoint" else 2):
                raise PeerLostError("the supervisor closed its link")
        report(self, name, fields)

    with monkeypatch.context() as patch:
        patch.setattr(Party, "report", gone)
        with pytest.raises(PartyFailure):
            tuned(cut_off)
    assert tuned(cut_off, resume=True)["loss"] == expected
