"""Who gets the adapter: what was agreed on, whatever the owner asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import make_config, run, write_examples
from veiltune.config import Config
from veiltune.errors import ConfigError
from veiltune.parties.owner import Owner
from veiltune.parties.party import Job
from veiltune.session import PartyFailure
from veiltune.tuner import Tuner

DESIGNS_WITH_ENCLAVE = ("obfuscatune", "veil")
PLACES = {"owner": "adapter", "provider": "parties/provider/adapter"}
ASKED = Job(verb="generate", prompt="red", settings={"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6})


def config_for(design: str, to: str, directory: Path, **tables: Any) -> Config:
    directory.mkdir(exist_ok=True)
    data = {"train": str(write_examples(directory / "train.jsonl", 8))}
    train = {"steps": 10, "optimizer": "adamw", "learning_rate": 3e-2, "batch_size": 4}
    adapter = {"to": to}
    return make_config(design, "llama", directory / "run", data=data, train=train, adapter=adapter, **tables)


def adapters(directory: Path) -> dict[str, dict[str, Tensor]]:
    found = {role: directory / "run" / place / "adapter_model.safetensors" for role, place in PLACES.items()}
    return {role: load_file(path) for role, path in found.items() if path.is_file()}


@pytest.mark.parametrize("design", DESIGNS_WITH_ENCLAVE)
def test_it_goes_where_it_was_agreed_to_go_and_nowhere_else(design: str, tmp_path: Path) -> None:
    made: dict[str, dict[str, dict[str, Tensor]]] = {}
    answers: dict[str, Any] = {}
    for to in ("owner", "provider", "both", "nobody"):
        config = config_for(design, to, tmp_path / to)
        traffic = run(config, "tune").traffic
        made[to] = adapters(tmp_path / to)
        crossed = {pair.partition("->")[2] for pair, kinds in traffic.items() if "AdapterTensors" in kinds}
        expected = {"owner", "provider"} if to == "both" else set() if to == "nobody" else {to}
        assert crossed == made[to].keys() == expected
        answers[to] = run(config, ASKED, resume=True).owner["generated"]["tokens"]
    plain = made["owner"]["owner"]
    for to in ("provider", "both"):
        for found in made[to].values():
            assert found.keys() == plain.keys()
            assert all(torch.allclose(found[name], plain[name], atol=1e-3) for name in plain)
    assert answers["nobody"] == answers["owner"], "it is served out of the sealed state"
    untuned = run(make_config(design, "llama", tmp_path / "untuned"), ASKED).owner["generated"]["tokens"]
    assert untuned != answers["owner"], "the adapter does nothing, so serving it shows nothing"


@pytest.mark.parametrize("design", DESIGNS_WITH_ENCLAVE)
@pytest.mark.parametrize("ask", [Tuner.adapter, Tuner.gradients, Tuner.hand_over])
def test_an_owner_that_asks_for_more_is_refused(
    design: str, ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Owner, "export", lambda self: ask(self.tuner))
    with pytest.raises(PartyFailure, match="it was agreed that the adapter goes to nobody") as caught:
        run(config_for(design, "nobody", tmp_path), "tune")
    assert caught.value.role == "enclave"
    assert adapters(tmp_path) == {}


@pytest.mark.parametrize("design", ["local", "split", "online", "gradfree", "offsite", "offline"])
def test_without_an_enclave_nobody_could_keep_to_it(design: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.to = 'nobody'.*whoever trains has the adapter"):
        run(config_for(design, "nobody", tmp_path), "tune")


def test_it_is_part_of_what_all_agree_on() -> None:
    prints = {make_config("veil", "llama", Path("x"), adapter={"to": to}).fingerprint() for to in ("owner", "nobody")}
    assert len(prints) == 2
