"""The main of one of the host's ranks but the first: ``python -m veiltune.designs.veil.rank_main``.

It finds rank 0 by the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or, where rank 0
started it, by the file in VEILTUNE_RANKS_FILE. Everything else it hears from rank 0.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

from veiltune.errors import ConfigError, RankLostError, VeiltuneError

log = logging.getLogger("veiltune.designs.veil.rank_main")


def main() -> int:
    """Be one rank until rank 0 is done. The exit code is that of the error, if there was one."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from veiltune.designs.veil.group import RankGroup
    from veiltune.designs.veil.host import build_share
    from veiltune.designs.veil.ranks import arrival, follow

    group: RankGroup | None = None
    try:
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        group, store = RankGroup(rank, size), _store(size)
        store.set(arrival(rank), "1")
        group.join(store)
        follow(group, build_share)
    except RankLostError as error:
        log.info("rank 0 is gone: %s", str(error.__cause__).partition("\n")[0])
    except VeiltuneError as error:
        log.error("%s (%s)", error.message, error.hint)  # noqa: TRY400 - a deliberate error needs no traceback
        return error.exit_code
    finally:
        if group is not None:
            group.leave()
    return 0


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ConfigError(f"{name} = {value!r} is not a number", hint="set RANK and WORLD_SIZE as torchrun does")
    return int(value)


def _store(size: int) -> Any:
    from torch.distributed import FileStore, TCPStore

    from veiltune.designs.veil.ranks import STORE_FILE

    if (path := os.environ.get(STORE_FILE)) is not None:
        return FileStore(path, size)
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise ConfigError("MASTER_ADDR is not set", hint="set MASTER_ADDR and MASTER_PORT to veil.rendezvous")
    return TCPStore(host, _number("MASTER_PORT"), size, is_master=False)


if __name__ == "__main__":
    sys.exit(main())
