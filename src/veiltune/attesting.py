"""``veiltune attest`` as people run it: evidence of this machine, or a file of it, shown and held against a policy."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from veiltune.config import Config
from veiltune.display import console
from veiltune.errors import ConfigError, UserError
from veiltune.results import to_json
from veiltune.tee.attestation.describe import claims_of
from veiltune.tee.attestation.evidence import decode_evidence
from veiltune.tee.attestation.policy import load_policy
from veiltune.tee.attestation.runtime import NO_CONFIG, NONCE_BYTES, RuntimeData
from veiltune.tee.attestation.simulated import WARNING
from veiltune.tee.attestation.verdict import SIMULATED
from veiltune.tee.container.keys import Recipient, load_or_make_recipient_key
from veiltune.tee.enclave import ROLE, Enclave
from veiltune.tee.proof import Proof, read_proof, write_proof
from veiltune.tee.verifier import Attested, verify_proof


class Asked(NamedTuple):
    """What was asked of ``veiltune attest``.

    Attributes:
        policy: file of what is accepted; without one nothing is verified.
        evidence: file to look at; without one this machine is asked.
        nonce: 64 hexadecimal digits that a verifier drew, which the evidence has to be for.
        config: a run's configuration, which it has to be for.
        key: a recipient's private key, whose public half this machine's evidence is to carry; made if it is not there.
        to: where this machine's evidence goes.
        certificates: folder with AMD's certificates.
    """

    policy: Path | None = None
    evidence: Path | None = None
    nonce: str | None = None
    config: Config | None = None
    key: Path | None = None
    to: Path | None = None
    certificates: Path | None = None


def run_attest(asked: Asked, *, as_json: bool = False) -> int:
    """Show evidence, and what a policy says of it; returns the exit code.

    Raises:
        AttestationError: it is malformed, not for the nonce or the configuration, or not accepted.
        ConfigError: a file that cannot be used.
        UserError: options that contradict one another.
    """
    nonce = _nonce(asked.nonce)
    proof = _collect(asked, nonce) if asked.evidence is None else _read(asked, asked.evidence)
    runtime = RuntimeData.decode(proof.runtime)
    fingerprint = None if asked.config is None else asked.config.fingerprint()
    runtime.require(
        nonce=nonce or runtime.nonce,
        tls_spki_sha256=runtime.tls_spki_sha256,
        config_fingerprint=fingerprint or runtime.config_fingerprint,
        client_spki_sha256=runtime.client_spki_sha256,
    )
    attested = None if asked.policy is None else verify_proof(proof, None, load_policy(asked.policy))
    if asked.to is not None:
        write_proof(asked.to, proof)
    fields = _fields(proof, runtime, attested, is_fresh=nonce is not None or asked.evidence is None)
    if as_json:
        print(to_json(fields))  # noqa: T201 - asked for
    console().print(_table(fields, attested, asked))
    return 0


def _nonce(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        nonce = b""
    if len(nonce) != NONCE_BYTES:
        raise UserError(f"--nonce {text[:80]!r} is no nonce", hint=f"{2 * NONCE_BYTES} hexadecimal digits, drawn anew")
    return nonce


def _collect(asked: Asked, nonce: bytes | None) -> Proof:
    key = None if asked.key is None else load_or_make_recipient_key(asked.key, ROLE)
    if key is not None and key.recipient.role != ROLE:
        raise ConfigError(
            f"the key {str(asked.key)!r} is the {key.recipient.role}'s", hint=f"evidence speaks for the {ROLE}'s alone"
        )
    enclave = Enclave(certificates=asked.certificates, key=key)
    fingerprint = NO_CONFIG if asked.config is None else asked.config.fingerprint()
    return enclave.prove(nonce or secrets.token_bytes(NONCE_BYTES), fingerprint)


def _read(asked: Asked, path: Path) -> Proof:
    for name in ("key", "to", "certificates"):
        if getattr(asked, name) is not None:
            raise UserError(
                f"--{name} is for evidence of this machine, --evidence {str(path)!r} is a file", hint="give one of them"
            )
    return read_proof(path)


def _fields(proof: Proof, runtime: RuntimeData, attested: Attested | None, *, is_fresh: bool) -> dict[str, Any]:
    claims = claims_of(decode_evidence(proof.evidence))
    return {
        "simulated": claims["tee"] == SIMULATED,
        "verified": None if attested is None else attested.verified.record(),
        "fresh": is_fresh,
        "config_fingerprint": None if runtime.config_fingerprint == NO_CONFIG else runtime.config_fingerprint,
        "nonce": runtime.nonce.hex(),
        "recipient": Recipient(ROLE, runtime.hpke_key).fingerprint,
        "claims": claims,
    }


def _table(fields: dict[str, Any], attested: Attested | None, asked: Asked) -> Table:
    where = "this machine" if asked.evidence is None else str(asked.evidence)
    table = Table(title=Text(f"evidence of {where}"), title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in {**fields["claims"], "recipient": fields["recipient"]}.items():
        table.add_row(name, Text(value))
    agreed = "none" if fields["config_fingerprint"] is None else fields["config_fingerprint"]
    table.add_row("configuration", agreed)
    table.add_row("nonce", f"{fields['nonce']} ({'fresh' if fields['fresh'] else 'of unknown age'})")
    if attested is None:
        table.add_row("verdict", Text("not verified: no --policy was given", style="bold yellow"))
    else:
        style = "bold red" if attested.verified.simulated else "green"
        table.add_row("verdict", Text(f"accepted: {attested.verified.label}", style=style))
    if fields["simulated"]:
        table.caption = Text(WARNING, style="bold red")
    return table
