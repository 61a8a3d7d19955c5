"""Weights that lie sealed on the enclave's own disk: only a key comes from the provider, and everything else is as it was."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import PROBE_IDS, flipped, make_config, model_directory, run, tensors_of, transcripts
from test_attest_verbs import LAX
from test_enclave_services import organisations, ran
from veiltune.errors import CheckpointError, ModelError, VeiltuneError
from veiltune.models.sources import resolve_model
from veiltune.parties import Job
from veiltune.session.run import Outcome, PartyFailure
from veiltune.tee.attestation.policy import load_policy
from veiltune.tee.container import RecipientKey, load_recipient_key, make_recipient_key, open_container, seal
from veiltune.tee.container.layout import HEAD_BYTES
from veiltune.tee.container.reading import read_identity
from veiltune.tee.container.ring import KEYS
from veiltune.tee.enclave import Enclave
from veiltune.tee.verifier import verify_proof

DESIGNS = ("obfuscatune", "veil")
LINK = "provider->enclave"


@pytest.fixture
def provider_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipientKey:
    make_recipient_key(tmp_path / "keys", "provider")
    monkeypatch.setenv(KEYS, str(tmp_path / "keys"))
    return load_recipient_key(tmp_path / "keys" / "provider.recipient.key")


@pytest.fixture
def container(tmp_path: Path, provider_key: RecipientKey) -> Path:
    """The provider's, sealed for itself alone."""
    path = tmp_path / "vendor.sealed"
    seal(Path(model_directory("llama")), path, [provider_key.recipient])
    return path


def copied(container: Path, change: Callable[[bytes], bytes] = bytes) -> Path:
    copy = container.with_name("cloud.sealed")
    copy.write_bytes(change(container.read_bytes()))
    return copy


def probed(design: str, model: str, output: Path, copy: Path | None = None) -> tuple[Outcome, dict[str, torch.Tensor]]:
    enclave = {} if copy is None else {"sealed_model": str(copy)}
    config = make_config(design, model, output, enclave=enclave, **{design: {"key_seed": 3}})
    outcome = run(config, Job(verb="probe", probe={"input_ids": PROBE_IDS, "steps": 1}))
    return outcome, load_file(output / "parties" / "owner" / "probe.safetensors")


@pytest.mark.parametrize("design", DESIGNS)
def test_the_session_is_the_same_and_no_weights_come_from_the_provider(
    design: str, container: Path, tmp_path: Path
) -> None:
    """Two-sided: without the copy the same sealed model crosses, tensor by tensor, and nothing else differs."""
    outcome, found = probed(design, f"sealed:{container}", tmp_path / "copy", copied(container))
    streamed, expected = probed(design, f"sealed:{container}", tmp_path / "streamed")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    own, other = outcome.traffic[LINK], streamed.traffic[LINK]
    assert set(own) - set(other) == {"ModelKey"}
    assert set(other) - set(own) == {"WeightShard"}
    assert own["ModelKey"]["messages"] == 1
    assert sum(kind["bytes"] for kind in own.values()) < 2500
    assert other["WeightShard"]["bytes"] > resolve_model(model_directory("llama")).num_bytes


