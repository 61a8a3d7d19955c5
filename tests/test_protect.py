"""Protected checkpoints: bit for bit what a session's host gets, made tensor by tensor, refused when they are not whole."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from commands import Ran, runner
from helpers import make_config, model_directory, own_cache, relative_error, run, run_probe, tensors_of, transcripts
from veiltune.designs.veil import VeilOptions, protection
from veiltune.designs.veil.protection import load_key, load_protected, protection_plan
from veiltune.errors import CheckpointError, ConfigError, ModelError, VeiltuneError
from veiltune.models.checkpoint import open_checkpoint
from veiltune.models.random_weights import write_random_weights
from veiltune.parties.party import Job
from veiltune.parties.protected import (
    Manifest,
    default_key_path,
    open_key,
    protect,
    read_manifest,
    shard_file,
    streaming,
)
from veiltune.secrets import MasterSecret
from veiltune.session import PartyFailure
from veiltune.session.protection import Protection, protect_model
from veiltune.transport.messages import TrunkShard

MODELS = ("gpt2", "opt", "llama-tied-biased", "qwen3")


@pytest.fixture
def veiltune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return runner(capsys)


def protected(directory: Path, model: str = "gpt2", *overrides: str, **arguments: Any) -> Protection:
    source = model if ":" in model or "/" in model else model_directory(model)
    with own_cache():
        return protect_model(source, directory / "host", overrides=overrides, **arguments)


def veil_of(directory: Path, **options: Any) -> dict[str, Any]:
    return {"protected": str(directory / "host"), **options}


def on_disk(directory: Path) -> dict[str, Tensor]:
    return {n: v for path in sorted((directory / "host").glob("*.safetensors")) for n, v in load_file(path).items()}


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_it_is_bit_for_bit_what_a_sessions_host_receives(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with another secret it is something else: the comparison can fail."""
    monkeypatch.setattr(MasterSecret, "generate", classmethod(lambda cls: cls.for_tests(21)))
    protected(tmp_path, model)
    for seed, is_same in ((21, True), (22, False)):
        output = tmp_path / str(seed)
        config = make_config("veil", model, output, session={"record": ["host"]}, veil={"key_seed": seed})
        run(config, "provision")
        shards = [message for _, message in transcripts(output, "host") if isinstance(message, TrunkShard)]
        received = {name: value for shard in shards for name, value in shard.tensors.items()}
        found = on_disk(tmp_path)
        assert received.keys() == found.keys()
        assert all(torch.equal(found[name], value) == is_same for name, value in received.items() if value.dim() == 2)
        trunk = dict(load_protected(tmp_path / "host").model.named_parameters())
        assert trunk.keys() == found.keys()
        assert all(torch.equal(trunk[name], value) for name, value in found.items())


def test_nothing_of_the_enclaves_and_nothing_plain_is_in_it(tmp_path: Path) -> None:
    protected(tmp_path, "gpt2")
    plain = load_plain("gpt2")
    found = on_disk(tmp_path)
    assert {name.split(".")[2] for name in found} == {"1"}  # the second of two blocks; the first is the enclave's
    rows = {name: value for name, value in found.items() if value.dim() == 2}
    assert len(rows) == 4
    for name, value in rows.items():
        assert relative_error(value, plain[name]) > 0.1
    written = b"".join(path.read_bytes() for path in (tmp_path / "host").iterdir())
    secret = open_key(default_key_path(tmp_path / "host")).master.reveal()
    assert secret not in written
    assert secret.hex().encode() not in written


def load_plain(model: str) -> dict[str, Tensor]:
    folder = Path(model_directory(model))
    return {n: v for path in folder.glob("*.safetensors") for n, v in load_file(path).items()}


def test_the_key_says_nothing_of_itself(tmp_path: Path) -> None:
    made = protected(tmp_path)
    key = open_key(made.key)
    secret = key.master.reveal()
    for text in (repr(key), str(key), f"{key}", repr(made), json.dumps(made.as_json())):
        assert secret.hex() not in text
        assert repr(secret) not in text
    with pytest.raises(TypeError, match="cannot be copied"):
        __import__("copy").deepcopy(key)
    assert made.key.stat().st_mode & 0o777 == 0o600
    assert secret not in made.key.read_bytes()


def test_bfloat16_is_kept_and_another_dtype_is_cast_before_it_is_protected(tmp_path: Path) -> None:
    from veiltune.models.presets import random_config

    source = tmp_path / "source"
    source.mkdir()
    write_random_weights(random_config("random:qwen2:2,32,4,259"), source, torch.bfloat16)
    for name, dtype in ((None, torch.bfloat16), ("float32", torch.float32)):
        protected(tmp_path / str(name), str(source), dtype=name)
        assert {value.dtype for value in on_disk(tmp_path / str(name)).values()} == {dtype}


