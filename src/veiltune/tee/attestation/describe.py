"""What evidence says of itself, for people to look at. Nothing of it is verified, so nothing may be decided on it.

Offsets within the reports are those of the references of `quote_layout` and `snp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from veiltune.tee.attestation.evidence import Evidence
from veiltune.tee.attestation.quote_layout import layout_of
from veiltune.tee.attestation.quotes import QuoteEvidence
from veiltune.tee.attestation.simulated import SimulatedEvidence
from veiltune.tee.attestation.snp import REPORT_BYTES, TCB_BYTES, SnpEvidence
from veiltune.tee.attestation.snp_certificates import product_of
from veiltune.tee.attestation.verdict import SIMULATED

# Names as the policy has them; offset and size of each field.
_FIELDS: Final[Mapping[str, Mapping[str, tuple[int, int]]]] = {
    "sgx": {"mr_enclave": (64, 32), "mr_signer": (128, 32), "attributes": (48, 16), "report_data": (320, 64)},
    "tdx": {
        "mr_td": (136, 48),
        **{f"rtmr{number}": (328 + 48 * number, 48) for number in range(4)},
        "td_attributes": (120, 8),
        "report_data": (520, 64),
    },
    "snp": {"measurement": (0x90, 48), "report_data": (0x50, 64), "chip_id": (0x1A0, 64)},
}
_VMPL: Final = 0x30
_TCB: Final = 0x180


def claims_of(evidence: Evidence) -> dict[str, str]:
    """The evidence's own words: its kind, and fields in hexadecimal by the names that a policy calls them.

    Raises:
        AttestationError: a quote whose parts cannot be told apart.
    """
    match evidence:
        case SimulatedEvidence():
            return {"tee": SIMULATED, "warning": evidence.warning, "report_data": evidence.report_data.hex()}
        case QuoteEvidence():
            layout = layout_of(evidence.quote)
            return _fields(layout.tee, evidence.quote[layout.body :])
        case SnpEvidence():
            report = evidence.report.ljust(REPORT_BYTES, b"\0")
            product = product_of(evidence.chain)
            order = TCB_BYTES.get(product or "", {})
            tcb = ", ".join(f"{name} = {report[_TCB + place]}" for name, place in order.items())
            named = {"product": product, "tcb": tcb} if product else {}
            return {**_fields("snp", report), "vmpl": str(report[_VMPL]), **named}


def _fields(tee: str, report: bytes) -> dict[str, str]:
    return {"tee": tee, **{name: report[at : at + size].hex() for name, (at, size) in _FIELDS[tee].items()}}
