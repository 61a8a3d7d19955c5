"""Evidence as hardware gives it: real samples, where they are, and the files that it is collected from."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import flipped
from quote_factory import NOW, Intel, pem
from snp_factory import flipped_chains
from veiltune.errors import AttestationError
from veiltune.tee.attestation import collect as collecting
from veiltune.tee.attestation.collect import certificate_table, collect
from veiltune.tee.attestation.policy import SgxTerms, SnpTcb, SnpTerms, TdxTerms
from veiltune.tee.attestation.quote_layout import layout_of, without_padding
from veiltune.tee.attestation.quotes import QuoteEvidence, verify_quote
from veiltune.tee.attestation.snp import SnpEvidence, authentic_report, verify_snp
from veiltune.tee.attestation.snp_certificates import Chain, verify_chain

# Real samples: https://github.com/Phala-Network/dcap-qvl and https://github.com/google/go-sev-guest have such files.
VECTORS = Path(os.environ.get("VEILTUNE_VECTORS", Path(__file__).resolve().parents[2] / "shared" / "vectors"))
real = pytest.mark.skipif(
    not (VECTORS / "attestation.bin").is_file(),
    reason="no samples of real evidence: VEILTUNE_VECTORS names no such folder",
)
JUNE_24 = 1_750_800_000  # 2025: within the collateral's month
DAY = 86400
DATA = bytes(range(64))

QUOTES: dict[str, tuple[type[SgxTerms | TdxTerms], dict[str, Any], int]] = {
    "sgx": (
        SgxTerms,
        {
            "mr_enclave": ["33d8736db756ed4997e04ba358d27833188f1932ff7b1d156904d3f560452fbb"],
            "tcb_statuses": ["ConfigurationAndSWHardeningNeeded"],
        },
        320,
    ),
    "tdx": (
        TdxTerms,
        {
            "mr_td": [
                "91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407de03ae6dc5f87f27428b2538873118b7"
            ],
            "rtmr0": [
                "44c0197b39157fdd7a4dcc44767f9d6b0bb3977c7a8e347b8492f827fe9d9e5c48aca29b220b80b6a540cf994b9bc9c0"
            ],
            **dict.fromkeys(("rtmr1", "rtmr2", "rtmr3"), "any"),
            **dict.fromkeys(("allow_dynamic_platform", "allow_cached_keys", "allow_smt"), True),
        },
        520,
    ),
}


def sample(tee: str, **changes: Any) -> tuple[bytes, SgxTerms | TdxTerms, bytes]:
    """A real quote, terms that accept it, and its report data."""
    form, terms, at = QUOTES[tee]
    quote = without_padding((VECTORS / f"{tee}_quote").read_bytes())
    start = layout_of(quote).body + at
    collateral = VECTORS / f"{tee}_quote_collateral.json"
    return quote, form.model_validate({"collateral": collateral, **terms, **changes}), quote[start : start + 64]


@real
@pytest.mark.parametrize(("tee", "tcb"), [("sgx", "ConfigurationAndSWHardeningNeeded"), ("tdx", "UpToDate")])
def test_a_real_quote_verifies_in_its_window_and_not_outside(tee: str, tcb: str) -> None:
    quote, terms, data = sample(tee)
    verified = verify_quote(QuoteEvidence(quote), terms, data, JUNE_24)
    assert (verified.tee, verified.tcb) == (tee, tcb)
    for days, reason in ((-10, "future|NotValidYet"), (30, "(?i)expired")):
        with pytest.raises(AttestationError, match=reason):
            verify_quote(QuoteEvidence(quote), terms, data, JUNE_24 + days * DAY)


@real
@pytest.mark.parametrize(
    ("tee", "changes", "reason"),
    [
        ("sgx", {"tcb_statuses": ["UpToDate"]}, "TCB status ConfigurationAndSWHardeningNeeded"),
        ("sgx", {"mr_enclave": ["55" * 32]}, "mr_enclave 33d8.* is not accepted"),
        ("sgx", {"reject_advisories": ["INTEL-SA-00615"]}, "INTEL-SA-00615"),
        ("sgx", {"min_tcb_evaluation": 18}, "(?i)eval"),
        ("tdx", {"allow_dynamic_platform": False}, "Dynamic platform"),
        ("tdx", {"allow_cached_keys": False}, "Cached keys"),
        ("tdx", {"allow_smt": False}, "SMT"),
        ("tdx", {"mr_td": ["55" * 48]}, "mr_td 91eb.* is not accepted"),
        ("tdx", {"rtmr3": ["55" * 48]}, "rtmr3 0000.* is not accepted"),
        ("tdx", {"min_tcb_evaluation": 18}, "(?i)eval"),
    ],
)
def test_a_stricter_policy_refuses_a_real_quote(tee: str, changes: dict[str, Any], reason: str) -> None:
    quote, terms, data = sample(tee, **changes)
    with pytest.raises(AttestationError, match=reason):
        verify_quote(QuoteEvidence(quote), terms, data, JUNE_24)


@real
@pytest.mark.parametrize("tee", QUOTES)
def test_a_tampered_real_quote_is_refused(tee: str) -> None:
    quote, terms, data = sample(tee)
    layout = layout_of(quote)
    debug = layout.body + (48 if tee == "sgx" else 120)
    foreign = sample("tdx" if tee == "sgx" else "sgx")[0]
    with_foreign_chain = quote[: layout.certificates] + foreign[layout_of(foreign).certificates :]
    altered = [
        quote + b"\x00",
        quote[:-1],
        quote[:48],
        b"",
        with_foreign_chain,
        foreign,
        flipped(quote, debug, 2 if tee == "sgx" else 1),
    ]
    altered += [flipped(quote, at) for at in range(0, layout.certificates, 13)]
    altered += [
        flipped(quote, at) for at in range(layout.certificates, len(quote), 29) if not quote[at : at + 1].isspace()
    ]
    for each in altered:
        with pytest.raises(AttestationError):
            verify_quote(QuoteEvidence(each), terms, data, JUNE_24)
    with pytest.raises(AttestationError, match="other runtime data"):
        verify_quote(QuoteEvidence(quote), terms, bytes(64), JUNE_24)


@real
def test_the_real_tdx_quote_comes_padded_which_is_refused_until_it_is_taken_off() -> None:
    padded = (VECTORS / "tdx_quote").read_bytes()
    _, terms, data = sample("tdx")
    with pytest.raises(AttestationError, match="70 bytes follow the end"):
        verify_quote(QuoteEvidence(padded), terms, data, JUNE_24)
    assert without_padding(padded[:-1] + b"\x01") == padded[:-1] + b"\x01"


def real_snp() -> SnpEvidence:
    authorities = x509.load_pem_x509_certificates((VECTORS / "milan.testcer").read_bytes())
    ask, ark = (each.public_bytes(Encoding.DER) for each in authorities)
    return SnpEvidence(
        (VECTORS / "attestation.bin").read_bytes(), Chain((VECTORS / "vcek.testcer").read_bytes(), ask, ark)
    )


@real
def test_the_real_snp_report_is_authentic_and_refused_for_its_debug_bit_alone() -> None:
    report = authentic_report(real_snp(), JUNE_24)
    assert (report.product, report.vmpl, report.tcb["microcode"]) == ("Milan", 0, 0x44)
    terms = SnpTerms(product="Milan", measurements=(report.measurement,), min_tcb=SnpTcb(**report.tcb))
    with pytest.raises(AttestationError, match="debug guest"):
        verify_snp(real_snp(), terms, report.report_data, JUNE_24)
    undebugged = flipped(real_snp().report, 0x0A, 0x08)
    with pytest.raises(AttestationError, match="signature does not verify"):
        verify_snp(SnpEvidence(undebugged, real_snp().chain), terms, report.report_data, JUNE_24)


@real
def test_a_tampered_real_snp_report_or_chain_is_refused() -> None:
    evidence = real_snp()
    for at in range(0, len(evidence.report), 3):
        with pytest.raises(AttestationError):
            authentic_report(SnpEvidence(flipped(evidence.report, at), evidence.chain), JUNE_24)
    for chain in flipped_chains(evidence.chain, 17):
        with pytest.raises(AttestationError):
            verify_chain(chain, JUNE_24)
    for now in (JUNE_24 - 5 * 365 * DAY, JUNE_24 + 5 * 365 * DAY):
        with pytest.raises(AttestationError, match="is valid from"):
            verify_chain(evidence.chain, now)


INTEL = Intel()
MADE = {"sgx": INTEL.sgx(DATA, mr_enclave=b"\x77" * 32), "tdx": INTEL.tdx(DATA, mr_td=b"\x77" * 48)}


@pytest.fixture(scope="module")
def accepting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SgxTerms | TdxTerms]:
    """Terms that accept both of ours."""
    folder = tmp_path_factory.mktemp("collateral")
    for tee in MADE:
        (folder / tee).write_text(INTEL.collateral(tee))
    any_rtmr = dict.fromkeys(("rtmr0", "rtmr1", "rtmr2", "rtmr3"), "any")
    return {
        "sgx": SgxTerms(collateral=folder / "sgx", mr_enclave=("77" * 32,)),
        "tdx": TdxTerms.model_validate({"collateral": folder / "tdx", "mr_td": ("77" * 48,), **any_rtmr}),
    }


@settings(max_examples=200)
@given(
    tee=st.sampled_from(sorted(MADE)),
    place=st.integers(0, 10**6),
    noise=st.binary(max_size=40),
    gone=st.integers(0, 60),
)
def test_no_bytes_make_the_verifier_do_anything_but_refuse(
    tee: str, place: int, noise: bytes, gone: int, accepting: dict[str, SgxTerms | TdxTerms]
) -> None:
    quote = MADE[tee]
    start = place % (len(quote) + 1)
    altered = quote[:start] + noise + quote[start + gone :]
    evidence = QuoteEvidence(altered)
    verify_quote(QuoteEvidence(quote), accepting[tee], DATA, NOW, root_for_tests=INTEL.root_der)
    if b"".join(altered.split()) != b"".join(quote.split()):  # white space is free among the certificates
        with pytest.raises(AttestationError):
            verify_quote(evidence, accepting[tee], DATA, NOW, root_for_tests=INTEL.root_der)


CHAIN = Chain(b"the VCEK", b"the ASK", INTEL.root_der)  # what is collected is not verified yet


# --- collected --------------------------------------------------------------------------------------------------------


def test_a_quote_is_collected_under_gramine(tmp_path: Path) -> None:
    quote = INTEL.sgx(DATA, mr_enclave=b"\x77" * 32)
    (tmp_path / "quote").write_bytes(quote + bytes(10))
    assert collect(DATA, gramine=tmp_path, tsm=tmp_path / "none") == QuoteEvidence(quote)
    assert (tmp_path / "user_report_data").read_bytes() == DATA
    (tmp_path / "attestation_type").write_text("none\n")
    with pytest.raises(AttestationError, match="remote attestation is 'none'"):
        collect(DATA, gramine=tmp_path)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Files that the kernel would put into a new entry; the entry's path."""

    def prepare(**files: bytes) -> Path:
        entry = tmp_path / "entry"

        def new_entry(directory: Path) -> Path:
            entry.mkdir()
            for name, content in files.items():
                (entry / name).write_bytes(content)
            return entry

        monkeypatch.setattr(collecting, "_new_entry", new_entry)
        return entry

    return prepare


