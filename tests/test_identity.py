"""Keys and certificates of parties: how they are made, kept and read, and that the private part goes nowhere."""

from __future__ import annotations

import copy
import os
import pickle
import ssl
import stat
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509 import CertificateBuilder, Name
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from commands import runner
from veiltune.config import load_config
from veiltune.designs import option_tables
from veiltune.errors import ConfigError, ProtocolError
from veiltune.peers import PIN_PREFIX, PeerConfig, require_peers, roles_of
from veiltune.transport.identity import (
    BACK_DATED,
    Identity,
    load_identity,
    make_identity,
    new_identity,
    private_file,
    read_certificate,
    renew_identity,
)

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
ONE = new_identity("owner")
OTHER = new_identity("owner")
DER = ONE.certificate.public_bytes(serialization.Encoding.DER)


def refused(path: Path, now: datetime | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_identity(path, now=now)
    assert caught.value.hint
    assert "PRIVATE KEY" not in caught.value.message
    return caught.value


# --- made, read, renewed ----------------------------------------------------------------------------------------------


def test_what_is_made_is_read_back_and_is_private(tmp_path: Path) -> None:
    made = make_identity(tmp_path / "keys", "provider")
    path = private_file(tmp_path / "keys", "provider")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    read = load_identity(path)
    assert (read.role, read.pin) == ("provider", made.pin)
    assert read.key.reveal() == made.key.reveal()
    assert read.certificate == made.certificate
    assert sorted(each.name for each in path.parent.iterdir()) == ["provider.key", "provider.peer.toml"]
    public = (path.parent / "provider.peer.toml").read_text(encoding="utf-8")
    assert tomllib.loads(public) == {"peers": [{"role": "provider", "key": made.pin}]}


def test_every_key_is_another_and_its_name_is_the_digest_of_its_public_part() -> None:
    assert ONE.pin != OTHER.pin
    private = serialization.load_pem_private_key(ONE.key.reveal(), None)
    spki = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki)
    assert PIN_PREFIX + digest.finalize().hex() == ONE.pin


def test_a_key_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    made = make_identity(tmp_path, "host")
    with pytest.raises(ConfigError, match="is there already") as caught:
        make_identity(tmp_path, "host")
    assert "--renew" in str(caught.value.hint)
    assert load_identity(private_file(tmp_path, "host")).pin == made.pin


def test_renewing_keeps_the_key_and_moves_the_dates(tmp_path: Path) -> None:
    old = make_identity(tmp_path, "owner", days=2, now=NOW - timedelta(days=9))
    path = private_file(tmp_path, "owner")
    assert "expired" in refused(path, NOW).message
    (tmp_path / ".owner.key.new").write_text("left by a crash", encoding="utf-8")
    renewed = renew_identity(tmp_path, "owner", days=30, now=NOW)
    assert renewed.pin == old.pin
    assert load_identity(path, now=NOW).certificate == renewed.certificate != old.certificate
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["owner.key", "owner.peer.toml"]


@pytest.mark.parametrize(
    ("off", "fault"),
    [
        (-BACK_DATED - timedelta(minutes=1), "is not valid before 2026-05-03 12:00 UTC"),
        (-BACK_DATED + timedelta(minutes=1), None),
        (timedelta(hours=-1), None),
        (timedelta(hours=1), None),
        (timedelta(days=10, minutes=-1), None),
        (timedelta(days=10, minutes=1), "expired on 2026-05-14 12:00 UTC"),
    ],
)
def test_a_certificate_holds_from_a_day_before_it_was_made(tmp_path: Path, off: timedelta, fault: str | None) -> None:
    made = make_identity(tmp_path, "owner", days=10, now=NOW)
    path = private_file(tmp_path, "owner")
    if fault is None:
        assert load_identity(path, now=NOW + off).pin == made.pin
        return
    error = refused(path, NOW + off)
    assert f"its certificate {fault}; this machine's clock says {NOW + off:%Y-%m-%d %H:%M}" in error.message
    assert "veiltune keygen owner" in str(error.hint)


@pytest.mark.parametrize("role", ["", "Owner", "the owner", "o" * 17, "../owner", "owner\n"])
def test_a_role_is_a_short_word(tmp_path: Path, role: str) -> None:
    for make in (make_identity, renew_identity):
        with pytest.raises(ConfigError, match="is no role"):
            make(tmp_path, role)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_a_certificate_has_a_sensible_life(tmp_path: Path, days: int) -> None:
    with pytest.raises(ConfigError, match=f"a certificate of {days} days"):
        make_identity(tmp_path, "owner", days=days)


