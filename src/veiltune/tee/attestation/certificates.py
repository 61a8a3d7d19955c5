"""Reading certificates that a stranger sent: nothing but one kind of error comes out, and no warning."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

_UNREADABLE: Final = (
    *(ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm),
    *(x509.InvalidVersion, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
_FILTERS: Final = threading.Lock()  # the filters of warnings are the whole process's


class BadCertificateError(Exception):
    """A certificate that cannot be read, or whose signature does not verify."""


@contextmanager
def refusing() -> Generator[None]:
    """Whatever `cryptography` says of a bad certificate becomes a `BadCertificateError`; its warnings are dropped.

    Every VCEK has the serial number 0, of which cryptography 50 warns that a later version will refuse it; hence the cap
    on its version. Odd names in a stranger's certificate make it warn too. Not to be nested.

    Raises:
        BadCertificateError: from within.
    """
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except _UNREADABLE as error:
            raise BadCertificateError(type(error).__name__) from None
