"""One session at a time in an output directory, also where a party has outlived the supervisor that was killed.

The lock is the operating system's, on the directory itself: nothing is left of it when its last holder ends, however that ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from veiltune.errors import UserError

WAIT_SECONDS = 20.0
"""A party that lost its supervisor notices at the end of its step."""
_POLL_SECONDS = 0.1


@contextmanager
def sole_use(output: Path) -> Generator[int | None]:
    """Have a directory to oneself, which is made if there is none.

    Yields a descriptor to hand to the parties' processes: the directory is taken until all of them have ended. ``None`` on
    systems without such locks.

    Raises:
        UserError: somebody else has it, and keeps it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield None
        return
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_RDONLY)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another session is at work in {str(output)!r}",
                        hint="let it end, or choose another output directory",
                    ) from None
            time.sleep(_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)
        if is_new and not any(output.iterdir()):  # nothing came of it
            output.rmdir()
