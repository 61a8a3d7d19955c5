"""``python -m veiltune`` is ``veiltune``."""

from __future__ import annotations

import sys

from veiltune.cli import main

if __name__ == "__main__":
    sys.exit(main())