# --- files that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o644])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    make_identity(tmp_path, "owner")
    path = private_file(tmp_path, "owner")
    path.chmod(mode)
    error = refused(path)
    assert f"(mode {mode:03o})" in error.message
    assert f"chmod 600 {path}" in str(error.hint)
    path.chmod(0o400)
    assert load_identity(path).role == "owner"


def other_keys_certificate(pem: bytes) -> bytes:
    return ONE.key.reveal() + OTHER.certificate.public_bytes(serialization.Encoding.PEM)


def other_curve(pem: bytes) -> bytes:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + ONE.certificate.public_bytes(serialization.Encoding.PEM)


def other_kind(pem: bytes) -> bytes:
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + ONE.certificate.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"nothing of the kind\n",
        lambda pem: pem[: len(pem) // 2],
        lambda pem: pem[: pem.index(b"-----BEGIN CERT")],
        lambda pem: pem[pem.index(b"-----BEGIN CERT") :],
        lambda pem: pem.replace(b"M", b"N"),
        lambda _: bytes(1 << 17),
        other_keys_certificate,
        other_curve,
        other_kind,
    ],
    ids=["empty", "text", "half", "no-cert", "no-key", "altered", "huge", "other-cert", "other-curve", "other-kind"],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    make_identity(tmp_path, "owner")
    path = private_file(tmp_path, "owner")
    path.write_bytes(damage(path.read_bytes()))
    assert "holds no identity, or a damaged one" in refused(path).message


def test_what_is_no_file_is_refused_and_does_not_block(tmp_path: Path) -> None:
    assert "no key file" in refused(tmp_path / "nothing").message
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "holds no identity" in refused(tmp_path / "pipe").message
    assert "cannot read" in refused(tmp_path).message


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot write|is there already"):
        make_identity(tmp_path / "file", "owner")
    with pytest.raises(ConfigError, match="no key file"):
        renew_identity(tmp_path, "owner")


# --- the secret stays where it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r:>9}".format], ids=["repr", "str", "format", "padded"])
def test_a_key_is_shown_by_its_public_name_alone(show: Callable[[Any], str]) -> None:
    private = serialization.load_pem_private_key(ONE.key.reveal(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    number = private.private_numbers().private_value
    for shown in (show(ONE.key), show(ONE)):
        assert "redacted" in shown
        assert "PRIVATE" not in shown
        assert str(number) not in shown
        assert f"{number:x}" not in shown
    assert ONE.pin in show(ONE.key)


@pytest.mark.parametrize("copier", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_cannot_be_pickled_or_copied(copier: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="cannot be"):
        copier(ONE.key)


@pytest.mark.parametrize("with_memory", [True, False], ids=["memfd", "encrypted-file"])
def test_tls_gets_the_key_and_no_disk_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_memory: bool
) -> None:
    seen: list[str] = []
    content: list[bytes] = []
    load = ssl.SSLContext.load_cert_chain

    def spy(context: ssl.SSLContext, certfile: str, **given_: Any) -> None:
        seen.append(certfile)
        content.append(Path(certfile).read_bytes())
        load(context, certfile, **given_)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not with_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    ONE.key.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ONE.certificate)
    on_disk = not seen[0].startswith("/proc/self/fd/")
    assert on_disk is not with_memory
    assert (b"BEGIN ENCRYPTED PRIVATE KEY" in content[0]) is on_disk
    assert (ONE.key.reveal() in content[0]) is not on_disk
    assert list(tmp_path.iterdir()) == []
    assert not Path(seen[0]).is_file()


# --- certificates of strangers ----------------------------------------------------------------------------------------


def test_a_certificate_gives_the_pin_of_its_key() -> None:
    certificate, pin = read_certificate(DER)
    assert (certificate, pin) == (ONE.certificate, ONE.pin)


def test_a_certificate_that_its_own_key_did_not_sign_is_refused() -> None:
    name = Name([])
    forged = (
        CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(ONE.certificate.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=99))
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    with pytest.raises(ProtocolError, match="malformed"):
        read_certificate(forged.public_bytes(serialization.Encoding.DER))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(DER) - 1), st.integers(1, 255))
