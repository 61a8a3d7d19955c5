"""Evidence of trusted hardware is accepted as the policy says, and refused for every single thing that is changed in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

import snp_factory as amd
from helpers import flipped
from quote_factory import NOW, SVN, Intel, pem
from snp_factory import CHIP, MEASUREMENT, TCB, flipped_chains
from veiltune.errors import AttestationError, ConfigError, ProtocolError
from veiltune.tee.attestation.evidence import (
    MAX_EVIDENCE_BYTES,
    Evidence,
    RootsForTests,
    decode_evidence,
    encode_evidence,
    verify_evidence,
)
from veiltune.tee.attestation.policy import Policy, load_policy
from veiltune.tee.attestation.quote_layout import layout_of
from veiltune.tee.attestation.quotes import QuoteEvidence
from veiltune.tee.attestation.runtime import RuntimeData
from veiltune.tee.attestation.simulated import WARNING, SimulatedEvidence, SimulatedPlatform
from veiltune.tee.attestation.snp import SnpEvidence, verify_snp
from veiltune.tee.attestation.snp_certificates import Chain
from veiltune.tee.attestation.verdict import Verified

ROOT = Path(__file__).resolve().parents[1]
DAY = 86400
RUNTIME = RuntimeData(bytes([1] * 32), bytes([2] * 32), bytes([3] * 32), "a" * 64)
DATA = RUNTIME.report_data()
MR_ENCLAVE, MR_TD = b"\x77" * 32, b"\x78" * 48
INTEL = Intel()
POLICY = f"""
version = 1
[[sgx]]
mr_enclave = ["{MR_ENCLAVE.hex()}"]
collateral = "sgx.json"
[[tdx]]
mr_td = ["{MR_TD.hex()}"]
rtmr0 = ["{"0b" * 48}"]
rtmr1 = ["{"0b" * 48}"]
rtmr2 = ["{"0b" * 48}"]
rtmr3 = "any"
collateral = "tdx.json"
[[snp]]
product = "Milan"
measurements = ["{MEASUREMENT.hex()}"]
min_tcb = {{ boot_loader = 3, tee = 0, snp = 8, microcode = 115 }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strict policy and current collateral."""
    made = tmp_path_factory.mktemp("policy")
    (made / "policy.toml").write_text(POLICY)
    for tee in ("sgx", "tdx"):
        (made / f"{tee}.json").write_text(INTEL.collateral(tee))
    return made


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(folder / "policy.toml")


def sgx(data: bytes = DATA, **changes: Any) -> QuoteEvidence:
    return QuoteEvidence(INTEL.sgx(data, mr_enclave=changes.pop("mr_enclave", MR_ENCLAVE), **changes))


def tdx(data: bytes = DATA, **changes: Any) -> QuoteEvidence:
    return QuoteEvidence(INTEL.tdx(data, mr_td=changes.pop("mr_td", MR_TD), **changes))


def snp(data: bytes = DATA, **changes: Any) -> SnpEvidence:
    return amd.evidence(data, **changes)


def checked(evidence: Evidence, policy: Policy, runtime: RuntimeData = RUNTIME, now: int = NOW) -> Verified:
    """Verified against our own makers, after the wire."""
    roots = RootsForTests(INTEL.root_der, amd.pins())
    return verify_evidence(decode_evidence(encode_evidence(evidence)), policy, runtime, now, roots_for_tests=roots)


def same_but_for_white_space(one: bytes, other: bytes) -> bool:
    start = layout_of(one).certificates
    return one[:start] == other[:start] and one[start:].split() == other[start:].split()


# --- accepted ---------------------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[..., Evidence]] = {"sgx": sgx, "tdx": tdx, "snp": snp}
MEASURED = {"sgx": MR_ENCLAVE.hex(), "tdx": MR_TD.hex(), "snp": MEASUREMENT.hex()}


@pytest.mark.parametrize("tee", MAKERS)
def test_genuine_evidence_is_described(tee: str, policy: Policy) -> None:
    verified = checked(MAKERS[tee](), policy)
    assert (verified.tee, verified.measurement, verified.simulated) == (tee, MEASURED[tee], False)
    assert verified.tcb in {"UpToDate", "boot_loader 3, tee 1, snp 22, microcode 209"}
    assert json.loads(json.dumps(verified.record()))["simulated"] is False


@pytest.mark.parametrize("tee", MAKERS)
def test_without_the_tests_roots_no_evidence_of_theirs_is_genuine(tee: str, policy: Policy) -> None:
    with pytest.raises(AttestationError):
        verify_evidence(MAKERS[tee](), policy, RUNTIME, NOW)


@pytest.mark.parametrize("tee", MAKERS)
def test_an_empty_policy_accepts_nothing(tee: str) -> None:
    with pytest.raises(AttestationError, match=rf"accepts nothing of {tee}"):
        checked(MAKERS[tee](), Policy())


def test_production_code_gives_no_other_roots() -> None:
    package = ROOT / "src" / "veiltune"
    users = [
        path.relative_to(package)
        for path in package.rglob("*.py")
        if re.search("RootsForTests|(root|roots|pins)_for_tests", path.read_text())
        and path.parent.name != "attestation"
    ]
    assert not users
    evidence = (package / "tee" / "attestation" / "evidence.py").read_text()
    assert evidence.count("RootsForTests(") == 1, "the empty one, where none are given"


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tee", ["sgx", "tdx"])
def test_every_flipped_byte_of_a_quote_is_refused(tee: str, policy: Policy) -> None:
    evidence = MAKERS[tee]()
    assert isinstance(evidence, QuoteEvidence)
    at_fields = range(layout_of(evidence.quote).certificates)  # every seventh byte, and every third of the PEM's
    for at in (*at_fields[::7], *range(len(at_fields), len(evidence.quote), 11), len(evidence.quote) - 1):
        altered = flipped(evidence.quote, at)
        if not same_but_for_white_space(evidence.quote, altered):
            with pytest.raises(AttestationError):
                checked(QuoteEvidence(altered), policy)


def test_every_flipped_byte_of_a_report_and_its_chain_is_refused(policy: Policy) -> None:
    evidence = snp()
    for at in range(0, len(evidence.report), 5):
        with pytest.raises(AttestationError):
            checked(SnpEvidence(flipped(evidence.report, at), evidence.chain), policy)
    for chain in flipped_chains(evidence.chain, 37):
        with pytest.raises(AttestationError):
            checked(SnpEvidence(evidence.report, chain), policy)


CHANGED: dict[str, tuple[Callable[[], Evidence], str]] = {
    "sgx, debug": (lambda: sgx(attributes=0x07), "(?i)debug"),
    "sgx, another measurement": (lambda: sgx(mr_enclave=b"\x76" * 32), "mr_enclave 7676.* is not accepted"),
    "sgx, other runtime data": (lambda: sgx(bytes(64)), "other runtime data"),
    "sgx, trailing bytes": (lambda: QuoteEvidence(sgx().quote + b"\x00"), "1 bytes follow the end"),
    "sgx, trailing bytes inside": (lambda: sgx(inside=b"\x00"), "lengths in the quote contradict"),
    "sgx, cut": (lambda: QuoteEvidence(sgx().quote[:-1]), "cut short"),
    "sgx, empty": (lambda: QuoteEvidence(b""), "cut short"),
    "sgx, another version": (lambda: QuoteEvidence(flipped(sgx().quote, 0)), "version 2"),
    "sgx, text among the certificates": (
        lambda: QuoteEvidence(sgx().quote.replace(b"-\n--", b"-\x01--", 1)),
        "certificates cannot be read|other text|extract PCK",
    ),
    "sgx, another root inside": (
        lambda: QuoteEvidence(_with_root_of(sgx().quote, Intel())),
        "do not end in the pinned root",
    ),
    "tdx, debug": (lambda: tdx(attributes=1 << 28 | 1), "(?i)debug"),
    "tdx, migratable": (lambda: tdx(attributes=1 << 28 | 1 << 29), "migration"),
    "tdx, another firmware": (lambda: tdx(mr_td=b"\x76" * 48), "mr_td 7676.* is not accepted"),
    "tdx, another kernel": (lambda: tdx(rtmr=b"\x0c" * 48), "rtmr0 0c0c.* is not accepted"),
    "tdx, another module": (lambda: tdx(seam_signer=b"\x01" * 48), "(?i)module"),
    "tdx, other runtime data": (lambda: tdx(bytes(64)), "other runtime data"),
    "tdx, padding": (lambda: QuoteEvidence(tdx().quote + bytes(70)), "70 bytes follow the end"),
    "snp, debug": (lambda: snp(guest_policy=0xB0000), "debug guest"),
    "snp, migration agent": (lambda: snp(guest_policy=0x70000), "migration agent"),
    "snp, another VMPL": (lambda: snp(vmpl=1), "VMPL 1 is not accepted"),
    "snp, version 1": (lambda: snp(version=1), "version 1 "),
    "snp, version 6": (lambda: snp(version=6), "version 6 "),
    "snp, another algorithm": (lambda: snp(algorithm=2), "algorithm 2"),
    "snp, VLEK": (lambda: snp(signing_key=1), "signed by a VLEK"),
    "snp, no key": (lambda: snp(signing_key=7), "signed by key 7"),
    "snp, other runtime data": (lambda: snp(bytes(64)), "other runtime data"),
    "snp, trailing byte": (lambda: SnpEvidence(snp().report[:-1], amd.chain()), "1183 bytes"),
    "snp, bytes after the signature": (
        lambda: SnpEvidence(flipped(snp().report, 1183), amd.chain()),
        "follow the report's signature",
    ),
    "snp, another chip's report": (
        lambda: SnpEvidence(amd.report(DATA, chip=bytes(64)), amd.chain()),
        "another chip than the VCEK",
    ),
    "snp, another key": (
        lambda: SnpEvidence(amd.report(DATA, key=amd.chip_key("other")), amd.chain()),
        "does not verify",
    ),
    "snp, TCB that the VCEK is not for": (
        lambda: SnpEvidence(amd.report(DATA, tcb={**TCB, "snp": 30}), amd.chain()),
        "TCB .*30.* the VCEK",
    ),
    "snp, certificates swapped": (
        lambda: SnpEvidence(amd.report(DATA), Chain(amd.chain().ask, amd.chain().vcek, amd.chain().ark)),
        "VCEK is named|is not signed by|ASK is named",
    ),
    "snp, no certificate": (lambda: SnpEvidence(amd.report(DATA), Chain(b"", b"", b"")), "not a certificate"),
}


def _with_root_of(quote: bytes, other: Intel) -> bytes:
    """The same quote with another root's certificate in place of ours, and lengths to match."""
    layout = layout_of(quote)
    text = quote[layout.certificates :]
    swapped = text[: text.rindex(b"-----BEGIN")] + pem(other.root).encode() + b"\x00"
    grown = struct.pack("<I", len(quote) - layout.signature + len(swapped) - len(text))
    middle = quote[layout.signature : layout.certificates - 4] + struct.pack("<I", len(swapped))
    return quote[: layout.signature - 4] + grown + middle + swapped


@pytest.mark.parametrize("name", CHANGED)
def test_one_change_is_refused_by_name(name: str, policy: Policy) -> None:
    make, reason = CHANGED[name]
    with pytest.raises(AttestationError, match=reason) as caught:
        checked(make(), policy)
    assert caught.value.hint


CHAINS: dict[str, tuple[Callable[[], Chain], str]] = {
    "an older TCB": (lambda: Chain(amd.vcek(tcb=OLD), *amd.authorities()), "snp has version 7, older than 8"),
    "an expired VCEK": (lambda: Chain(amd.vcek(days=-1), *amd.authorities()), "VCEK is valid from"),
    "a key on another curve": (
        lambda: Chain(amd.vcek(tcb=OLD, key=amd.chip_key("p256", ec.SECP256R1)), *amd.authorities()),
        "not on P-384",
    ),
    "a short chip id": (lambda: Chain(amd.vcek(tcb=OLD, hwid=CHIP[:63]), *amd.authorities()), "by 63 bytes"),
    "a VLEK's name": (lambda: Chain(amd.vcek(tcb=OLD, name="SEV-VLEK"), *amd.authorities()), "signed by a VLEK"),
    "a version lacking": (
        lambda: Chain(amd.vcek(tcb={"boot_loader": 3, "tee": 1, "snp": 7}), *amd.authorities()),
        "lacks the extension .*3.8",
    ),
    "PKCS #1 signatures": (
        lambda: Chain(amd.chain().vcek, _ask(scheme=amd.PKCS1), amd.authorities()[1]),
        "ASK does not name",
    ),
    "SHA-256": (
        lambda: Chain(amd.chain().vcek, _ask(scheme=amd.SHA256_PSS), amd.authorities()[1]),
        "ASK does not verify",
    ),
    "an ASK that signed itself": (
        lambda: Chain(amd.chain().vcek, _ask(key=amd.rsa_key("ask")), amd.authorities()[1]),
        "ASK does not verify",
    ),
    "an expired ASK": (lambda: Chain(amd.chain().vcek, _ask(days=-1), amd.authorities()[1]), "ASK is valid from"),
    "a root of another's": (
        lambda: Chain(amd.chain().vcek, amd.chain().ask, amd.issue("ARK-Milan", ASK, "ARK-Milan", ASK)),
        "root key .* is none of",
    ),
}
OLD = {**TCB, "snp": 7}
ASK, SMALL = amd.rsa_key("ask"), amd.rsa_key("small", 2048)


def _ask(*, key: Any = None, **changes: Any) -> bytes:
    return amd.issue("SEV-Milan", amd.rsa_key("ask"), "ARK-Milan", key or amd.rsa_key("ark"), **changes)


@pytest.mark.parametrize("name", CHAINS)
def test_one_change_in_amds_chain_is_refused_by_name(name: str, policy: Policy) -> None:
    make, reason = CHAINS[name]
    with pytest.raises(AttestationError, match=reason):
        checked(SnpEvidence(amd.report(DATA, tcb=OLD), make()), policy)


def test_a_small_root_key_is_refused_although_it_is_pinned(policy: Policy) -> None:
    root = amd.issue("ARK-Milan", SMALL, "ARK-Milan", SMALL)
    evidence = SnpEvidence(amd.report(DATA), Chain(amd.chain().vcek, amd.chain().ask, root))
    with pytest.raises(AttestationError, match="ARK is not signed by an RSA key of 4096"):
        verify_snp(evidence, policy.snp[0], DATA, NOW, pins_for_tests=amd.pins(key=SMALL))


def test_turins_layout_has_another_order_and_shorter_chip_ids(policy: Policy) -> None:
    tcb = {**TCB, "fmc": 2}
    made = Chain(amd.vcek("Turin", tcb=tcb, hwid=b"\x04\x08" + CHIP[:8]), *amd.authorities("Turin"))
    evidence = SnpEvidence(amd.report(DATA, product="Turin", tcb=tcb), made)
    terms = policy.snp[0].model_copy(update={"product": "Turin"})
    verified = verify_snp(evidence, terms, DATA, NOW, pins_for_tests=amd.pins("Turin"))
    assert verified.tcb == "fmc 2, boot_loader 3, tee 1, snp 22, microcode 209"
    with pytest.raises(AttestationError, match="a Turin, not a Milan"):
        verify_snp(evidence, policy.snp[0], DATA, NOW, pins_for_tests=amd.pins("Turin"))


@pytest.mark.parametrize("tee", MAKERS)
def test_evidence_is_for_one_nonce_channel_key_and_configuration(tee: str, policy: Policy) -> None:
    evidence = MAKERS[tee]()
    others: dict[str, Any] = {
        "tls_spki_sha256": bytes([9] * 32),
        "hpke_key": bytes([9] * 32),
        "nonce": bytes([9] * 32),
        "config_fingerprint": "b" * 64,
        "client_spki_sha256": bytes([9] * 32),
    }
    for name, value in others.items():
        with pytest.raises(AttestationError, match="other runtime data"):
            checked(evidence, policy, dataclasses.replace(RUNTIME, **{name: value}))


@pytest.mark.parametrize(
    ("days", "reason"),
    [(-3, "future|NotValidYet"), (29, "(?i)expired"), (2000, "(?i)expired"), (10**9, "no Unix time")],
)
def test_collateral_has_its_time(days: int, reason: str, policy: Policy) -> None:
    for evidence in (sgx(), tdx()):
        with pytest.raises(AttestationError, match=reason) as caught:
            checked(evidence, policy, now=NOW + DAY * days)
        assert "clock" in str(caught.value.hint)


@pytest.mark.parametrize("days", [-101, 1001, 10**12])
def test_amds_certificates_have_their_time(days: int, policy: Policy) -> None:
    with pytest.raises(AttestationError, match=r"is valid from|no Unix time"):
        checked(snp(), policy, now=NOW + DAY * days)


@pytest.mark.parametrize(
    ("tee", "changes", "reason"),
    [
        ("sgx", {"status": "SWHardeningNeeded"}, "SWHardeningNeeded"),
        ("tdx", {"status": "ConfigurationNeeded"}, "ConfigurationNeeded"),
        ("sgx", {"needs": SVN + 1}, "OutOfDate"),
        ("tdx", {"needs": SVN + 1}, "OutOfDate"),
        ("sgx", {"status": "Revoked"}, "Revoked"),
        ("sgx", {"revoked": True}, "certificate chain"),
    ],
)
def test_a_platform_below_the_policy_is_refused(
    tee: str, changes: dict[str, Any], reason: str, tmp_path: Path, policy: Policy
) -> None:
    (tmp_path / "collateral.json").write_text(INTEL.collateral(tee, **changes))
    (terms,) = getattr(policy, tee)
    lesser = policy.model_copy(update={tee: (terms.model_copy(update={"collateral": tmp_path / "collateral.json"}),)})
    with pytest.raises(AttestationError, match=reason):
        checked(MAKERS[tee](), lesser)


def test_a_lesser_status_is_accepted_only_where_it_is_listed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sgx.json").write_text(INTEL.collateral("sgx", status="SWHardeningNeeded"))
    table = POLICY[: POLICY.index("[[tdx]]")] + 'tcb_statuses = ["SWHardeningNeeded"]\n'
    (tmp_path / "policy.toml").write_text(table)
    assert checked(sgx(), load_policy(tmp_path / "policy.toml")).tcb == "SWHardeningNeeded"
    (tmp_path / "sgx.json").write_text(INTEL.collateral("sgx"))  # … read anew; UpToDate is not listed
    with pytest.raises(AttestationError, match="UpToDate is not in tcb_statuses"):
        checked(sgx(), load_policy(tmp_path / "policy.toml"))


@pytest.mark.parametrize("text", ["", "{}", "[" * 5000, "\x00", '{"tcb_info": 1}'])
def test_bad_collateral_is_refused(text: str, tmp_path: Path, policy: Policy) -> None:
    path = tmp_path / "collateral.json"
    terms = policy.sgx[0].model_copy(update={"collateral": path})
    with pytest.raises(AttestationError, match="cannot read the collateral"):
        checked(sgx(), Policy(sgx=(terms,)))
    path.write_text(text)
    with pytest.raises(AttestationError, match="not quote collateral"):
        checked(sgx(), Policy(sgx=(terms,)))


def test_collateral_of_the_other_technology_or_another_maker_is_refused(tmp_path: Path, policy: Policy) -> None:
    for made in (INTEL.collateral("tdx"), Intel().collateral("sgx")):
        (tmp_path / "collateral.json").write_text(made)
        terms = policy.sgx[0].model_copy(update={"collateral": tmp_path / "collateral.json"})
        with pytest.raises(AttestationError, match="the quote is refused"):
            checked(sgx(), Policy(sgx=(terms,)))


def test_of_several_tables_one_has_to_accept_and_else_each_says_why(policy: Policy) -> None:
    other = policy.sgx[0].model_copy(update={"mr_enclave": ("55" * 32,)})
    assert checked(sgx(), Policy(sgx=(other, *policy.sgx))).measurement == MR_ENCLAVE.hex()
    with pytest.raises(AttestationError, match=r"\[\[sgx\]\] 0: .*\[\[sgx\]\] 1: "):
        checked(sgx(), Policy(sgx=(other, other)))


# --- simulated --------------------------------------------------------------------------------------------------------


def test_simulated_evidence_is_refused_unless_allowed_and_then_says_so(
    policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    evidence = SimulatedPlatform().evidence(DATA)
    with pytest.raises(AttestationError, match="simulated"):
        checked(evidence, policy)
    with caplog.at_level(logging.WARNING):
        verified = checked(evidence, Policy(allow_simulated=True))
    assert (verified.label, verified.simulated, verified.record()["simulated"]) == ("simulated", True, True)
    assert WARNING in caplog.text


def test_altered_simulated_evidence_is_refused() -> None:
    lax, evidence = Policy(allow_simulated=True), SimulatedPlatform().evidence(DATA)
    for name in ("report_data", "public_key", "signature"):
        for at in (0, 31, len(getattr(evidence, name)) - 1):
            change: dict[str, Any] = {name: flipped(getattr(evidence, name), at)}
            altered = dataclasses.replace(evidence, **change)
            with pytest.raises(AttestationError, match="does not verify"):
                checked(altered, lax)
    with pytest.raises(AttestationError, match="without its warning"):
        checked(dataclasses.replace(evidence, warning="all is well"), lax)
    with pytest.raises(AttestationError, match="other runtime data"):
        checked(SimulatedPlatform().evidence(bytes(64)), lax)
    with pytest.raises(AttestationError, match="63 bytes"):
        SimulatedPlatform().evidence(bytes(63))


def test_simulated_evidence_is_not_shaped_like_a_quote_or_report(policy: Policy) -> None:
    lax = policy.model_copy(update={"allow_simulated": True})
    wire = encode_evidence(SimulatedPlatform().evidence(DATA))
    for evidence in (QuoteEvidence(wire), SnpEvidence(wire, amd.chain()), SnpEvidence(wire.ljust(1184), amd.chain())):
        with pytest.raises(AttestationError):
            checked(evidence, lax)
    assert "redacted" in repr(SimulatedPlatform())


# --- the wire ---------------------------------------------------------------------------------------------------------


@given(
    st.one_of(
        st.builds(QuoteEvidence, st.binary(max_size=300)),
        st.builds(SnpEvidence, st.binary(max_size=50), st.builds(Chain, *3 * [st.binary(max_size=50)])),
        st.builds(SimulatedEvidence, *3 * [st.binary(max_size=32)]),
    )
)
def test_evidence_crosses_the_wire_unchanged(evidence: Evidence) -> None:
    assert decode_evidence(encode_evidence(evidence)) == evidence


@given(at=st.integers(0, 10**6), flip=st.integers(1, 255), cut=st.booleans())
def test_whatever_decodes_encodes_to_the_same_bytes(at: int, flip: int, cut: bool) -> None:
    wire = encode_evidence(SimulatedEvidence(b"data", b"key", b"signature"))
    place = at % len(wire)
    changed = wire[:place] if cut else wire[:place] + bytes([wire[place] ^ flip]) + wire[place + 1 :]
    with contextlib.suppress(AttestationError):
        assert encode_evidence(decode_evidence(changed)) == changed


@pytest.mark.parametrize(
    "wire",
    [
        *(b"", b"null", b"[]", b"{}", b"\xff", b"[" * 30000, b'{"kind":1}', b'{"kind":"quote"}', b'{"kind":true}'),
        *(b'{"kind":"quote","quote":""} ', b'{"kind":"quote","quote":"","quote":""}', b'{"quote":"","kind":"quote"}'),
        *(b'{"kind":"quote","quote":"AB=="}', b'{"kind":"quote","quote":"A"}', b'{"kind":"quote","quote":1}'),
        *(b'{"kind":"quote","quote":"","x":""}', b'{"kind":"quote","quote":NaN}', b" " * (MAX_EVIDENCE_BYTES + 1)),
        b'{"kind":"quote","quote":"' + b"A" * 24000 + b'"}',
    ],
)
def test_what_is_not_canonical_evidence_is_refused(wire: bytes) -> None:
    with pytest.raises(AttestationError) as caught:
        decode_evidence(wire)
    assert isinstance(caught.value, ProtocolError)
    assert len(str(caught.value)) < 400


def test_runtime_data_crosses_the_wire_and_every_field_counts() -> None:
    assert RuntimeData.decode(RUNTIME.encode()) == RUNTIME
    assert len(DATA) == 64
    for wire in (RUNTIME.encode() + b" ", RUNTIME.encode().replace(b'"version":1', b'"version":2'), b"{}", b"1"):
        with pytest.raises(AttestationError):
            RuntimeData.decode(wire)
    wrongs: list[dict[str, Any]] = [
        {"nonce": bytes(31)},
        {"config_fingerprint": "A" * 64},
        {"hpke_key": b""},
        {"tls_spki_sha256": bytes(31)},
    ]
    for wrong in wrongs:
        with pytest.raises(AttestationError, match="runtime data"):
            dataclasses.replace(RUNTIME, **wrong)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nonce", "replay"),
        ("tls_spki_sha256", "between"),
        ("config_fingerprint", "same"),
        ("client_spki_sha256", "relay"),
    ],
)
def test_a_client_is_told_which_claim_differs(name: str, reason: str) -> None:
    ours: dict[str, Any] = {
        "nonce": RUNTIME.nonce,
        "tls_spki_sha256": RUNTIME.tls_spki_sha256,
        "config_fingerprint": "a" * 64,
    }
    other: dict[str, Any] = {name: "b" * 64 if name == "config_fingerprint" else bytes(32)}
    RUNTIME.require(**ours)
    with pytest.raises(AttestationError) as caught:
        RUNTIME.require(**(ours | other))
    assert reason in str(caught.value.hint)


