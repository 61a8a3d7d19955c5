"""``veiltune seal`` as people run it: a model or a file of data into a container that its recipients alone can open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from veiltune.display import console
from veiltune.errors import ConfigError, UserError
from veiltune.models.sources import resolve_model
from veiltune.results import to_json
from veiltune.tee.attestation.policy import load_policy
from veiltune.tee.container import Recipient, load_recipient, seal
from veiltune.tee.container.keys import load_or_make_recipient_key
from veiltune.tee.container.ring import SEALED
from veiltune.tee.enclave import ROLE
from veiltune.tee.proof import read_proof
from veiltune.tee.verifier import verify_proof

_OWN_ROLES = {"model": "provider", "data": "owner"}


class _Source(NamedTuple):
    """What is sealed: where it is, and what for."""

    path: Path
    purpose: str


def run_seal(
    what: str,
    to: Path,
    *,
    recipients: Sequence[str] = (),
    key: Path | None = None,
    policy: Path | None = None,
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """Seal a model or a file of data; returns the exit code.

    Args:
        what: a model source, or a file of data.
        to: the container.
        recipients: files of public keys (``ROLE.recipient.toml``), or evidence from ``veiltune attest --key``.
        key: one's own private key, for which it is sealed too; made if it is not there.
        policy: what evidence has to meet.
        overwrite: take the place of a file that is there.
        as_json: print one object on stdout.

    Raises:
        ConfigError: nobody to seal for, a recipient that cannot be used, or the place is taken.
        AttestationError: evidence that is not accepted.
        VeiltuneError: a source that cannot be used, or a disk that is full.
    """
    screen = console()
    found = [_recipient(each, policy) for each in recipients]
    if not found and key is None:
        raise ConfigError("it would be sealed for nobody", hint="give --for RECIPIENT, or --key FILE for yourself")
    source = _find(what, partial(screen.print, markup=False))
    if key is not None:
        found.append((load_or_make_recipient_key(key, _OWN_ROLES[source.purpose]).recipient, "key file"))
    columns = (TextColumn("sealing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("sealing", total=None)
        sealed = seal(
            source.path,
            to,
            [recipient for recipient, _ in found],
            lambda done, total: bar.update(task, completed=done, total=total),
            purpose=source.purpose,
            overwrite=overwrite,
        )
    fields: dict[str, Any] = {
        "container": str(sealed.path),
        "purpose": source.purpose,
        "recipients": [{"role": each.role, "fingerprint": each.fingerprint, "known_by": how} for each, how in found],
        "files": list(sealed.files),
        "left_out": list(sealed.left_out),
        "tensors": sealed.num_tensors,
        "plain_bytes": sealed.plain_bytes,
        "num_bytes": sealed.num_bytes,
    }
    if as_json:
        print(to_json(fields))  # noqa: T201 - asked for
    for line in _summary(fields):
        screen.print(line, markup=False, soft_wrap=True)
    return 0


def _find(what: str, say: Callable[[str], None]) -> _Source:
    """A file that is no model is data; everything else is a model source."""
    path = Path(what).expanduser()
    if what.startswith(SEALED):
        raise UserError(f"{what!r} is sealed already", hint="give the model or the data itself")
    if path.is_file() and path.suffix != ".gguf":
        return _Source(path, "data")
    return _Source(path if path.is_dir() else resolve_model(what, progress=say).directory, "model")


def _recipient(text: str, policy: Path | None) -> tuple[Recipient, str]:
    """Whom to seal for, and how its key is known to be its own."""
    path = Path(text)
    if path.suffix == ".toml":
        return load_recipient(path), "key file"
    proof = read_proof(path)
    if policy is None:
        raise ConfigError(
            f"{text!r} is evidence, and no policy says what is accepted", hint="give --policy FILE; see attestation.md"
        )
    attested = verify_proof(proof, None, load_policy(policy))
    # Bound to the key alone: whoever opens it has the key's file, and no longer the proof that it was shown with.
    return Recipient(ROLE, attested.recipient.public_key), attested.verified.label


def _summary(fields: dict[str, Any]) -> list[str]:
    sizes = f"{fields['plain_bytes'] / 1e6:.1f} MB, {fields['tensors']} tensors"
    lines = [f"sealed as {fields['purpose']}: {fields['container']} ({len(fields['files'])} files, {sizes})"]
    lines += [f"for the {each['role']} {each['fingerprint']} ({each['known_by']})" for each in fields["recipients"]]
    if fields["left_out"]:
        lines.append(f"left out: {', '.join(fields['left_out'])}")
    lines.append(f"as a source: {SEALED}{fields['container']}")
    return lines
