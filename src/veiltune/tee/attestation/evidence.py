"""Evidence of any kind: its wire form, and its verification against a policy.

On the wire evidence is one canonical JSON object (`veiltune.tee.attestation.wire`) of its ``kind`` and base64 fields:

    quote:      quote
    snp:        report, vcek, ask, ark
    simulated:  report_data, public_key, signature, and its warning as plain text

It carries no collateral and no time: both are the verifier's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from veiltune.errors import AttestationError
from veiltune.tee.attestation.policy import Policy
from veiltune.tee.attestation.quote_layout import MAX_QUOTE_BYTES, layout_of
from veiltune.tee.attestation.quotes import QuoteEvidence, verify_quote
from veiltune.tee.attestation.runtime import REPORT_DATA_BYTES, RuntimeData
from veiltune.tee.attestation.simulated import (
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    SimulatedEvidence,
    verify_simulated,
)
from veiltune.tee.attestation.snp import REPORT_BYTES, SnpEvidence, verify_snp
from veiltune.tee.attestation.snp_certificates import MAX_CERTIFICATE_BYTES, Chain
from veiltune.tee.attestation.verdict import SIMULATED, Verified
from veiltune.tee.attestation.wire import Fields, canonical, from_base64, parse, require_fields, to_base64

Evidence = QuoteEvidence | SnpEvidence | SimulatedEvidence
T = TypeVar("T")

MAX_EVIDENCE_BYTES: Final = 32768
_WHAT: Final = "evidence"
# The base64 fields of each kind and the most bytes that each may have.
_LIMITS: Final[Mapping[str, Mapping[str, int]]] = {
    "quote": {"quote": MAX_QUOTE_BYTES},
    "snp": {"report": REPORT_BYTES, **dict.fromkeys(("vcek", "ask", "ark"), MAX_CERTIFICATE_BYTES)},
    SIMULATED: {
        "report_data": REPORT_DATA_BYTES,
        "public_key": PUBLIC_KEY_BYTES,
        "signature": SIGNATURE_BYTES,
    },
}


@dataclass(frozen=True, slots=True)
class RootsForTests:
    """Other roots of trust than the makers'. Nothing but a test makes one.

    Attributes:
        intel: DER of the root certificate for quotes.
        amd: SHA-256 (hex) of the SubjectPublicKeyInfo of each product's ARK.
    """

    intel: bytes | None = None
    amd: Mapping[str, str] | None = None


def encode_evidence(evidence: Evidence) -> bytes:
    """The wire form."""
    match evidence:
        case QuoteEvidence():
            return canonical({"kind": "quote", "quote": to_base64(evidence.quote)})
        case SnpEvidence():
            chain = {name: to_base64(der) for name, der in evidence.chain._asdict().items()}
            return canonical({"kind": "snp", "report": to_base64(evidence.report), **chain})
        case SimulatedEvidence():
            parts = {name: to_base64(getattr(evidence, name)) for name in _LIMITS[SIMULATED]}
            return canonical({"kind": SIMULATED, "warning": evidence.warning, **parts})


def decode_evidence(data: bytes) -> Evidence:
    """What :func:`encode_evidence` made; nothing of it is verified yet.

    Raises:
        AttestationError: too long, malformed, not canonical, or of an unknown kind.
    """
    fields: Fields = parse(data, max_bytes=MAX_EVIDENCE_BYTES, what=_WHAT)
    kind = str(fields.get("kind"))
    if kind not in _LIMITS:
        raise AttestationError(f"unknown kind of evidence: {kind[:80]!r}", hint=f"known here: {', '.join(_LIMITS)}")
    limits = _LIMITS[kind]
    require_fields(fields, frozenset({"kind", *limits} | ({"warning"} if kind == SIMULATED else set())), _WHAT)
    parts = {name: from_base64(fields, name, max_bytes=most, what=_WHAT) for name, most in limits.items()}
    if kind == "quote":
        return QuoteEvidence(parts["quote"])
    if kind == "snp":
        return SnpEvidence(parts["report"], Chain(parts["vcek"], parts["ask"], parts["ark"]))
    return SimulatedEvidence(**parts, warning=str(fields["warning"]))


def verify_evidence(
    evidence: Evidence, policy: Policy, runtime: RuntimeData, now: int, *, roots_for_tests: RootsForTests | None = None
) -> Verified:
    """Verify evidence against a policy, or raise: there is no other outcome.

    Args:
        evidence: what the enclave sent.
        policy: what this party accepts.
        runtime: what the evidence has to be made for. The enclave's own claims will do here, if `RuntimeData.require`
            compared them with what this party drew, saw and agreed to.
        now: Unix time in seconds, by this party's clock.
        roots_for_tests: nothing but a test gives them.

    Returns:
        Who was verified: for the log and the record, which say of a simulated enclave that it is one.

    Raises:
        AttestationError: not genuine, not current, not for ``runtime``, or accepted by no table of the policy.
    """
    roots = roots_for_tests or RootsForTests()
    report_data = runtime.report_data()
    match evidence:
        case SimulatedEvidence():
            return verify_simulated(evidence, report_data, allowed=policy.allow_simulated)
        case SnpEvidence():
            return _first_accepted(
                "snp",
                policy.snp,
                lambda terms: verify_snp(evidence, terms, report_data, now, pins_for_tests=roots.amd),
            )
        case QuoteEvidence():
            tee = layout_of(evidence.quote).tee
            return _first_accepted(
                tee,
                policy.sgx if tee == "sgx" else policy.tdx,
                lambda terms: verify_quote(evidence, terms, report_data, now, root_for_tests=roots.intel),
            )


def _first_accepted(tee: str, tables: tuple[T, ...], verify: Callable[[T], Verified]) -> Verified:
    """What the first table that accepts says; every refusal, if none does."""
    if not tables:
        raise AttestationError(
            f"the policy accepts nothing of {tee}", hint=f"add a table [[{tee}]] to the policy, if that is meant"
        )
    refusals: list[AttestationError] = []
    for terms in tables:
        try:
            return verify(terms)
        except AttestationError as error:
            refusals.append(error)
    if len(refusals) == 1:
        raise refusals[0]
    reasons = "; ".join(f"[[{tee}]] {index}: {each.message}" for index, each in enumerate(refusals))
    raise AttestationError(f"no table of the policy accepts the evidence: {reasons}", hint=refusals[0].hint)