# --- sessions with it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "optimizer_at"), [("gpt2", "enclave"), ("qwen2", "host")])
def test_a_session_with_it_computes_what_one_without_it_does(model: str, optimizer_at: str, tmp_path: Path) -> None:
    """Even a generation and the adapter's way back; and no weight crosses from the enclave to the host.

    In float64: the two sessions have other keys, and rounding must not turn over a near tie of a random model's tokens.
    """
    protected(tmp_path, model, dtype="float64")
    of_disk = veil_of(tmp_path, optimizer_at=optimizer_at)
    exact: dict[str, Any] = {"generate": 4, "dtype": "float64"}
    expected = run_probe("veil", model, tmp_path / "sent", **exact, veil={"optimizer_at": optimizer_at})
    found = run_probe("veil", model, tmp_path / "mapped", **exact, veil=of_disk)
    assert relative_error(found["logits"], expected["logits"]) < 1e-6
    if optimizer_at == "enclave":  # at the host factors differ from session to session, and so does what was tuned
        assert found["tokens"].tolist() == expected["tokens"].tolist()
        assert relative_error(found["logits_tuned"], expected["logits_tuned"]) < 1e-6
    output = tmp_path / "traffic"
    config = make_config("veil", model, output, dtype="float64", veil=veil_of(tmp_path), session={"record": ["host"]})
    traffic = run(config, Job(verb="provision")).traffic["enclave->host"]
    assert "TrunkShard" not in traffic
    assert not [v for _, m in transcripts(output, "host") for n, v in tensors_of(m) if "lora" not in n]


@pytest.mark.parametrize(
    ("options", "tables", "message"),
    [
        ({"inner": False}, {}, r"protected with veil\.inner = True, the session has False"),
        ({"key_seed": 1}, {}, "cannot both say"),
        ({"key": "nowhere"}, {}, "there is no key 'nowhere'"),
        ({}, {"dtype": "float64"}, r"is torch\.float32, the session computes in torch\.float64"),
        ({}, {"dtype": "bfloat16"}, "cannot be used where bfloat16 is imitated"),
    ],
)
def test_a_session_that_does_not_fit_it_is_refused(
    options: dict[str, Any], tables: dict[str, Any], message: str, tmp_path: Path
) -> None:
    protected(tmp_path)
    config = make_config("veil", "gpt2", tmp_path / "run", veil=veil_of(tmp_path, **options), **tables)
    with pytest.raises(PartyFailure, match=message) as caught:
        run(config, "provision")
    assert caught.value.hint


def test_a_key_of_another_checkpoint_is_refused_by_fingerprint(tmp_path: Path) -> None:
    protected(tmp_path)
    other = protected(tmp_path / "other", "gpt2-untied")
    config = make_config("veil", "gpt2", tmp_path / "run", veil=veil_of(tmp_path, key=str(other.key)))
    with pytest.raises(PartyFailure, match=rf"the key is of the checkpoint {other.fingerprint[:16]}…") as caught:
        run(config, "provision")
    assert caught.value.kind == CheckpointError.__name__
    again = protected(tmp_path / "again")  # the same checkpoint, protected a second time: another key
    config = make_config("veil", "gpt2", tmp_path / "run2", veil=veil_of(tmp_path, key=str(again.key)))
    with pytest.raises(PartyFailure, match="the key is of the protected checkpoint"):
        run(config, "provision")