@pytest.mark.parametrize("design", DESIGNS)
def test_no_plain_weights_are_written(design: str, container: Path, tmp_path: Path) -> None:
    probed(design, f"sealed:{container}", tmp_path / "run", copied(container))
    name = "model.embed_tokens.weight"
    needle = dict(resolve_model(model_directory("llama")).tensors([name]))[name].numpy().tobytes()[:64]
    assert needle in b"".join(path.read_bytes() for path in Path(model_directory("llama")).glob("*.safetensors"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if needle in path.read_bytes()]


def test_it_can_be_provisioned_in_the_dtype_it_is_stored_in(container: Path, tmp_path: Path) -> None:
    """What a host is handed is the same to the byte, whether the weights were streamed or opened."""
    handed: list[list[dict[str, torch.Tensor]]] = []
    for copy in (None, copied(container)):
        enclave = {} if copy is None else {"sealed_model": str(copy)}
        output = tmp_path / ("copy" if copy else "streamed")
        tables = {"enclave": enclave, "session": {"record": ["host"]}, "veil": {"key_seed": 3}}
        run(
            make_config("veil", f"sealed:{container}", output, dtype="bfloat16", **tables),
            Job(verb="provision", native=True),
        )
        handed.append([dict(tensors_of(m)) for _, m in transcripts(output, "host") if type(m).__name__ == "TrunkShard"])
    streamed, opened = handed
    assert streamed
    assert [shard.keys() for shard in streamed] == [shard.keys() for shard in opened]
    for shard, other in zip(streamed, opened, strict=True):
        assert all(value.dtype == torch.bfloat16 and torch.equal(value, other[name]) for name, value in shard.items())


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(copy: Path, model: str, output: Path) -> PartyFailure:
    with pytest.raises(PartyFailure) as caught:
        probed("veil", model, output, copy)
    return caught.value


def test_another_sealing_of_the_same_model_is_another_container(
    container: Path, provider_key: RecipientKey, tmp_path: Path
) -> None:
    again = tmp_path / "again.sealed"
    seal(Path(model_directory("llama")), again, [provider_key.recipient])
    failure = refused(again, f"sealed:{container}", tmp_path / "run")
    assert failure.kind == ModelError.__name__
    assert "the enclave's sealed model is another container" in failure.message
    assert "copy that very file there" in str(failure.hint)


def test_a_provider_whose_model_is_not_sealed_says_so(container: Path, tmp_path: Path) -> None:
    failure = refused(copied(container), model_directory("llama"), tmp_path / "run")
    assert failure.kind == ModelError.__name__
    assert "is not sealed" in failure.message
    assert "enclave.sealed_model" in str(failure.hint)


def in_a_tensor(container: Path, key: RecipientKey) -> int:
    """Where the first tensor's bytes are."""
    with open_container(container, key) as opened:
        entry = next(iter(opened._tensors.values()))
        return HEAD_BYTES + opened._binding.prologue.index_bytes + entry.offset


@pytest.mark.parametrize("what", ["absent", "no container", "tensor", "index", "cut", "longer"])
def test_a_copy_that_is_not_as_it_was(what: str, container: Path, provider_key: RecipientKey, tmp_path: Path) -> None:
    changes: dict[str, Callable[[bytes], bytes]] = {
        "absent": bytes,
        "no container": lambda data: data[::-1],
        "tensor": lambda data: flipped(data, in_a_tensor(container, provider_key)),
        "index": lambda data: flipped(data, HEAD_BYTES + 9),
        "cut": lambda data: data[:-1],
        "longer": lambda data: data + b"\0",
    }
    copy = copied(container, changes[what])
    if what == "absent":
        copy.unlink()
    failure = refused(copy, f"sealed:{container}", tmp_path / "run")
    assert failure.kind == CheckpointError.__name__, failure.message
    assert "cloud.sealed" in failure.message
    assert failure.hint


def test_a_key_opens_for_the_proof_that_it_was_wrapped_for_alone(
    container: Path, provider_key: RecipientKey, tmp_path: Path
) -> None:
    """So a key that was handed over in an earlier session, or under other terms, is of no use in this one."""
    enclave = Enclave()
    proofs = [enclave.prove(bytes([number]) * 32, "ab" * 32) for number in range(2)]
    (tmp_path / "lax.toml").write_text(LAX)
    attested = verify_proof(proofs[0], None, load_policy(tmp_path / "lax.toml"))
    with open_container(container, provider_key) as opened:
        wrapped = opened.wrap(attested.recipient, purpose="model of ab")
    open_container(container, enclave.key_for(proofs[0]), purpose="model of ab", wrapped=wrapped).close()
    for key, purpose in (
        (enclave.key_for(proofs[1]), "model of ab"),
        (enclave.key_for(proofs[0]), "model of cd"),
        (Enclave().key_for(proofs[0]), "model of ab"),
    ):
        with pytest.raises(CheckpointError, match="does not open"):
            open_container(container, key, purpose=purpose, wrapped=wrapped)


def test_the_identity_is_that_of_copies_and_needs_no_key(container: Path, provider_key: RecipientKey) -> None:
    with open_container(container, provider_key) as opened:
        assert read_identity(copied(container)) == opened.identity
    with pytest.raises(VeiltuneError, match=r"cloud\.sealed"):
        read_identity(copied(container, lambda data: data[:3]))


# --- programs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
def test_services_of_which_the_provider_alone_has_a_key(
    container: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again once the enclave was killed, whose key for data keys dies with it."""
    keys = {"provider": {KEYS: str(tmp_path / "keys")}}
    monkeypatch.delenv(KEYS)
    copy = copied(container)
    changes: dict[str, Any] = {"model": f"sealed:{container}", "enclave__sealed_model": str(copy)}
    with organisations(tmp_path, "veil", environments=keys, **changes) as made:
        for attempt in ("owner", "second"):
            code, out, err = ran(["tune", made.owner(attempt), "--json"])
            assert code == 0, err
            record = json.loads(out)
            assert record["loss"] == made.expected(attempt)
            assert "WeightShard" not in json.dumps(record["cost"]["messages"])
            assert made.programs["provider"].wait_for("key_handed_over")
            if attempt == "owner":
                made.programs["enclave"].end(signal.SIGKILL)
                made.start("enclave")
        copy.write_bytes(flipped(copy.read_bytes(), copy.stat().st_size - 9))
        code, _, err = ran(["tune", made.owner("third")])
        assert code != 0
        assert "was altered or moved" in err
