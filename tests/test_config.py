"""The configuration: what it takes, what it refuses and how it says so, and what its fingerprint covers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from veiltune.config import Config, load_config
from veiltune.designs import DESIGNS, option_tables
from veiltune.errors import ConfigError
from veiltune.privacy.orthogonal import KEY_KINDS

BASE: dict[str, Any] = {"design": "obfuscatune", "model": "random:gpt2", "output": "runs/x"}


def load(*overrides: str, **values: Any) -> Config:
    return load_config({**BASE, **values}, overrides=overrides, options=option_tables())


def refused(*overrides: str, **values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **values)
    return caught.value


# --- files ------------------------------------------------------------------------------------------------------------

TOML = """
design = "obfuscatune"
model = "random:llama"
output = "runs/x"
seed = 3

[train]
steps = 7
learning_rate = 1e-3

[lora]
targets = ["q_proj", "v_proj"]

[obfuscatune]
placement = "paper"
"""


def test_a_file_gives_what_it_says_and_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TOML, encoding="utf-8")
    config = load_config(path, options=option_tables())
    assert (config.design, config.model, config.output, config.seed) == (
        "obfuscatune",
        "random:llama",
        Path("runs/x"),
        3,
    )
    assert (config.train.steps, config.train.learning_rate, config.train.batch_size) == (7, 1e-3, 8)
    assert config.lora.targets == ("q_proj", "v_proj")
    options = config.design_options["obfuscatune"]
    assert (options["placement"], options["matrix"]) == ("paper", "orthogonal")


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (None, "no configuration file", "quick start"),
        (b"design = local\n", r"not valid TOML: .*line 1", "strings need quotes"),
        (b"\xff\xfe", "cannot read", "TOML text file"),
    ],
    ids=["missing", "syntax", "no-text"],
)
def test_an_unreadable_file_is_named(content: bytes | None, message: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, options=option_tables())
    assert str(path) in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_mapping_is_read_and_left_as_it_was() -> None:
    values = {**BASE, "train": {"steps": 5}, "obfuscatune": {"placement": "paper"}}
    config = load_config(values, overrides=["train.steps=6", "design=local"], options=option_tables())
    assert (config.train.steps, config.design) == (6, "local")
    assert values == {**BASE, "train": {"steps": 5}, "obfuscatune": {"placement": "paper"}}


# --- what is refused, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "key", "meant"),
    [
        ({"modle": "x"}, "modle", "model"),
        ({"trian": {"steps": 3}}, "trian", "train"),
        ({"obfuscatun": {}}, "obfuscatun", "obfuscatune"),
        ({"train": {"learning_rte": 1}}, "train.learning_rte", "learning_rate"),
        ({"train": {"learning-rate": 1}}, "train.learning-rate", "learning_rate"),
        ({"data": {"max_len": 3}}, "data.max_len", "max_length"),
        ({"obfuscatune": {"placment": "paper"}}, "obfuscatune.placment", "placement"),
        ({"local": {"rank": 3}}, "local.rank", None),
    ],
)
def test_an_unknown_key_is_named_with_its_table_and_the_nearest(
    values: dict[str, Any], key: str, meant: str | None
) -> None:
    error = refused(**values)
    assert repr(key) in error.message
    assert "unknown key" in error.message
    assert str(error.hint).startswith(f"did you mean {meant!r}?" if meant else "valid:")


def test_a_misspelt_key_is_named_before_what_it_leaves_out() -> None:
    with pytest.raises(ConfigError, match="unknown key 'desing'") as caught:
        load_config({"desing": "local", "model": "m", "output": "o"}, options=option_tables())
    assert "'design'" in str(caught.value.hint)


@pytest.mark.parametrize("key", BASE)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks '{key}'") as caught:
        load_config({name: value for name, value in BASE.items() if name != key}, options=option_tables())
    assert f"add {key} = " in str(caught.value.hint)


@pytest.mark.parametrize(
    ("design", "meant"), [("obfuscatun", "'obfuscatune'"), ("locl", "'local'"), (7, "local"), (["local"], "")]
)
def test_an_unknown_design_is_named_with_the_nearest(design: Any, meant: str) -> None:
    error = refused(design=design)
    assert f"unknown design {design!r}" in error.message
    assert meant in str(error.hint)
    assert all(name in str(error.hint) for name in DESIGNS)


BAD = [
    ("seed", 1.5, "integer"),
    ("dtype", "float16", "'float32', 'bfloat16' or 'float64'"),
    ("train.steps", 0, "greater than or equal to 1"),
    ("train.batch_size", "many", "integer"),
    ("train.learning_rate", 0.0, "greater than 0"),
    ("train.learning_rate", math.inf, "finite"),
    ("train.optimizer", "adam", "'adamw' or 'sgd'"),
    ("train.schedule", "step", "'constant', 'linear' or 'cosine'"),
    ("train.max_grad_norm", -1, "greater than or equal to 0"),
    ("lora.rank", 0, "greater than or equal to 1"),
    ("lora.dropout", 1.0, "less than 1"),
    ("lora.targets", "q_proj", "'all'.*tuple"),
    ("lora.targets", [], "'all'.*at least 1 item"),
    ("data.max_length", 1, "greater than or equal to 2"),
    ("data.too_long", "drop", "'error' or 'truncate'"),
    ("evaluate.tasks", "arc", "tuple"),
    ("session.link", "udp", "'shared_memory' or 'tcp'"),
    ("session.threads", 0, "greater than or equal to 1"),
    ("obfuscatune.placement", "papr", "'paper' or 'compact'"),
    ("obfuscatune.optimizer_at", "owner", "'host' or 'enclave'"),
    ("obfuscatune.condition_number", math.inf, "finite"),
    ("train", 5, "dictionary"),
]


@pytest.mark.parametrize(("key", "value", "fix"), BAD)
def test_a_bad_value_names_its_key_itself_and_what_would_do(key: str, value: Any, fix: str) -> None:
    table, _, leaf = key.rpartition(".")
    error = refused(**({table: {leaf: value}} if table else {leaf: value}))
    assert error.message.startswith(f"{key} = {value!r}: ")
    said = error.message.split(": ", 1)[1]
    assert re.search(fix, said), said
    assert error.hint


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    error = refused(train={"steps": 5, "warmup_steps": 6})
    assert error.message == "configuration: train.warmup_steps 6 exceeds train.steps 5"
    assert load(train={"steps": 6, "warmup_steps": 6}).train.warmup_steps == 6


def test_no_message_shows_the_rest_of_the_configuration() -> None:
    for error in (refused(train={"steps": 5, "warmup_steps": 6}), refused(obfuscatune={"matrix": "x", "key_seed": 77})):
        assert "random:gpt2" not in error.message
        assert "77" not in error.message


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=9", "seed", 9),
        ("train.steps=50", "train.steps", 50),
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        (" train.steps = 50", "train.steps", 50),
        ("enclave.allow_simulated=true", "enclave.allow_simulated", True),
        ('evaluate.tasks=["arc", "x"]', "evaluate.tasks", ("arc", "x")),
        ("train.schedule=cosine", "train.schedule", "cosine"),
        ('train.schedule="cosine"', "train.schedule", "cosine"),
        ("data.train=folder/a file.jsonl", "data.train", "folder/a file.jsonl"),
        ("data.train=a=b", "data.train", "a=b"),
        ("obfuscatune.placement=paper", "design_options.obfuscatune.placement", "paper"),
    ],
)
def test_an_override_is_a_dotted_key_and_a_toml_value_or_bare_words(override: str, path: str, value: Any) -> None:
    found: Any = load(override)
    for part in path.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_each_wins_over_the_file() -> None:
    assert load("train.steps=5", "train.steps=6", train={"steps": 4, "epochs": 2}).train.steps == 6
    assert load("train.steps=5", train={"steps": 4, "epochs": 2}).train.epochs == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "is not key=value"),
        ("=5", "is not key=value"),
        ("", "is not key=value"),
        ("seed.deep=5", "'seed' is a value, not a table"),
        ("train.stepz=5", "unknown key 'train.stepz'"),
        ("train.=5", "unknown key 'train.'"),
        ("train.steps=none", "train.steps = 'none'"),
    ],
)
def test_a_malformed_override_is_refused(override: str, message: str) -> None:
    assert message in refused(override, seed=1).message


# --- the designs' own tables ------------------------------------------------------------------------------------------


def test_tables_of_other_designs_are_kept_and_checked() -> None:
    config = load(design="local", obfuscatune={"matrix": "gaussian"})
    assert config.design_options["obfuscatune"]["matrix"] == "gaussian"
    assert refused(design="local", obfuscatune={"placement": "x"}).message.startswith("obfuscatune.placement = 'x'")


def test_gathered_tables_are_read_and_a_table_by_name_wins() -> None:
    config = load(design_options={"obfuscatune": {"matrix": "gaussian"}})
    assert config.design_options["obfuscatune"]["matrix"] == "gaussian"
    config = load(design_options={"obfuscatune": {"matrix": "gaussian"}}, obfuscatune={"matrix": "butterfly"})
    assert config.design_options["obfuscatune"]["matrix"] == "butterfly"
    assert refused(design_options={"obfuscatun": {}}).message == "unknown design 'obfuscatun' in design_options"
    assert refused(design_options=5).message.startswith("design_options = 5")
    assert "obfuscatune" in refused(obfuscatune=5).message


def test_the_configuration_read_back_from_itself_is_the_same() -> None:
    config = load(train={"steps": 3}, obfuscatune={"matrix": "conditioned", "condition_number": 8})
    again = load_config(config.model_dump(mode="json"), options=option_tables())
    assert again == config == Config.model_validate_json(config.to_json())
    assert again.fingerprint() == config.fingerprint()


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_a_condition_number_belongs_to_conditioned_keys(kind: str) -> None:
    with_number, without = {"matrix": kind, "condition_number": 8.0}, {"matrix": kind}
    right, wrong = (with_number, without) if kind == "conditioned" else (without, with_number)
    assert load(obfuscatune=right).design_options["obfuscatune"]["matrix"] == kind
    assert "condition_number belongs to matrix = 'conditioned'" in refused(obfuscatune=wrong).message
    assert "at least 1" in refused(obfuscatune={"matrix": "conditioned", "condition_number": 0.5}).message


def test_an_unknown_kind_of_key_is_named_with_the_nearest() -> None:
    error = refused(obfuscatune={"matrix": "orthogonl"})
    assert "matrix 'orthogonl'" in error.message
    assert str(error.hint).startswith("did you mean 'orthogonal'?")


# --- the fingerprint --------------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "design": "local",
    "model": "random:opt",
    "dtype": "float64",
    "cut.bottom_layers": 1,
    "cut.top_layers": 3,
    "lora.rank": 3,
    "lora.alpha": 3.0,
    "lora.dropout": 0.1,
    "lora.targets": ["q_proj"],
    "lora.init_seed": 1,
    "train.method": "full",
    "train.optimizer": "sgd",
    "train.weight_decay": 0.1,
    "adapter.to": "both",
    "enclave.allow_simulated": True,
    "peers": [{"role": "owner", "key": "spki-sha256:" + 64 * "0"}],
    "obfuscatune.matrix": "gaussian",
    "obfuscatune.placement": "paper",
    "obfuscatune.optimizer_at": "host",
    "obfuscatune.spot_checks": 0.5,
    "obfuscatune.key_seed": 3,
}
"""Of every field that the parties agree on, a value that is not the default."""

OF_THE_RUN: dict[str, Any] = {
    "seed": 1,
    "data.train": "a.jsonl",
    "data.validation": "b.jsonl",
    "data.limit": 3,
    "data.max_length": 32,
    "data.too_long": "truncate",
    "train.steps": 3,
    "train.epochs": 2,
    "train.batch_size": 3,
    "train.accumulate": 3,
    "train.learning_rate": 3e-4,
    "train.schedule": "cosine",
    "train.warmup_steps": 3,
    "train.max_grad_norm": 0.5,
    "train.evaluate_every": 3,
    "train.checkpoint_every": 3,
    "evaluate.tasks": ["arc"],
    "evaluate.limit": 3,
    "evaluate.before": True,
}
"""The owner's business, which makes its run what it is."""

