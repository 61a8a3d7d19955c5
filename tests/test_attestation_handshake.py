"""An enclave proves itself within the channel: for this nonce, configuration and both ends' keys, under the asker's policy."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers import flipped, make_config
from quote_factory import NOW, Intel
from test_secure_channel import handshake, meet
from veiltune.config import Config, EnclaveConfig
from veiltune.designs import DESIGNS
from veiltune.errors import AttestationError, CheckpointError, ConfigError, VeiltuneError
from veiltune.parties.party import Job, Party
from veiltune.peers import PeerConfig, digest_of
from veiltune.session.party_main import design_options
from veiltune.tee import enclave as enclave_module
from veiltune.tee import verifier
from veiltune.tee.attestation.evidence import RootsForTests, verify_evidence
from veiltune.tee.attestation.policy import Policy
from veiltune.tee.attestation.quotes import QuoteEvidence
from veiltune.tee.attestation.runtime import RuntimeData
from veiltune.tee.attestation.simulated import WARNING
from veiltune.tee.attestation.verdict import SIMULATED
from veiltune.tee.container import RecipientKey, open_container, seal
from veiltune.tee.enclave import Enclave
from veiltune.tee.proof import Proof, read_proof, write_proof
from veiltune.tee.verifier import Attested, Challenge, accepted_by, verify_enclave, verify_proof
from veiltune.transport.channel import Channel, memory_pair
from veiltune.transport.identity import Identity, new_identity
from veiltune.transport.secure_channel import SecureChannel
from veiltune.transport.session_link import SessionLink
from veiltune.transport.transcript import Meter

FINGERPRINT = "f0" * 32
LAX = Policy(allow_simulated=True)
ENCLAVE = Enclave(gramine=Path("nowhere"), tsm=Path("nowhere"))
OWNER, THEIRS, MIDDLE = new_identity("owner"), new_identity("enclave"), new_identity("owner")
PEERS = tuple(PeerConfig(role=each.role, key=each.pin) for each in (OWNER, THEIRS, MIDDLE))
MR_ENCLAVE = b"\x77" * 32
INTEL = Intel()


def proven(challenge: Challenge, enclave: Enclave = ENCLAVE) -> Proof:
    return enclave.prove(
        challenge.nonce,
        challenge.config_fingerprint,
        tls_spki_sha256=challenge.tls_spki_sha256,
        client_spki_sha256=challenge.client_spki_sha256,
    )


# --- one proof --------------------------------------------------------------------------------------------------------


def test_a_simulated_enclave_says_so_wherever_it_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        enclave = Enclave(gramine=Path("nowhere"), tsm=Path("nowhere"))
        assert WARNING in caplog.text
        caplog.clear()
        challenge = Challenge.fresh(FINGERPRINT)
        attested = verify_proof(proven(challenge, enclave), challenge, LAX)
        assert WARNING in caplog.text
    assert enclave.is_simulated
    assert (attested.verified.label, attested.verified.record()["simulated"]) == (SIMULATED, True)
    assert b"protects nothing" in proven(challenge).evidence
    assert repr(enclave) == "<Secret Enclave simulated redacted>"


@pytest.mark.parametrize("field", [each.name for each in dataclasses.fields(Challenge)])
def test_a_proof_is_for_one_challenge(field: str) -> None:
    challenge = Challenge(bytes(32), FINGERPRINT, bytes([1] * 32), bytes([2] * 32))
    proof = proven(challenge)
    verify_proof(proof, challenge, LAX)
    other: dict[str, Any] = {field: "0" * 64 if field == "config_fingerprint" else bytes([9] * 32)}
    with pytest.raises(AttestationError):
        verify_proof(proof, dataclasses.replace(challenge, **other), LAX)


def test_no_byte_of_a_proof_can_be_changed_nor_its_halves_exchanged() -> None:
    challenge, again = Challenge.fresh(FINGERPRINT), Challenge.fresh(FINGERPRINT)
    proof, other = proven(challenge), proven(again)
    for part in ("evidence", "runtime"):
        whole: bytes = getattr(proof, part)
        for at in range(0, len(whole), 7):
            with pytest.raises(AttestationError):
                verify_proof(proof._replace(**{part: flipped(whole, at)}), challenge, LAX)
    for mixed in (Proof(other.evidence, proof.runtime), Proof(proof.evidence, other.runtime)):
        with pytest.raises(AttestationError):
            verify_proof(mixed, challenge, LAX)


def test_a_key_for_data_keys_of_another_kind_is_refused() -> None:
    challenge = Challenge.fresh(FINGERPRINT)
    runtime = dataclasses.replace(RuntimeData.decode(proven(challenge).runtime), hpke_key=bytes(1216)).encode()
    with pytest.raises(AttestationError, match="1216 bytes"):
        verify_proof(proven(challenge)._replace(runtime=runtime), challenge, LAX)


@pytest.mark.parametrize("nonce", [b"", bytes(31), bytes(33)])
def test_a_nonce_of_another_length_is_refused_by_the_enclave(nonce: bytes) -> None:
    with pytest.raises(AttestationError, match="nonce has"):
        ENCLAVE.prove(nonce, FINGERPRINT)


def test_an_evidence_file_comes_back_and_nothing_else_is_one(tmp_path: Path) -> None:
    proof = proven(Challenge.fresh(FINGERPRINT))
    write_proof(tmp_path / "evidence.json", proof)
    assert read_proof(tmp_path / "evidence.json") == proof
    whole = proof.encode()
    for wrong in (b"", b"{}", whole[:-1], whole + b" ", whole.replace(b'"version":1', b'"version":2'), b"0" * 90000):
        with pytest.raises(AttestationError):
            Proof.decode(wrong)
    with pytest.raises(ConfigError, match="cannot read the evidence"):
        read_proof(tmp_path / "absent.json")


# --- what a configuration accepts -------------------------------------------------------------------------------------


def policy_file(path: Path, text: str) -> Path:
    path.write_text(f"version = 1\n{text}\n", encoding="utf-8")
    return path


SGX = f'[[sgx]]\nmr_enclave = ["{MR_ENCLAVE.hex()}"]\ncollateral = "sgx.json"'


@pytest.mark.parametrize(
    ("allowed", "policy", "accepted"),
    [
        (False, None, False),
        (True, None, True),
        (False, "allow_simulated = true", False),
        (True, "allow_simulated = true", True),
        (True, SGX, False),
        (False, SGX, False),
    ],
)
def test_a_simulated_enclave_has_to_be_allowed_by_configuration_and_policy(
    allowed: bool, policy: str | None, accepted: bool, tmp_path: Path
) -> None:
    path = None if policy is None else policy_file(tmp_path / "policy.toml", policy)
    config = EnclaveConfig(allow_simulated=allowed, policy=path)
    assert accepted_by(config).allow_simulated == accepted
    challenge = Challenge.fresh(FINGERPRINT)
    if accepted:
        assert verify_enclave(proven(challenge), challenge, config).verified.simulated
        return
    with pytest.raises(VeiltuneError, match="the enclave is simulated, so it protects nothing") as caught:
        verify_enclave(proven(challenge), challenge, config)
    assert "allow_simulated = true" in str(caught.value.hint)
    # What no configuration accepts is the configuration's matter; what a policy refuses is the evidence's.
    assert isinstance(caught.value, AttestationError if policy == SGX else ConfigError)


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Enclave]:
    """An enclave in an SGX of the tests' own maker, whom the verifier then takes for Intel."""
    roots = RootsForTests(intel=INTEL.root_der)
    monkeypatch.setattr(verifier, "verify_evidence", partial(verify_evidence, roots_for_tests=roots))
    monkeypatch.setattr(verifier.time, "time", lambda: float(NOW))

    def make(mr_enclave: bytes = MR_ENCLAVE) -> Enclave:
        def collect(report_data: bytes, **_: object) -> QuoteEvidence:
            return QuoteEvidence(INTEL.sgx(report_data, mr_enclave=mr_enclave))

        monkeypatch.setattr(enclave_module, "hardware_here", lambda **_: True)
        monkeypatch.setattr(enclave_module, "collect", collect)
        return Enclave()

    return make