# --- the policy file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("version = 1", "", "lacks 'version'"),
        ("version = 1", "version = 2", "version = 2"),
        ("version = 1", 'version = 1\nallow_simulated = "yes"', "allow_simulated = 'yes'"),
        ("version = 1", "version = 1\nallow_debug = true", "unknown key 'allow_debug'"),
        ("mr_enclave = [", "mrenclave = [", r"unknown key 'sgx\[0\].mrenclave'"),
        (f'["{MR_ENCLAVE.hex()}"]', "[]", r"sgx\[0\].mr_enclave = \[\]"),
        (MR_ENCLAVE.hex(), "77", r"sgx\[0\].mr_enclave.0 = '77': not a measurement"),
        (MR_ENCLAVE.hex(), "00" * 32, "all zero"),
        ('collateral = "sgx.json"', "", r"lacks 'sgx\[0\].collateral'"),
        ('collateral = "sgx.json"', 'collateral = "sgx.json"\ntcb_statuses = ["OutOfDate"]', "tcb_statuses"),
        ('collateral = "sgx.json"', 'collateral = "sgx.json"\nallow_smt = 1', "allow_smt = 1"),
        ('rtmr3 = "any"', "", r"lacks 'tdx\[0\].rtmr3'"),
        ('rtmr3 = "any"', 'rtmr3 = "all"', r"tdx\[0\].rtmr3"),
        ('product = "Milan"', 'product = "Rome"', r"snp\[0\].product = 'Rome'"),
        ("min_tcb", "vmpl = [4]\nmin_tcb", r"snp\[0\].vmpl.0 = 4"),
        ("boot_loader = 3, ", "", r"lacks 'snp\[0\].min_tcb.boot_loader'"),
        ("boot_loader = 3", "boot_loader = 256", r"snp\[0\].min_tcb.boot_loader = 256"),
    ],
)
def test_a_wrong_policy_is_refused_with_the_culprit_and_a_hint(old: str, new: str, reason: str, tmp_path: Path) -> None:
    assert old in POLICY
    (tmp_path / "policy.toml").write_text(POLICY.replace(old, new, 1))
    with pytest.raises(ConfigError, match=reason) as caught:
        load_policy(tmp_path / "policy.toml")
    assert caught.value.hint


def test_a_policy_that_accepts_nothing_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(ConfigError, match="no configuration file"):
        load_policy(path)
    path.write_text("version = 1\n")
    with pytest.raises(ConfigError, match="accepts nothing"):
        load_policy(path)
    path.write_text("version = 1\nallow_simulated = true\n")
    assert load_policy(path) == Policy(allow_simulated=True)
