"""Every error Veiltune raises on purpose, and whose fault each one is.

::

    VeiltuneError
    ├── UserError            the caller's input; shown as ``error: … / hint: …``, never as a traceback
    │   ├── ConfigError      a key, value or combination in the configuration
    │   ├── DataError        a data file or a line of one
    │   └── ModelError       a model source or an architecture
    ├── ProtocolError        a peer sent what the protocol does not allow
    │   ├── FrameError       bytes that are not a well-formed frame
    │   └── AttestationError evidence of trusted hardware that is not genuine, not fresh, or not accepted
    ├── IntegrityError       the untrusted host was caught computing something else than it was asked
    ├── PeerLostError        a peer went away, or its link closed
    ├── ExactnessError       a measured error exceeds the bound that was derived for it
    ├── TrainingError        training cannot go on (a non-finite loss, say)
    ├── StorageError         a disk that is full, or does not let itself be written to
    └── CheckpointError      a checkpoint is missing, torn, or belongs to another run
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class VeiltuneError(Exception):
    """Base of all deliberate errors.

    Args:
        message: what is wrong, naming the culprit and its value. Never carries a secret.
        hint: how to put it right, in one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(VeiltuneError):
    """The caller's input is at fault."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A data file, or one line of it, is wrong."""


class ModelError(UserError):
    """A model source cannot be used."""


class ProtocolError(VeiltuneError):
    """A peer broke the protocol."""

    exit_code = 3


class FrameError(ProtocolError):
    """Bytes that do not form a valid frame."""


class AttestationError(ProtocolError):
    """Evidence of trusted hardware is lacking, not genuine, not fresh, or not what the policy accepts."""


class PeerLostError(VeiltuneError):
    """The other end of a link is gone."""

    exit_code = 4


class RankLostError(PeerLostError):
    """Another rank of this host is gone. It explains the end of a session, which a lost peer alone does not."""


class ExactnessError(VeiltuneError):
    """A design that claims exactness was measured beyond its bound."""

    exit_code = 5


class TrainingError(VeiltuneError):
    """Training stopped because it could not go on."""

    exit_code = 6


class CheckpointError(VeiltuneError):
    """A checkpoint cannot be used."""

    exit_code = 7


class IntegrityError(VeiltuneError):
    """What the untrusted host returned is not what it was asked for: a spot check failed."""

    exit_code = 8


class StorageError(VeiltuneError):
    """A disk took nothing more."""


_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_NUMBERED = re.compile(r"\(os error (\d+)\)")  # as libraries in Rust say it


def storage_fault(error: BaseException, whose: str) -> StorageError | None:
    """A full or failing disk in our words; None if the error is anything else.

    Args:
        error: the operating system's, or a library's that quotes it.
        whose: the disk's owner, such as ``"the host's"``.
    """
    found = _NUMBERED.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number not in _DISK:
        return None
    return StorageError(
        f"{whose} disk cannot be written to: {os.strerror(number)}",
        hint="make room on it (or name another output), then go on with --resume: a committed checkpoint is kept",
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """Say which of ``valid`` was probably meant: a ready-made hint."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    known = ", ".join(names)
    return f"did you mean {close[0]!r}? (valid: {known})" if close else f"valid: {known}"
