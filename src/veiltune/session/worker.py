"""The main of a party's process: what to be comes as JSON on standard input, links as inherited descriptors."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings


def main() -> None:
    """Be one party until its role ends."""
    start = json.loads(sys.stdin.buffer.read())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from veiltune.session.launch import attach
    from veiltune.session.party_main import run_party

    party, transcript = attach(start)
    run_party(party)
    if transcript is not None:
        transcript.close()


if __name__ == "__main__":
    main()