OWN: dict[str, Any] = {
    "output": "elsewhere",
    "device": "cpu",
    "identity.key": "owner.key",
    "enclave.policy": "policy.toml",
    "enclave.certificates": "amd",
    "enclave.sealed_model": "model.sealed",
    "provider.public_ancestors": ["random:llama"],
    "provider.allow_public_ancestor": True,
    "provider.ancestor_blocks": 2,
    "session.processes": False,
    "session.link": "tcp",
    "session.record": ["host"],
    "session.threads": 1,
    "session.connect": {"provider": "127.0.0.1:7431"},
    "session.token_file": "token",
    "session.retry_seconds": 3.0,
    "session.stop_seconds": 3.0,
    "session.health": "127.0.0.1:9464",
    "session.allow_unauthenticated": True,
}
"""One party's own business."""


def nested(pairs: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs.items():
        table, _, leaf = key.rpartition(".")
        (values.setdefault(table, {}) if table else values)[leaf] = value
    return values


def fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        is_table = isinstance(inner, type) and issubclass(inner, BaseModel)
        found += fields(inner, f"{prefix}{name}.") if is_table else [f"{prefix}{name}"]
    return found


def test_every_field_is_in_one_of_these_tables() -> None:
    """So that a field added later is thought of here."""
    every = {*fields(Config), *fields(option_tables()["obfuscatune"], "obfuscatune.")} - {"design_options"}
    assert every - {"obfuscatune.condition_number"} == {
        *OTHER,
        *OF_THE_RUN,
        *OWN,
    }  # that one needs another matrix too: see below


@pytest.mark.parametrize("key", OTHER)
def test_the_fingerprint_changes_with_what_is_agreed(key: str) -> None:
    changed = load(**nested({key: OTHER[key]}))
    assert changed != load(), "the value is the default"
    assert changed.fingerprint() != load().fingerprint()
    assert changed.run_fingerprint() != load().run_fingerprint()


@pytest.mark.parametrize("key", OF_THE_RUN)
def test_an_owners_share_makes_another_run_that_the_others_need_not_know_of(key: str) -> None:
    changed = load(**nested({key: OF_THE_RUN[key]}))
    assert changed != load(), "the value is the default"
    assert changed.fingerprint() == load().fingerprint()
    assert changed.run_fingerprint() != load().run_fingerprint()


@pytest.mark.parametrize(
    ("design", "options", "agreed"),
    [
        ("online", {"server": {"max_pending": 9}}, False),
        ("online", {"decorrelation": {"alpha": 3.0}}, False),
        ("online", {"last_positions": 8}, False),
        ("online", {"wire": {"activation_bits": 4}}, True),
        ("gradfree", {"cache": {"sealed": True}, "warm_up": {"steps": 4}}, False),
        ("offsite", {"emulator": {"distil_steps": 7}}, False),
        ("offsite", {"emulator": {"layers": 7}}, True),
        ("offsite", {"plug_in": False}, True),
        ("veil", {"protected": "here", "key": "there"}, False),
        ("veil", {"enclave_layers": 2}, True),
        ("local", {"norms": "precise"}, True),
    ],
)
def test_options_of_the_design_are_agreed_on_but_for_one_partys_business(
    design: str, options: dict[str, Any], agreed: bool
) -> None:
    plain, changed = load(design=design), load(design=design, **{design: options})
    assert changed.run_fingerprint() != plain.run_fingerprint()
    assert (changed.fingerprint() != plain.fingerprint()) is agreed


def test_how_a_hosts_machine_computes_is_its_own_business() -> None:
    plain = load(design="veil")
    changed = load(design="veil", veil={"ranks": 2, "compile": True, "checkpointing": True})
    assert changed != plain
    assert changed.fingerprint() == plain.fingerprint()
    assert changed.run_fingerprint() == plain.run_fingerprint()


def test_options_of_other_designs_are_not_agreed_on() -> None:
    assert load(online={"wire": {"activation_bits": 4}}).fingerprint() == load().fingerprint()


def test_the_fingerprint_is_the_same_where_a_default_is_spelt_out() -> None:
    for tables in (
        {"obfuscatune": {}},
        {"obfuscatune": {"matrix": "orthogonal"}},
        {"train": {"epochs": 1}},
        {"seed": 0},
    ):
        assert load(**tables) == load()
        assert load(**tables).fingerprint() == load().fingerprint()


def test_the_fingerprint_changes_with_the_condition_number() -> None:
    prints = {load(obfuscatune={"matrix": "conditioned", "condition_number": k}).fingerprint() for k in (1, 8, 8.5)}
    assert len(prints) == 3


@pytest.mark.parametrize("key", OWN)
def test_the_fingerprint_is_the_same_whatever_a_party_does_for_itself(key: str) -> None:
    changed = load(**nested({key: OWN[key]}))
    assert changed != load()
    assert changed.fingerprint() == load().fingerprint()
    assert changed.run_fingerprint() == load().run_fingerprint()


@given(st.permutations(sorted(OTHER)), st.integers(0, len(OTHER)))
def test_the_fingerprint_does_not_depend_on_the_order_of_keys(order: list[str], count: int) -> None:
    pairs = {key: OTHER[key] for key in order[:count]}
    one, other = load(**nested(pairs)), load(**nested(dict(reversed(pairs.items()))))
    assert one.fingerprint() == other.fingerprint()
    assert (one.fingerprint() == load().fingerprint()) == (not pairs)


def test_a_configuration_cannot_be_changed() -> None:
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # pyrefly: ignore
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # pyrefly: ignore


# --- tables within a design's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "given", "kept"),
    [
        ("online", "wire.group=64", {"activation_bits": 8, "gradient_bits": 8, "group": 64}),
        ("gradfree", "wire.rotate=false", {"activation_bits": 8, "rotate": False}),
        ("online", "decorrelation.samples=64", {"alpha": 1.0, "samples": 64}),
        ("offline", "emulator.layers=3", {"compression": "quantised", "layers": 3}),
        ("online", "wire.activation_bits=32", {"activation_bits": 32, "gradient_bits": 8}),
    ],
)
def test_a_table_given_in_part_keeps_the_rest_of_the_designs_default(
    design: str, given: str, kept: dict[str, Any]
) -> None:
    """One option must not switch the others' protection off."""
    options = load(f"{design}.{given}", design=design).design_options[design]
    table = options[given.partition(".")[0]]
    assert {name: table[name] for name in kept} == kept