@pytest.mark.parametrize(("design", "from_disk"), [("veil", False), ("veil", True), ("obfuscatune", False)])
def test_a_run_is_not_resumed_on_other_weights(design: str, tmp_path: Path, *, from_disk: bool) -> None:
    """Sealed state is bound to the weights' fingerprint, whatever the path to them."""
    from helpers import write_examples

    source = tmp_path / "source"
    shutil.copytree(model_directory("gpt2"), source)
    options: dict[str, Any] = {}
    if from_disk:
        protected(tmp_path, str(source))
        options = {"veil": veil_of(tmp_path)}
    data = {"train": str(write_examples(tmp_path / "train.jsonl", 8))}
    config = make_config(design, str(source), tmp_path / "run", data=data, train={"steps": 1}, **options)
    run(config, "tune")
    probe = Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 1})
    run(config, probe, resume=True)
    path = next(path for path in sorted(source.glob("*.safetensors")))
    save_file({name: value + 0.01 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(PartyFailure, match="the key is of the checkpoint" if options else "was begun with the weights"):
        run(config, probe, resume=True)


# --- interrupted, altered, full ---------------------------------------------------------------------------------------

DEEP = "random:llama:4,32,4,259"


class Stop(Exception):  # noqa: N818
    """A process that ends."""


def interrupted(directory: Path, after: int) -> None:
    def stop(_event: str, fields: dict[str, Any]) -> None:
        if fields["block"] == after:
            raise Stop

    with pytest.raises(Stop):
        protected(directory, DEEP, on_event=stop)


def test_what_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    """Whole blocks are not made again, and the end is what it would have been: the same secret, the same bytes."""
    interrupted(tmp_path, after=2)
    with pytest.raises(CheckpointError, match="is half-written: 2 shards"):
        load_protected(tmp_path / "host")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "host").glob("*.safetensors")}
    assert len(before) == 2
    protected(tmp_path, DEEP)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "host").glob("*.safetensors")}
    assert len(after) == 3
    assert before.items() <= after.items()
    manifest = read_manifest(tmp_path / "host")
    shutil.rmtree(tmp_path / "host")
    (tmp_path / "host").mkdir()
    manifest.with_shards(()).write(tmp_path / "host")  # all of it again, under the same key
    protected(tmp_path, DEEP)
    assert read_manifest(tmp_path / "host") == manifest


def test_an_altered_or_cut_shard_is_refused_and_made_again_on_request(tmp_path: Path) -> None:
    protected(tmp_path)
    path = next((tmp_path / "host").glob("*.safetensors"))
    intact = path.read_bytes()
    for damage in (intact[:-1] + bytes([intact[-1] ^ 1]), intact[:-8]):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match="was altered or cut"):
            load_protected(tmp_path / "host")
        with pytest.raises(PartyFailure, match="was altered or cut"):
            run(make_config("veil", "gpt2", tmp_path / f"run{len(damage)}", veil=veil_of(tmp_path)), "provision")
        protected(tmp_path)
        assert path.read_bytes() == intact
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_protected(tmp_path / "host")


def test_an_altered_manifest_is_refused_by_the_key(tmp_path: Path) -> None:
    """A shard that was exchanged together with its digest passes the host's own check, and not the enclave's."""
    protected(tmp_path)
    manifest = read_manifest(tmp_path / "host")
    path = tmp_path / "host" / manifest.shards[0].file
    tensors = load_file(path)
    save_file({name: value * 2 for name, value in tensors.items()}, path)
    from veiltune.parties.protected.manifest import describe_shard

    manifest.with_shards((describe_shard(path),), complete=True).write(tmp_path / "host")
    load_protected(tmp_path / "host")
    options = VeilOptions.model_validate(veil_of(tmp_path))
    with pytest.raises(CheckpointError, match="the manifest is not the one"):
        load_key(options, manifest.fingerprint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "has version None"),
        ('{"version": 9}', "has version 9, not 1"),
        ('{"version": 1, "design": 3}', "is damaged at"),
    ],
)
def test_a_damaged_manifest_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_a_shard_outside_the_directory_is_no_shard(tmp_path: Path) -> None:
    protected(tmp_path)
    path = tmp_path / "host" / "manifest.json"
    raw = json.loads(path.read_text())
    raw["shards"][0]["file"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="is damaged at"):
        read_manifest(tmp_path / "host")


