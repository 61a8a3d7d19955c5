"""What holds for the whole suite: the environment, shape checks, repeatable draws."""

from __future__ import annotations

import os
import sys

# Before anything imports torch, and inherited by the processes that tests start.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # parties share cores: an idle one must not spin
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Every annotation of the package is checked at run time, shapes included: Float[Tensor, "tokens d"] is a test.
# VEILTUNE_UNCHECKED=1 leaves that out, to tell a slow test from a slow check.
CHECKED = os.environ.get("VEILTUNE_UNCHECKED", "") in {"", "0"}
if CHECKED:
    install_import_hook("veiltune", "typechecker.checked")

# Repeatable by default; `--hypothesis-profile explore` searches anew each time. No deadline: cores are shared.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50, database=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _repeatable_draws() -> None:
    """Seed the global generators that libraries such as peft draw from, where torch and numpy are in use at all."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)
    if (numpy := sys.modules.get("numpy")) is not None and hasattr(numpy, "random"):
        numpy.random.seed(0)
