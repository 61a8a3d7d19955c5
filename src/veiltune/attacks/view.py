"""What one observer saw, and nothing else: a `View` is made from its transcript and shows an attack what it may read.

Three things are refused, each by name: a transcript that is not this observer's (or is truncated, edited, of another
version: `read_transcript`), a message that the design does not reveal to it, and a field that the attack does not declare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veiltune.errors import DataError, ProtocolError, UserError, nearest
from veiltune.transport.messages import MESSAGES, Message
from veiltune.transport.transcript import read_transcript, read_transcript_header


@dataclass(frozen=True)
class Rights:
    """What an observer sees under a design, as plain data.

    Attributes:
        design: its name.
        observer: whose rights.
        receives: kinds of message that the design reveals to it.
        sends: kinds that the design lets others get from it.
    """

    design: str
    observer: str
    receives: frozenset[str]
    sends: frozenset[str]

    @classmethod
    def under(
        cls, design: str, observer: str, reveals: Mapping[str, Collection[str]], peers: Collection[str]
    ) -> Rights:
        """From a design's table of what each observer receives, and the parties this one is linked to.

        Raises:
            UserError: the design has no such observer.
        """
        if observer not in reveals:
            raise UserError(f"{design} has no observer {observer!r}", hint=nearest(observer, reveals))
        sends = frozenset(kind for peer in peers for kind in reveals[peer])
        return cls(design, observer, frozenset(reveals[observer]), sends)

    def sees(self, kind: str) -> bool:
        """Whether a kind of message is sent or received by this observer."""
        return kind in self.receives | self.sends

    def check(self, reads: Iterable[str]) -> None:
        """Refuse what the observer cannot have seen.

        Raises:
            ProtocolError: names the first such field.
            ValueError: a name that is no message's field: a mistake in the attack.
        """
        for name in sorted(reads):
            kind, _, leaf = name.partition(".")
            if kind not in MESSAGES or leaf not in {each.name for each in dataclasses.fields(MESSAGES[kind])}:
                raise ValueError(f"{name!r} is no field of a message")
            if not self.sees(kind):
                raise ProtocolError(
                    f"the {self.observer} does not see {name!r} under {self.design}",
                    hint=f"it receives {', '.join(sorted(self.receives))}",
                )


@dataclass(frozen=True)
class Seen:
    """One message of a view. Its fields are read by name, and only those that were declared.

    Attributes:
        number: of the message in the observer's transcripts, counted over all of them.
        sender: who sent it.
        receiver: who got it.
        kind: of message.
    """

    number: int
    sender: str
    receiver: str
    kind: str
    _message: Message = field(repr=False)
    _reads: frozenset[str] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        """The value of one field.

        Raises:
            ProtocolError: the attack did not declare it.
        """
        if f"{self.kind}.{name}" not in self._reads:
            raise ProtocolError(
                f"the attack reads {self.kind}.{name}, which it does not declare", hint="add it to its `reads`"
            )
        return getattr(self._message, name)


Entry = tuple[int, str, str, Message]
"""Number, sender, receiver, message."""


class View:
    """The messages that one observer sent and received, in order, as far as one attack reads them.

    Args:
        rights: of the observer.
        entries: the messages.
        reads: fields that may be read, as ``Kind.field``.
        targets: rows that are asked for, by the number of a pass's message; ``None``: every row of every pass.

    Raises:
        ProtocolError: a message or a field that the observer does not see.
    """

    def __init__(
        self,
        rights: Rights,
        entries: Sequence[Entry],
        reads: frozenset[str],
        targets: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        rights.check(reads)
        self.rights = rights
        self.reads = reads
        self.targets = targets
        self._entries = [_allowed(rights, entry) for entry in entries]

    def messages(self, kind: str) -> list[Seen]:
        """All messages of a kind, in order; of passes, those that have targets.

        Raises:
            ProtocolError: the attack declares no field of this kind.
        """
        if not any(name.startswith(f"{kind}.") for name in self.reads):
            raise ProtocolError(
                f"the attack reads {kind}, which it does not declare", hint=f"add {kind}.FIELD to its `reads`"
            )
        return [
            Seen(number, sender, receiver, kind, message, self.reads)
            for number, sender, receiver, message in self._entries
            if type(message).__name__ == kind
        ]

    def rows(self, number: int, count: int) -> list[int]:
        """Rows that are asked for of a pass of ``count`` rows."""
        return list(range(count)) if self.targets is None else list(self.targets.get(number, ()))

    def aimed(self, targets: Mapping[int, Sequence[int]] | None) -> View:
        """The same view with other rows asked for; ``None``: all."""
        return View(self.rights, self._entries, self.reads, targets)

    def narrowed(self, reads: frozenset[str]) -> View:
        """The same messages with other fields to be read: the scorer's view made an attack's."""
        return View(self.rights, self._entries, reads, self.targets)

    def only(self, keep: Callable[[int, Message], bool]) -> View:
        """A view of some of the messages, told by number and content."""
        return View(self.rights, [each for each in self._entries if keep(each[0], each[3])], self.reads, self.targets)

    def count(self, counts: Callable[[int, Message], bool]) -> int:
        """How many of the messages are such."""
        return sum(counts(each[0], each[3]) for each in self._entries)

    def altered(self, change: Callable[[int, Message], Message]) -> View:
        """A view whose messages were replaced: the controls' (what the observer would have seen without protection)."""
        entries = [(n, sender, receiver, change(n, message)) for n, sender, receiver, message in self._entries]
        return View(self.rights, entries, self.reads, self.targets)

    def __len__(self) -> int:
        return len(self._entries)


def load_view(
    paths: Sequence[Path], rights: Rights, reads: frozenset[str], keep: Callable[[Message], bool] = lambda _: True
) -> View:
    """The view of an observer from its transcripts, in the order they were written.

    Every message is checked against the rights; those of kinds that are not read, or not to be kept, are then dropped.

    Raises:
        DataError: no transcript, or one that is damaged, of another version, another observer's, or of another run.
        ProtocolError: it holds a message that the design does not reveal, or ``reads`` names one.
    """
    rights.check(reads)
    if not paths:
        raise DataError(
            f"there is no transcript of the {rights.observer}",
            hint=f'record it: session.record = ["{rights.observer}"]',
        )
    kinds = {name.partition(".")[0] for name in reads}
    entries: list[Entry] = []
    number, fingerprints = 0, set()
    for path in paths:
        header = read_transcript_header(path)
        if header.observer != rights.observer:
            raise DataError(
                f"{path} is the transcript of the {header.observer}, not of the {rights.observer}",
                hint="give each observer its own",
            )
        fingerprints.add(header.fingerprint)
        for record, message in read_transcript(path):
            ends = (rights.observer, record.peer)
            sender, receiver = ends if record.direction == "sent" else ends[::-1]
            entry = _allowed(rights, (number, sender, receiver, message))
            number += 1
            if type(message).__name__ in kinds and keep(message):
                entries.append(entry)
    if len(fingerprints) > 1:
        raise DataError(
            f"the transcripts beside {paths[0]} are of different configurations", hint="give those of one run"
        )
    return View(rights, entries, reads)


def _allowed(rights: Rights, entry: Entry) -> Entry:
    _, sender, receiver, message = entry
    kind = type(message).__name__
    sees = rights.receives if receiver == rights.observer else rights.sends
    if rights.observer not in {sender, receiver} or kind not in sees:
        raise ProtocolError(
            f"a {kind} from {sender} to {receiver} is nothing that the {rights.observer} sees under {rights.design}",
            hint="the transcript is another design's, or was put together by hand",
        )
    return entry