def test_a_full_disk_leaves_nothing_that_could_be_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = shard_file._write

    def full(path: Path, *arguments: Any) -> None:
        original(path, *arguments)
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(shard_file, "_write", full)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            protected(tmp_path)
    assert "goes on" in str(caught.value.hint)
    assert [path.name for path in (tmp_path / "host").iterdir()] == ["manifest.json"]
    with monkeypatch.context() as patch:
        patch.setattr(streaming.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # pyrefly: ignore
        with pytest.raises(CheckpointError, match=r"GB are free"):
            protected(tmp_path)
    protected(tmp_path)
    load_protected(tmp_path / "host")


def test_another_checkpoint_or_option_does_not_go_on_with_it(tmp_path: Path) -> None:
    protected(tmp_path)
    for model, overrides, message in (
        ("gpt2-untied", (), "was begun with fingerprint"),
        ("gpt2", ("veil.inner=false",), "was begun with options"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            protected(tmp_path, model, *overrides)
        assert "--overwrite" in str(caught.value.hint)
    before = read_manifest(tmp_path / "host")
    protected(tmp_path, "gpt2-untied", overwrite=True)
    assert read_manifest(tmp_path / "host").identity != before.identity
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"is not empty|will not be overwritten"):
            protect_model(model_directory("gpt2"), tmp_path / "letters", overwrite=overwrite)


def test_a_key_that_is_gone_or_open_to_others_is_refused(tmp_path: Path) -> None:
    made = protected(tmp_path)
    made.key.chmod(0o644)
    with pytest.raises(CheckpointError, match="may be read by others"):
        open_key(made.key)
    made.key.unlink()
    with pytest.raises(CheckpointError, match="there is no key"):
        protected(tmp_path)
    with pytest.raises(ConfigError, match="in the host's directory"):
        protected(tmp_path / "new", key=tmp_path / "new" / "host" / "key")


# --- sources that are refused -----------------------------------------------------------------------------------------


def altered_source(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """GPT-2's folder as one file, changed."""
    source = directory / "source"
    shutil.copytree(model_directory("gpt2"), source, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_plain("gpt2")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def set_to(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


WEIGHT = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to(WEIGHT, torch.full((32, 128), float("nan"))), f"{WEIGHT}' of .* is not finite"),
        (set_to("transformer.wte.weight", torch.full((259, 32), float("inf"))), r"wte\.weight' of .* is not finite"),
        (set_to("transformer.h.1.extra.weight", torch.ones(2)), r"unexpected tensor 'transformer\.h\.1\.extra"),
        (set_to(WEIGHT, None), f"lacks '{WEIGHT}'"),
        (set_to(WEIGHT, torch.ones(32, 64)), r"has shape \(32, 64\), the architecture wants \(32, 128\)"),
        (set_to(WEIGHT, torch.ones(32, 128, dtype=torch.int8)), "is stored as I8"),
    ],
)
def test_a_source_that_is_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    source = altered_source(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        protected(tmp_path, str(source))
    with pytest.raises(CheckpointError):  # whatever was begun is not taken for whole
        load_protected(tmp_path / "host")


def test_a_family_whose_folding_gives_the_rotation_away_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gives the rotation away"):
        protected(tmp_path, "random:gemma3:2,32,4,259")
    protected(tmp_path, "random:gemma3:2,32,4,259", "veil.sandwich_norms=open")
    assert load_protected(tmp_path / "host").model is not None


def test_a_quantised_source_is_refused(tmp_path: Path) -> None:
    source = altered_source(tmp_path, lambda _: None)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="is quantised"):
        protected(tmp_path, str(source))


# --- one tensor at a time ---------------------------------------------------------------------------------------------


def test_no_more_than_one_tensor_is_read_before_the_last_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the maps of a block are gone when it is done: nothing grows with the depth."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    original = streaming.read_group

    def read(checkpoint: Any, group: dict[str, str]) -> dict[str, Tensor]:
        assert len(group) == 1
        assert sum(ref() is not None for ref in alive) <= 1, "tensors pile up"
        found = original(checkpoint, group)
        alive.extend(weakref.ref(value) for value in found.values())
        return found

    monkeypatch.setattr(streaming, "read_group", read)
    config = open_checkpoint("x", Path(model_directory("llama"))).config
    plan = protection_plan(config, VeilOptions())
    made: list[Any] = []

    def make(secret: MasterSecret) -> Any:
        made.append(plan.make(secret))
        return made[0]

    checkpoint = open_checkpoint("x", Path(model_directory("llama")), cache_dir=tmp_path / "cache")
    manifest: Manifest = protect(
        checkpoint,
        streaming.Plan(plan.design, plan.options, make),
        tmp_path / "host",
        tmp_path / "keys" / "key",
    )
    assert manifest.complete
    assert len(alive) == len(checkpoint.index)
    assert made[0]._folding._inner == {}
    assert made[0]._folding._reads == {}


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made(veiltune: Callable[..., Ran], tmp_path: Path) -> None:
    arguments = ("protect", model_directory("gpt2"), "--to", str(tmp_path / "host"), "--json")
    ran = veiltune(*arguments)
    assert ran.code == 0, ran.err
    manifest = read_manifest(tmp_path / "host")
    assert ran.json["shards"] == len(manifest.shards) == 1
    assert ran.json["fingerprint"] == manifest.fingerprint
    assert ran.json["key"] == str(default_key_path(tmp_path / "host"))
    assert ran.json["peak_rss"] > 0
    assert "protecting 1/1" in ran.err
    refused = veiltune("protect", "random:gpt2", "--to", str(tmp_path / "x"), "--design", "obfuscatune", "--json")
    assert refused.code == 2
    assert "obfuscatune" in refused.json["error"]


def test_errors_are_of_this_package(tmp_path: Path) -> None:
    with pytest.raises(VeiltuneError, match="is no protected checkpoint"):
        load_protected(tmp_path)
    assert protection.NAME == "veil"
