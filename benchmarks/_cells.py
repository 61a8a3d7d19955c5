"""Long benchmarks, cell by cell: what was measured is kept, so that an interrupted run goes on where it stopped.

A cell is one session with its settings. It lies under ``benchmarks/.cells`` (not committed) by the digest of those settings
and of the libraries' versions; deleting the folder measures everything anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._record import Row
from veiltune.results import versions, write_json

CELLS = Path(__file__).parent / ".cells"


def cell(name: str, settings: dict[str, Any], measure: Callable[[], list[Row]]) -> list[Row]:
    """The rows of one cell of benchmark ``name``: read if they were measured before, else measured and kept."""
    text = json.dumps(
        [settings, versions()], sort_keys=True
    )  # what cannot be written afterwards is not measured either
    path = CELLS / name / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    rows = [{**row, "measured_at": time.strftime("%Y-%m-%d")} for row in measure()]
    write_json(path, {"settings": settings, "rows": rows})
    return rows