def table(chain: Chain, offset: int = 96) -> bytes:
    """As the host's: entries, one of zeros, certificates."""
    guids = [collecting._GUIDS[name] for name in chain._fields]
    head, body = b"", b""
    for guid, certificate in zip(guids, chain, strict=True):
        head += guid + struct.pack("<II", offset + len(body), len(certificate))
        body += certificate
    return head + bytes(24) + body


def test_a_report_is_collected_from_the_kernel_with_the_hosts_certificates(
    tmp_path: Path, kernel: Callable[..., Path]
) -> None:
    entry = kernel(provider=b"sev_guest\n", outblob=b"report", auxblob=table(CHAIN), generation=b"1\n")
    assert collect(DATA, gramine=tmp_path / "none", tsm=tmp_path) == SnpEvidence(b"report", CHAIN)
    assert (entry / "inblob").read_bytes() == DATA


def test_certificates_come_from_a_folder_where_the_host_has_none(tmp_path: Path, kernel: Callable[..., Path]) -> None:
    kernel(provider=b"sev_guest\n", outblob=b"report", auxblob=bytes(24), generation=b"1\n")
    (tmp_path / "vcek.der").write_bytes(CHAIN.vcek)
    (tmp_path / "ask.der").write_bytes(CHAIN.ask)
    (tmp_path / "ark.pem").write_text(pem(INTEL.root))
    found = collect(DATA, gramine=tmp_path / "none", tsm=tmp_path, certificates=tmp_path)
    assert found == SnpEvidence(b"report", CHAIN)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"provider": b"sev_guest\n", "outblob": b"r", "generation": b"1\n"}, "provides no certificates"),
        ({"provider": b"tdx_guest\n", "outblob": b"r", "generation": b"2\n"}, "asked for 2 times"),
        ({"provider": b"tdx_guest\n", "outblob": b"r", "generation": b"1\n"}, "cut short"),
        ({"provider": b"arm_cca\n", "outblob": b"r", "generation": b"1\n"}, "arm_cca"),
        ({"provider": b"tdx_guest\n", "generation": b"1\n"}, "gave no evidence: No such file"),
    ],
)
def test_a_kernel_that_does_not_answer_as_it_should_is_named(
    files: dict[str, bytes], reason: str, tmp_path: Path, kernel: Callable[..., Path]
) -> None:
    kernel(**files)
    with pytest.raises(AttestationError, match=reason) as caught:
        collect(DATA, gramine=tmp_path / "none", tsm=tmp_path)
    assert caught.value.hint


def test_a_padded_tdx_quote_is_collected_without_its_padding(tmp_path: Path, kernel: Callable[..., Path]) -> None:
    quote = INTEL.tdx(DATA, mr_td=b"\x77" * 48)
    kernel(provider=b"tdx_guest\n", outblob=quote + bytes(70), generation=b"1\n")
    assert collect(DATA, gramine=tmp_path / "none", tsm=tmp_path) == QuoteEvidence(quote)


def test_without_hardware_and_with_other_data_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(AttestationError, match="no trusted hardware here") as caught:
        collect(DATA, gramine=tmp_path / "none", tsm=tmp_path / "no")
    assert "Gramine" in str(caught.value.hint)
    with pytest.raises(AttestationError, match="report data of 63 bytes"):
        collect(DATA[:63])


def test_a_malformed_table_of_certificates_is_refused() -> None:
    with pytest.raises(AttestationError, match="in a table of"):
        certificate_table(table(CHAIN, offset=10_000))
    assert certificate_table(b"") is None
    assert certificate_table(bytes([1] * 16) + table(CHAIN)[16:]) is None
