"""Sealed containers: a model or a data set encrypted at rest, opened tensor by tensor by those it was sealed for.

`seal` makes one, `open_container` reads it lazily, `unseal` turns it back into files. The bytes are described in
`tee.container.layout`, the wrapping of the key in `tee.container.wrapping`.
"""

from veiltune.tee.container.keys import (
    DataKey,
    Recipient,
    RecipientKey,
    load_recipient,
    load_recipient_key,
    make_recipient_key,
)
from veiltune.tee.container.reading import Container, add_recipient, open_container
from veiltune.tee.container.unsealing import unseal
from veiltune.tee.container.writing import Sealed, seal

__all__ = [
    "Container",
    "DataKey",
    "Recipient",
    "RecipientKey",
    "Sealed",
    "add_recipient",
    "load_recipient",
    "load_recipient_key",
    "make_recipient_key",
    "open_container",
    "seal",
    "unseal",
]
