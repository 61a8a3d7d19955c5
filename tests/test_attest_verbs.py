"""``veiltune attest`` and ``veiltune seal``: what they show and write, what they refuse, and that a sealed model is the model."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import Ran, runner, write_config
from helpers import PROBE_IDS, flipped, make_config, model_directory, run, write_examples
from test_attestation import INTEL, MEASURED, POLICY, checked, sgx, snp, tdx
from veiltune.config import load_config
from veiltune.data import load_examples
from veiltune.designs import option_tables
from veiltune.errors import CheckpointError, ConfigError, DataError, ModelError
from veiltune.models.sources import resolve_config, resolve_model
from veiltune.parties import Job
from veiltune.tee.attestation.describe import claims_of
from veiltune.tee.attestation.evidence import Evidence
from veiltune.tee.container import load_recipient_key, make_recipient_key, open_container, seal
from veiltune.tee.container.layout import HEAD_BYTES
from veiltune.tee.container.ring import KEYS, open_sealed, own_keys
from veiltune.tee.proof import Proof, read_proof

Command = Callable[..., Ran]
LAX = "version = 1\nallow_simulated = true\n"


@pytest.fixture
def veiltune(capsys: pytest.CaptureFixture[str]) -> Command:
    return runner(capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Policies: one that allows a simulated enclave, one that does not."""
    (tmp_path / "lax.toml").write_text(LAX)
    (tmp_path / "strict.toml").write_text(POLICY)
    return tmp_path


def refused(ran: Ran, code: int, error: str, hint: str = "") -> None:
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert error in ran.err
    assert hint in ran.err


# --- attest -----------------------------------------------------------------------------------------------------------


def test_evidence_of_this_machine_is_shown_and_said_to_be_simulated(veiltune: Command, folder: Path) -> None:
    ran = veiltune("attest", "--json", "--to", str(folder / "evidence.json"))
    assert ran.code == 0
    assert (ran.json["simulated"], ran.json["verified"], ran.json["fresh"]) == (True, None, True)
    assert "SIMULATED ENCLAVE" in ran.err
    assert "not verified" in ran.err
    again = veiltune("attest", "--json", "--evidence", str(folder / "evidence.json"))
    assert (again.json["claims"], again.json["nonce"]) == (ran.json["claims"], ran.json["nonce"])
    assert again.json["fresh"] is False
    assert "of unknown age" in again.err


def test_evidence_is_held_against_a_policy(veiltune: Command, folder: Path) -> None:
    evidence = str(folder / "evidence.json")
    made = veiltune("attest", "--json", "--to", evidence, "--policy", str(folder / "lax.toml"))
    assert made.json["verified"]["tee"] == "simulated"
    assert veiltune("attest", "--evidence", evidence, "--policy", str(folder / "lax.toml")).code == 0
    strict = ("--policy", str(folder / "strict.toml"))
    refused(veiltune("attest", "--evidence", evidence, *strict), 3, "the enclave is simulated", "allow_simulated")
    refused(veiltune("attest", *strict), 3, "the enclave is simulated")
    as_json = veiltune("attest", "--json", *strict)
    assert as_json.json.keys() == {"error", "hint"}


def test_evidence_is_for_the_nonce_and_the_configuration_that_are_given(veiltune: Command, folder: Path) -> None:
    config = str(write_config(folder))
    evidence, nonce = str(folder / "evidence.json"), "ab" * 32
    made = veiltune("attest", "--json", "--to", evidence, "--nonce", nonce, "--config", config)
    fingerprint = load_config(Path(config), options=option_tables()).fingerprint()
    assert (made.json["nonce"], made.json["config_fingerprint"]) == (nonce, fingerprint)
    look = ("attest", "--evidence", evidence)
    assert veiltune(*look, "--json", "--nonce", nonce, "--config", config).json["fresh"] is True
    refused(veiltune(*look, "--nonce", "ac" * 32), 3, "not for our nonce", "replay")
    other = ("--config", config, "--set", "lora.rank=7")
    refused(veiltune(*look, *other), 3, "the enclave runs the configuration", "same configuration")


