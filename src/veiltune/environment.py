"""The environment of a party's process: what the C library and OpenMP read once, when a program starts."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

PARTY_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "100000",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
GIVE_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # said outright, it does not grow with use
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages where the system gives them on request
}


def party_environment(*, threads: int | None = None, frugal: bool = False) -> dict[str, str]:
    """This process's environment, with what it lacks to be a party's: what the user sets wins.

    Parties take turns on the same cores, so one that waits must not spin. Tensors come and go with every message, so freed
    memory stays with the process instead of being given back and faulted in again, unless it is to be ``frugal``.

    Args:
        threads: of OpenMP; ``None``: as many as there are cores, or as the user set.
        frugal: give freed memory back.
    """
    ours = {**PARTY_ENVIRONMENT, **(GIVE_MEMORY_BACK if frugal else KEEP_MEMORY)}
    environment = {**ours, **os.environ}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def start_again_as_party() -> None:
    """Put this program, from its start, in the place of itself if its environment is not yet a party's. Its process stays.

    Where that is not allowed it goes on as it is, and is slower.
    """
    wanted = party_environment()
    if wanted != dict(os.environ):
        sys.stdout.flush()
        with suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, wanted)  # noqa: S606 - this very program
