"""SGX and TDX quotes, verified with dcap-qvl under one table of a policy.

The library checks the signatures, the certificates and their revocation, the collateral and its dates, and that the
enclave is no debug one; its `verify` does not enforce the TCB status, so only the form with a policy is used, from the
strict one and with what the policy allows. Checked here beside it: the quote's exact length and root, debug bits again,
the TDX module's signer, measurements and report data.

Collateral says what Intel knew of the platform at a date and expires within about a month. It comes from a file that
the verifying party fetched itself; it is read anew every time, so that a fresh one needs no restart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from veiltune.errors import AttestationError
from veiltune.tee.attestation.policy import Accepted48, QuoteTerms, SgxTerms, TdxTerms
from veiltune.tee.attestation.quote_layout import Layout, require_exact, require_root
from veiltune.tee.attestation.verdict import Verified

MAX_COLLATERAL_BYTES: Final = 1 << 20
MAX_TIME: Final = 1 << 40  # seconds; beyond it the library's arithmetic is not meant to go
_SGX_DEBUG: Final = 0x02
_ZERO_SIGNER: Final = "00" * 48
_FETCH: Final = "fetch the collateral of this platform anew (it lasts about 30 days), and check this machine's clock"
# A fragment of the library's message, and what to do about it.
_HINTS: Final = {
    "expired": _FETCH,
    "in the future": _FETCH,
    "NotValidYet": _FETCH,
    "Fmspc": "the collateral is of another kind of platform: fetch that of this one",
    "TCB info in the collateral": "the collateral is of the other technology: name the right file in the policy",
    "TCB status": "update the platform's firmware, or accept that status in tcb_statuses on purpose",
    "too old": "update the platform's firmware",
    "Dynamic platform": "set allow_dynamic_platform = true in the policy, if that is meant",
    "Cached keys": "set allow_cached_keys = true in the policy, if that is meant",
    "SMT": "set allow_smt = true in the policy, if that is meant",
    "Debug": "run the enclave without debugging; no policy accepts a debug enclave",
    "Advisory": "update the platform, or take the advisory out of reject_advisories",
    "eval data number": "fetch newer collateral; the policy's min_tcb_evaluation asks for it",
}


@dataclass(frozen=True, slots=True)
class QuoteEvidence:
    """A quote of SGX or TDX, which says itself which of the two it is.

    Attributes:
        quote: as the hardware gave it, without padding.
    """

    quote: bytes


def verify_quote(
    evidence: QuoteEvidence,
    terms: SgxTerms | TdxTerms,
    report_data: bytes,
    now: int,
    *,
    root_for_tests: bytes | None = None,
) -> Verified:
    """Verify a quote under one table of the policy.

    Args:
        evidence: the quote.
        terms: what is accepted.
        report_data: the 64 bytes it has to be made for.
        now: Unix time in seconds.
        root_for_tests: DER of a root certificate instead of Intel's. Nothing but a test gives one.

    Raises:
        AttestationError: the quote is not genuine, not current, or not what the terms accept.
    """
    if not 0 < now < MAX_TIME:
        raise AttestationError(f"the time {now} is no Unix time in seconds", hint="check this machine's clock")
    layout = require_exact(evidence.quote)
    wanted = "sgx" if isinstance(terms, SgxTerms) else "tdx"
    if layout.tee != wanted:
        raise AttestationError(f"a quote of {layout.tee}, not of {wanted}", hint="name its measurement under its kind")
    claims = _verified_claims(evidence.quote, terms, now, root_for_tests)
    require_root(evidence.quote, layout, bytes(claims["platform"]["root_key_id"]))
    body = _body(claims["report"], layout)
    if body["report_data"] != report_data.hex():
        raise AttestationError("the quote is for other runtime data", hint="it may be a replay: ask for fresh evidence")
    measurement = _sgx_measurement(body, terms) if isinstance(terms, SgxTerms) else _tdx_measurement(body, terms)
    return Verified(
        tee=layout.tee,
        measurement=measurement,
        tcb=claims["tcb"]["status"],
        advisories=tuple(claims["tcb"]["advisory_ids"]),
        platform="FMSPC " + bytes(claims["platform"]["pck"]["fmspc"]).hex(),
    )


def _verified_claims(quote: bytes, terms: QuoteTerms, now: int, root: bytes | None) -> dict[str, Any]:
    from dcap_qvl import QuoteCollateralV3, QuotePolicy, QuoteVerifier

    text = _collateral(terms.collateral)
    try:
        collateral = QuoteCollateralV3.from_json(text)
    except ValueError as error:
        raise AttestationError(f"{terms.collateral}: not quote collateral: {error}", hint=_FETCH) from None
    policy = (
        QuotePolicy.strict(now)
        .allow_dynamic_platform(terms.allow_dynamic_platform)
        .allow_cached_keys(terms.allow_cached_keys)
        .allow_smt(terms.allow_smt)
        .min_tcb_eval_data_number(terms.min_tcb_evaluation)
        .reject_advisories(list(terms.reject_advisories))
    )
    for status in terms.tcb_statuses:
        policy = policy.allow_status(status)
    try:
        claims: dict[str, Any] = json.loads(
            QuoteVerifier(root).verify_with_policy(quote, collateral, now, policy).to_json()
        )
    except ValueError as error:
        raise AttestationError(f"the quote is refused: {error}", hint=_hint(str(error))) from None
    if claims["tcb"]["status"] not in terms.tcb_statuses:  # strict() accepts UpToDate even where it is not listed
        raise AttestationError(
            f"the platform's TCB status {claims['tcb']['status']} is not in tcb_statuses", hint=_HINTS["TCB status"]
        )
    return claims


def _collateral(path: Path) -> str:
    try:
        if path.stat().st_size <= MAX_COLLATERAL_BYTES:
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AttestationError(f"cannot read the collateral {str(path)!r}: {error}", hint=_FETCH) from None
    raise AttestationError(
        f"{path} is larger than {MAX_COLLATERAL_BYTES} bytes", hint="name a file of quote collateral"
    )


def _hint(message: str) -> str:
    hints = (hint for fragment, hint in _HINTS.items() if fragment.lower() in message.lower())
    return next(hints, "it was altered, or made by other hardware than the policy and its collateral are for")


def _body(report: dict[str, Any], layout: Layout) -> dict[str, str]:
    """The fields of the report, hex; those of newer TD reports hold the older one as ``base``."""
    ((kind, body),) = report.items()
    if (kind == "SgxEnclave") != (layout.tee == "sgx"):
        raise AttestationError(f"a quote of {layout.tee} with a report of {kind}", hint="it is malformed")
    fields = dict(body)
    while isinstance(base := fields.pop("base", None), dict):
        fields = {**base, **fields}
    return fields


def _sgx_measurement(body: dict[str, str], terms: SgxTerms) -> str:
    if bytes.fromhex(body["attributes"])[0] & _SGX_DEBUG:
        raise AttestationError("a debug enclave: whoever runs it can read it", hint=_HINTS["Debug"])
    return _accepted(body, "mr_enclave", terms.mr_enclave)


def _tdx_measurement(body: dict[str, str], terms: TdxTerms) -> str:
    if bytes.fromhex(body["td_attributes"])[0]:
        raise AttestationError("a debug TD: whoever runs it can read it", hint=_HINTS["Debug"])
    if body["mr_signer_seam"] != _ZERO_SIGNER or any(bytes.fromhex(body["seam_attributes"])):
        raise AttestationError("the TDX module is not Intel's own, or is a debug one", hint="use a production platform")
    for index, accepted in enumerate((terms.rtmr0, terms.rtmr1, terms.rtmr2, terms.rtmr3)):
        _accepted(body, f"rt_mr{index}", accepted)
    return _accepted(body, "mr_td", terms.mr_td)


def _accepted(body: dict[str, str], name: str, accepted: Accepted48) -> str:
    found = body[name]
    if accepted != "any" and found not in accepted:
        key = name.replace("rt_mr", "rtmr")
        raise AttestationError(
            f"{key} {found} is not accepted", hint=f"if that build is meant, add it to {key} in the policy"
        )
    return found