def test_altered_evidence_is_refused(veiltune: Command, folder: Path) -> None:
    path = folder / "evidence.json"
    veiltune("attest", "--to", str(path))
    proof = read_proof(path)
    altered = proof.evidence.replace(b'"signature":"', b'"signature":"AAAA')[: len(proof.evidence)]
    for content in (Proof(altered, proof.runtime).encode(), flipped(path.read_bytes(), 40), b"", b"{}"):
        path.write_bytes(content)
        refused(veiltune("attest", "--evidence", str(path), "--policy", str(folder / "lax.toml")), 3, "evidence")


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("--nonce", "abc"), 2, "--nonce 'abc'"),
        (("--nonce", "ab" * 31), 2, "is no nonce"),
        (("--evidence", "absent.json"), 2, "'absent.json'"),
        (("--policy", "absent.toml"), 2, "'absent.toml'"),
        (("--evidence", "evidence.json", "--key", "enclave.recipient.key"), 2, "--key is for evidence of this machine"),
        (("--evidence", "evidence.json", "--to", "other.json"), 2, "--to is for evidence of this machine"),
        (("--key", "other.key"), 2, "there is no key 'other.key'"),
        (("--key", "owner.recipient.key"), 2, "the owner's"),
        (("--set", "lora.rank=7"), 2, "--set"),
    ],
)
def test_a_mistake_is_named(
    arguments: tuple[str, ...],
    code: int,
    error: str,
    veiltune: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_recipient_key(tmp_path, "owner")
    refused(veiltune("attest", *arguments), code, error)


@pytest.mark.parametrize("tee", MEASURED)
def test_what_evidence_says_of_itself_is_what_verification_finds(tee: str, folder: Path) -> None:
    from veiltune.tee.attestation.policy import load_policy

    for name in ("sgx", "tdx"):
        (folder / f"{name}.json").write_text(INTEL.collateral(name))
    evidence: Evidence = {"sgx": sgx, "tdx": tdx, "snp": snp}[tee]()
    verified = checked(evidence, load_policy(folder / "strict.toml"))
    claims = claims_of(evidence)
    measured = {"sgx": "mr_enclave", "tdx": "mr_td", "snp": "measurement"}[tee]
    assert (claims["tee"], claims[measured]) == (tee, verified.measurement)
    if tee == "tdx":
        assert {claims[f"rtmr{number}"] for number in range(3)} == {"0b" * 48}
    assert len(claims["report_data"]) == 128


# --- seal -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The key ring of a provider."""
    made = tmp_path / "keys"
    make_recipient_key(made, "provider")
    monkeypatch.setenv(KEYS, str(made))
    return made


def sealed_model(directory: Path, keys: Path, name: str = "llama-tied-biased") -> str:
    key = load_recipient_key(keys / "provider.recipient.key")
    seal(Path(model_directory(name)), directory / f"{name}.sealed", [key.recipient])
    return f"sealed:{directory / name}.sealed"


def test_a_model_is_sealed_for_others_and_oneself_and_is_a_source(
    veiltune: Command, keys: Path, tmp_path: Path
) -> None:
    make_recipient_key(tmp_path / "theirs", "enclave")
    target = tmp_path / "model.sealed"
    theirs, own = tmp_path / "theirs" / "enclave.recipient.toml", keys / "provider.recipient.key"
    sealing = ("seal", model_directory("gpt2"), "--to", str(target), "--for", str(theirs), "--key", str(own))
    ran = veiltune(*sealing, "--json")
    assert ran.code == 0, ran.err
    assert [each["role"] for each in ran.json["recipients"]] == ["enclave", "provider"]
    assert (ran.json["purpose"], ran.json["num_bytes"]) == ("model", target.stat().st_size)
    assert "config.json" in ran.json["files"]
    for key in (own, tmp_path / "theirs" / "enclave.recipient.key"):
        open_container(target, load_recipient_key(key)).close()
    refused(veiltune(*sealing), 2, "is there already")
    assert veiltune(*sealing, "--overwrite").code == 0
    shown = veiltune("inspect", f"sealed:{target}", "--json")
    plain = veiltune("inspect", model_directory("gpt2"), "--json")
    assert shown.code == 0, shown.err
    assert {**shown.json, "model": ""} == {**plain.json, "model": ""}


def test_evidence_is_a_recipient_under_a_policy_alone(veiltune: Command, folder: Path) -> None:
    evidence, key = folder / "evidence.json", folder / "guest" / "enclave.recipient.key"
    made = veiltune("attest", "--json", "--key", str(key), "--to", str(evidence))
    assert made.json["recipient"] == load_recipient_key(key).recipient.fingerprint
    (folder / "notes.jsonl").write_text('{"text": "a note"}\n')
    target = folder / "notes.sealed"
    sealing = ("seal", str(folder / "notes.jsonl"), "--to", str(target), "--for", str(evidence))
    refused(veiltune(*sealing), 2, "no policy says what is accepted", "--policy")
    refused(veiltune(*sealing, "--policy", str(folder / "strict.toml")), 3, "the enclave is simulated")
    assert not target.exists()
    ran = veiltune(*sealing, "--policy", str(folder / "lax.toml"), "--json")
    assert ran.json["recipients"][0]["known_by"] == "simulated"
    with open_container(target, load_recipient_key(key), purpose="data") as container:
        assert container.read("notes.jsonl") == b'{"text": "a note"}\n'


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("model",), "sealed for nobody"),
        (("sealed:x", "--key", "provider.recipient.key"), "is sealed already"),
        (("model", "--for", "absent.toml"), "'absent.toml'"),
        (("model", "--for", "absent.json"), "'absent.json'"),
        (("absent/model/x", "--key", "provider.recipient.key"), "'absent/model/x'"),
    ],
)
def test_what_cannot_be_sealed_is_named(
    arguments: tuple[str, ...], error: str, veiltune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(veiltune("seal", *arguments, "--to", "out.sealed"), 2, error)
    assert not (tmp_path / "out.sealed").exists()


# --- a sealed model is the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biased"])
def test_a_sealed_checkpoint_reads_as_its_folder_does(name: str, keys: Path, tmp_path: Path) -> None:
    source = sealed_model(tmp_path, keys, name)
    plain, sealed = resolve_model(model_directory(name)), resolve_model(source)
    assert sealed.tensor_names() == plain.tensor_names()
    assert (sealed.num_parameters, sealed.num_bytes) == (plain.num_parameters, plain.num_bytes)
    assert sealed.fingerprint == plain.fingerprint
    assert resolve_config(source).to_dict() | {"_name_or_path": ""} == plain.config.to_dict() | {"_name_or_path": ""}
    for (one, value), (other, expected) in zip(sealed.tensors(), plain.tensors(), strict=True):
        assert one == other
        assert torch.equal(value, expected)
    text = "The cat is red."
    assert sealed.load_tokenizer()(text)["input_ids"] == plain.load_tokenizer()(text)["input_ids"]
    ids = torch.tensor([[5, 9, 77]])
    with torch.no_grad():
        assert torch.equal(sealed.load_plain()(ids).logits, plain.load_plain()(ids).logits)
    with pytest.raises(ModelError, match="no tensor 'absent'"):
        list(sealed.tensors(["absent"]))


def probe(model: str, output: Path) -> dict[str, torch.Tensor]:
    config = make_config("obfuscatune", model, output, obfuscatune={"key_seed": 3})
    run(config, Job(verb="probe", probe={"input_ids": PROBE_IDS, "steps": 1}))
    return load_file(output / "parties" / "owner" / "probe.safetensors")


def test_a_session_with_a_sealed_model_is_the_same_and_leaves_no_plain_weights(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sealed_model(tmp_path, keys, "gpt2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    written: list[bytes] = []
    original = Path.write_bytes

    def watched(path: Path, data: Any) -> int:
        written.append(bytes(data))
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", watched)
    found = probe(source, tmp_path / "sealed")
    expected = probe(model_directory("gpt2"), tmp_path / "plain")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    weight = dict(resolve_model(model_directory("gpt2")).tensors(["transformer.h.0.mlp.c_fc.weight"]))
    needle = next(iter(weight.values())).numpy().tobytes()[:64]
    files = [path.read_bytes() for top in ("sealed", "tmp", "keys") for path in (tmp_path / top).rglob("*.*")]
    assert files
    assert not [data for data in (*files, *written) if needle in data]
    assert needle in b"".join(path.read_bytes() for path in Path(model_directory("gpt2")).glob("*.safetensors"))
    assert any(b"model_type" in data for data in written), "the small files were watched"


@pytest.mark.parametrize("at", ["head", "tensor"])
def test_an_altered_container_is_refused(at: str, keys: Path, tmp_path: Path) -> None:
    source = sealed_model(tmp_path, keys)
    path = Path(source.removeprefix("sealed:"))
    content = path.read_bytes()
    with open_sealed(source, purpose="model") as container:
        entry = next(iter(container._tensors.values()))
        place = HEAD_BYTES + container._binding.prologue.index_bytes + entry.offset
    path.write_bytes(flipped(content, 50 if at == "head" else place))
    with pytest.raises(CheckpointError):
        list(resolve_model(source).tensors())


def test_only_a_key_of_the_ring_opens(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sealed_model(tmp_path, keys)
    make_recipient_key(keys, "another")
    assert len(own_keys()) == 2
    open_sealed(source, purpose="model").close()
    with pytest.raises(CheckpointError, match="none of 2 keys opens"):
        open_sealed(source, purpose="data")
    (keys / "provider.recipient.key").chmod(0o644)
    with pytest.raises(ConfigError, match="may be read or changed by others"):
        resolve_model(source)
    (keys / "provider.recipient.key").unlink()
    with pytest.raises(CheckpointError, match="is not sealed for"):
        resolve_model(source)
    monkeypatch.setenv(KEYS, str(tmp_path / "tmp"))
    with pytest.raises(ConfigError, match="cannot read"):
        resolve_model(source)
    monkeypatch.delenv(KEYS)
    with pytest.raises(ConfigError, match=f"{KEYS} is not set") as caught:
        resolve_model(source)
    assert KEYS in str(caught.value.hint)


def test_a_container_without_a_model_is_no_model(keys: Path, tmp_path: Path) -> None:
    key = load_recipient_key(keys / "provider.recipient.key")
    (tmp_path / "notes.jsonl").write_text("{}")
    seal(tmp_path / "notes.jsonl", tmp_path / "notes.sealed", [key.recipient])
    with pytest.raises(ModelError, match="holds no model"):
        resolve_model(f"sealed:{tmp_path / 'notes.sealed'}")


# --- sealed data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_sealed_data_reads_as_its_file_does(ending: str, keys: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_examples(tmp_path / "rows", 5).read_text().splitlines()]
    path = tmp_path / f"notes.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    key = load_recipient_key(keys / "provider.recipient.key")
    seal(path, tmp_path / "notes.sealed", [key.recipient], purpose="data")
    found = load_examples(f"sealed:{tmp_path / 'notes.sealed'}")
    assert found == load_examples(str(path))
    assert len(found) == 5


def test_sealed_data_of_another_kind_is_refused(keys: Path, tmp_path: Path) -> None:
    key = load_recipient_key(keys / "provider.recipient.key")
    (tmp_path / "notes.docx").write_text("text")
    seal(tmp_path / "notes.docx", tmp_path / "notes.sealed", [key.recipient], purpose="data")
    with pytest.raises(DataError, match=r"holds 'notes.docx'"):
        load_examples(f"sealed:{tmp_path / 'notes.sealed'}")
    seal(Path(model_directory("gpt2")), tmp_path / "model.sealed", [key.recipient], purpose="data")
    with pytest.raises(DataError, match=r"holds \d+ files"):
        load_examples(f"sealed:{tmp_path / 'model.sealed'}")