def test_an_enclave_in_hardware_is_accepted_by_its_policy_alone(
    hardware: Callable[..., Enclave], tmp_path: Path
) -> None:
    (tmp_path / "sgx.json").write_text(INTEL.collateral("sgx"))
    strict = EnclaveConfig(policy=policy_file(tmp_path / "policy.toml", SGX))
    challenge = Challenge.fresh(FINGERPRINT)
    proof = proven(challenge, hardware())
    attested = verify_enclave(proof, challenge, strict)
    assert attested.verified.label.startswith(f"sgx {MR_ENCLAVE.hex()[:16]}")
    assert not attested.verified.simulated
    with pytest.raises(AttestationError, match="mr_enclave"):
        verify_enclave(proven(challenge, hardware(b"\x78" * 32)), challenge, strict)
    for config in (EnclaveConfig(), EnclaveConfig(allow_simulated=True)):
        with pytest.raises(VeiltuneError) as caught:
            verify_enclave(proof, challenge, config)
        assert isinstance(caught.value, AttestationError if config.allow_simulated else ConfigError)


# --- within the channel -----------------------------------------------------------------------------------------------


def party(role: str, peer: str, link: Channel, config: Config, directory: Path) -> Party:
    design = DESIGNS[config.design]
    _, control = memory_pair("supervisor", role)
    options = design_options(design, config.design_options)
    return Party(role, config, options, Job(verb="probe"), {peer: link}, control, Meter(role), directory)


def asked(config: Config, ends: tuple[Channel, Channel], tmp_path: Path, theirs: Config | None = None) -> Attested:
    """One round between an owner and an enclave, over the two ends of a channel."""
    near, far = ends
    owner = party("owner", "enclave", near, config, tmp_path)
    other = party("enclave", "owner", far, theirs or config, tmp_path)
    thread = threading.Thread(target=other.prove_enclave, args=(ENCLAVE, ("owner",)))
    thread.start()
    try:
        attested = owner.require_enclave()
    finally:
        thread.join(10)
    assert owner.figures["enclave"] == SIMULATED
    assert owner.figures["attestation"]["simulated"] is True
    return attested