@example(DER.index(b"\xa0\x03\x02\x01") + 4, 1)  # the version, of which cryptography has an error of its own
def test_an_altered_certificate_is_refused_or_is_not_ours(at: int, flip: int) -> None:
    """Every byte is signed, or is the signature: with the key unchanged nothing else may be."""
    altered = bytearray(DER)
    altered[at] ^= flip
    with pytest.raises(ProtocolError, match="malformed"):
        read_certificate(bytes(altered))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        read_certificate(data)


# --- the configuration's tables ---------------------------------------------------------------------------------------


def entry(role: str, identity: Identity) -> PeerConfig:
    return PeerConfig(role=role, key=identity.pin)


def test_a_key_acts_in_the_roles_it_was_given() -> None:
    peers = (entry("owner", ONE), entry("host", ONE), entry("owner", OTHER))
    assert roles_of(peers, ONE.pin) == {"owner", "host"}
    assert roles_of(peers, OTHER.pin) == {"owner"}
    assert roles_of(peers, new_identity("owner").pin) == frozenset()


def test_tables_that_cannot_work_are_refused_before_anything_is_dialled() -> None:
    peers = (entry("owner", ONE), entry("provider", OTHER))
    require_peers(peers, "owner", ONE.pin, "provider")
    require_peers(peers[1:], "owner", ONE.pin, "provider")  # what the table leaves out is the peers' business
    with pytest.raises(ConfigError, match="no key for the host"):
        require_peers(peers, "owner", ONE.pin, "host")
    with pytest.raises(ConfigError, match=f"this owner's key is {OTHER.pin}"):
        require_peers(peers, "owner", OTHER.pin, "provider")


@pytest.mark.parametrize(
    "key",
    [
        "",
        ONE.pin[:-1],
        ONE.pin + "0",
        ONE.pin.removeprefix(PIN_PREFIX),
        ONE.pin.upper(),
        ONE.pin[:-1] + "g",
        ONE.pin + "\n",
    ],
)
def test_a_key_is_written_in_one_way_alone(key: str) -> None:
    with pytest.raises(ValidationError, match="is no key"):
        PeerConfig(role="owner", key=key)


def configuration(**values: Any) -> Any:
    return load_config({"design": "split", "model": "random:llama", "output": "out", **values}, options=option_tables())


def test_the_configuration_names_what_is_wrong_with_a_peer() -> None:
    right = {"role": "owner", "key": ONE.pin}
    assert configuration(peers=[right]).peers == (entry("owner", ONE),)
    for wrong, message, hint in (
        ({**right, "key": "abc"}, "peers.0.key = 'abc': is no key", "copy it as `veiltune keygen` printed it"),
        ({**right, "rol": "x"}, "unknown key 'peers.0.rol'", "did you mean 'role'"),
        ({**right, "role": "The Owner"}, "peers.0.role = 'The Owner'", "correct the value"),
    ):
        with pytest.raises(ConfigError) as caught:
            configuration(peers=[wrong])
        assert caught.value.message.startswith(message)
        assert hint in str(caught.value.hint)


def test_all_agree_on_the_peers_and_each_keeps_its_own_key() -> None:
    plain = configuration()
    assert configuration(identity={"key": "owner.key"}).fingerprint() == plain.fingerprint()
    with_peers = configuration(peers=[{"role": "owner", "key": ONE.pin}]).fingerprint()
    assert with_peers != plain.fingerprint()
    assert configuration(peers=[{"role": "owner", "key": OTHER.pin}]).fingerprint() != with_peers


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_keygen_prints_the_public_part_and_says_where_the_private_part_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    veiltune = runner(capsys)
    ran = veiltune("keygen", "provider", "--to", str(tmp_path))
    assert ran.code == 0
    assert tomllib.loads(ran.out) == {
        "peers": [{"role": "provider", "key": load_identity(tmp_path / "provider.key").pin}]
    }
    assert "provider.key" in ran.err
    assert "PRIVATE" not in ran.out + ran.err
    again = veiltune("keygen", "provider", "--to", str(tmp_path))
    assert (again.code, again.out) == (2, "")
    assert "is there already" in again.err
    renewed = veiltune("keygen", "provider", "--to", str(tmp_path), "--renew", "--json")
    assert renewed.json["key"] in ran.out
