"""A session whose owner is this process: the others are real ones, and say themselves why they end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import make_config
from veiltune.session import PartyFailure
from veiltune.session.live import live_owner

PROCESSES = {"processes": True}


@pytest.mark.slow
@pytest.mark.ci
def test_the_owner_in_hand_trains_and_a_party_that_refuses_is_heard(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    with live_owner(make_config("veil", "llama", tmp_path / "live", session=PROCESSES)) as owner:
        first, _ = owner.tuner.evaluate(ids, torch.ones_like(ids), ids)
        for _ in range(3):
            owner.tuner.accumulate(ids, torch.ones_like(ids), ids, 3)
            owner.tuner.step(1e-2)
        assert owner.tuner.evaluate(ids, torch.ones_like(ids), ids)[0] < first
    refused = make_config("veil", "llama", tmp_path / "refused", session=PROCESSES, veil={"enclave_layers": 9})
    with pytest.raises(PartyFailure, match="does not fit a model of 2 blocks") as caught, live_owner(refused):
        pass
    assert caught.value.role == "enclave"