def over_tls(identity: Identity = OWNER) -> tuple[SecureChannel, SecureChannel]:
    listener = handshake(THEIRS, "owner", listening=True, peers=PEERS)
    near, far = meet(listener, handshake(identity, "enclave", listening=False, peers=PEERS))
    return SecureChannel(near, "owner", "enclave"), SecureChannel(far, "enclave", "owner")


def config_for(tmp_path: Path, **tables: Any) -> Config:
    return make_config("obfuscatune", "gpt2", tmp_path / "run", **tables)


@pytest.mark.parametrize("wrapped", [False, True], ids=["channel", "session's link"])
def test_over_tls_the_keys_of_both_ends_are_bound(wrapped: bool, tmp_path: Path) -> None:
    near, far = over_tls()
    ends: tuple[Channel, Channel] = (SessionLink(near), SessionLink(far)) if wrapped else (near, far)
    shown: list[Proof] = []
    original = ENCLAVE.prove

    def watched(*given: Any, **named: Any) -> Proof:
        shown.append(original(*given, **named))
        return shown[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ENCLAVE, "prove", watched)
        asked(config_for(tmp_path), ends, tmp_path)
    runtime = RuntimeData.decode(shown[0].runtime)
    assert (runtime.tls_spki_sha256, runtime.client_spki_sha256) == (digest_of(THEIRS.pin), digest_of(OWNER.pin))
    for end in ends:
        end.close()


def test_among_the_parties_of_one_machine_nonce_and_configuration_are_bound(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    asked(config, memory_pair("owner", "enclave"), tmp_path)
    other = config_for(tmp_path, lora={"rank": 5})
    with pytest.raises(AttestationError, match="the enclave runs the configuration"):
        asked(config, memory_pair("owner", "enclave"), tmp_path, theirs=other)


def test_evidence_relayed_from_a_genuine_enclave_is_refused(tmp_path: Path) -> None:
    """A man in the middle has a key of his own, and fetches evidence for the victim's nonce from the true enclave."""
    nonce = bytes(32)
    near, far = over_tls(MIDDLE)
    with near, far:
        relayed = ENCLAVE.prove(
            nonce,
            FINGERPRINT,
            tls_spki_sha256=digest_of(far.own_pin),
            client_spki_sha256=digest_of(far.peer_pin),
        )
    victim = Challenge(nonce, FINGERPRINT, digest_of(MIDDLE.pin), digest_of(OWNER.pin))
    with pytest.raises(AttestationError, match="another TLS key"):
        verify_proof(relayed, victim, LAX)
    # Even with the enclave's own key for TLS he is another client.
    with pytest.raises(AttestationError, match="another client"):
        verify_proof(relayed, dataclasses.replace(victim, tls_spki_sha256=digest_of(THEIRS.pin)), LAX)
    # And where the victim has no keys at all, evidence from a channel with keys is none.
    with pytest.raises(AttestationError, match="another TLS key"):
        verify_proof(relayed, Challenge(nonce, FINGERPRINT), LAX)


def test_a_party_that_asks_without_keys_gets_evidence_that_is_for_none(tmp_path: Path) -> None:
    proof = ENCLAVE.prove(bytes(32), FINGERPRINT)
    with pytest.raises(AttestationError, match="another TLS key"):
        verify_proof(proof, Challenge(bytes(32), FINGERPRINT, digest_of(THEIRS.pin), digest_of(OWNER.pin)), LAX)


# --- data keys --------------------------------------------------------------------------------------------------------


def test_a_data_key_reaches_the_enclave_that_proved_itself_and_no_other(tmp_path: Path) -> None:
    own = RecipientKey("provider")
    (tmp_path / "notes.jsonl").write_text("text")
    sealed = seal(tmp_path / "notes.jsonl", tmp_path / "notes.sealed", [own.recipient], purpose="data").path
    challenge = Challenge.fresh(FINGERPRINT)
    proof = proven(challenge)
    attested = verify_proof(proof, challenge, LAX)
    with open_container(sealed, own, purpose="data") as container:
        wrapped = container.wrap(attested.recipient, purpose="job 7")
    with open_container(sealed, ENCLAVE.key_for(proof), purpose="job 7", wrapped=wrapped) as container:
        assert container.read("notes.jsonl") == b"text"
    later = proven(Challenge.fresh(FINGERPRINT))
    restarted = Enclave(gramine=Path("nowhere"), tsm=Path("nowhere"))
    for key, purpose in (
        (ENCLAVE.key_for(later), "job 7"),
        (restarted.key_for(proof), "job 7"),
        (ENCLAVE.key_for(proof), "job 8"),
    ):
        with pytest.raises(CheckpointError):
            open_container(sealed, key, purpose=purpose, wrapped=wrapped)
