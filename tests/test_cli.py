"""The command line from end to end, on tiny models: what it prints where, what it leaves, and what can be done with that."""

from __future__ import annotations

import io
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import helpers
from commands import PROMPT, Ran, outside, runner, write_config
from veiltune.cli import main
from veiltune.config import load_config
from veiltune.designs import DESIGNS, option_tables
from veiltune.display import Display
from veiltune.parties import Job
from veiltune.results import read_result

STEPS = 150


@pytest.fixture
def veiltune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return runner(capsys)


def as_configured(path: Path) -> Any:
    return load_config(path, options=option_tables())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of ``tune``: its configuration and its output directory."""
    directory = tmp_path_factory.mktemp("tuned")
    config = write_config(directory)
    with helpers.own_cache():
        assert main(["tune", str(config)]) == 0
    return config, directory / "out"


# --- tune -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
def test_tune_with_every_party_a_process(tmp_path: Path) -> None:
    config = write_config(tmp_path, session__processes=True, train__steps=2)
    with outside(["tune", str(config), "--json"]) as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    record = json.loads(out)
    assert record == json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert set(record["cost"]["peak_rss"]) == {"owner", "provider", "enclave", "host"}
    assert len(set(record["cost"]["peak_rss"].values())) == 4, "four processes, four sizes"
    assert record["simulated_enclave"] is True
    assert "SIMULATED ENCLAVE" in err
    assert "SIMULATED ENCLAVE" in (tmp_path / "out" / "log" / "owner.log").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_tune_leaves_a_record_a_plot_and_an_adapter(tuned: tuple[Path, Path]) -> None:
    _, output = tuned
    record = read_result(output / "result.json")
    assert len(record.loss) == 4
    assert record.design == "obfuscatune"
    assert record.data.train_examples == 24
    assert record.cost.seconds_per_step is not None
    assert record.cost.seconds_per_step.n == 4
    assert record.cost.bytes["enclave->host"]["SegmentForward"] > 0
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (output / "adapter").glob("adapter_*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_adapter_on_the_plain_model_gives_the_protected_logits(tuned: tuple[Path, Path]) -> None:
    path, output = tuned
    config = as_configured(path)
    ids = helpers.token_ids(2, 16)
    helpers.run(config, Job(verb="probe", probe={"input_ids": ids, "steps": 0}), resume=True)
    protected = load_file(output / "parties" / "owner" / "probe.safetensors")["logits"]
    with torch.no_grad():
        mine = helpers.peft_model("llama", output)(torch.tensor(ids)).logits
        untuned = helpers.plain_model("llama")(torch.tensor(ids)).logits
    assert helpers.relative_error(protected, mine) < 1e-5
    assert helpers.relative_error(protected, untuned) > 1e-3, "the adapter does something"


def test_tune_prints_people_a_table_on_stderr_alone(veiltune: Any, tmp_path: Path) -> None:
    ran = veiltune("tune", str(write_config(tmp_path)))
    assert ran.code == 0
    assert ran.out == ""
    assert "SIMULATED" in ran.err
    assert "seconds a step" in ran.err
    assert "What colour" not in ran.err, "none of the owner's text"


def test_set_overrides_the_file(veiltune: Any, tmp_path: Path) -> None:
    ran = veiltune("tune", str(write_config(tmp_path)), "--set", "train.steps=2", "--set", "design=local", "--json")
    assert ran.code == 0
    assert len(ran.json["loss"]) == 2
    assert ran.json["design"] == "local"
    assert ran.json["simulated_enclave"] is False


@pytest.mark.slow
@pytest.mark.ci
def test_ctrl_c_saves_and_resume_goes_on_as_if_nothing_had_been(veiltune: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    changes: dict[str, Any] = {"design": "local", "lora__init_seed": 3, "train__steps": STEPS}
    config = write_config(tmp_path / "a", **changes)
    with outside(["tune", str(config)]) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if f"tuning 0/{STEPS}" in line:
                break
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130, err
    assert f"resume with: veiltune tune {config} --resume" in err
    step = json.loads((tmp_path / "a" / "out" / "checkpoint.json").read_text(encoding="utf-8"))["step"]
    assert 0 < step < STEPS, "it was stopped on the way"

    assert not (tmp_path / "a" / "out" / "result.json").exists()
    resumed = veiltune("tune", str(config), "--resume", "--json")
    whole = veiltune("tune", str(write_config(tmp_path / "b", **changes)), "--json")
    assert resumed.json["loss"] == pytest.approx(whole.json["loss"], rel=1e-6)


# --- generate ---------------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes; a directory that does not exist has none."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_generate_streams_what_the_tuned_plain_model_says(veiltune: Any, tuned: tuple[Path, Path]) -> None:
    config, output = tuned
    before = contents(output)
    ran = veiltune("generate", str(config), "--prompt", PROMPT, "--max-new-tokens", "8")
    as_json = veiltune("generate", str(config), "--prompt", PROMPT, "--max-new-tokens", "8", "--json").json
    assert contents(output) == before, "a run's directory is read and not written"
    assert ran.code == 0
    assert ran.out == as_json["text"] + "\n"
    assert as_json["is_tuned"] is True
    assert as_json["simulated_enclave"] is True

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(helpers.model_directory("llama"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    plain = helpers.peft_model("llama", output).generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert as_json["tokens"] == plain[0, ids.shape[1] :].tolist()


def test_generate_without_a_run_uses_the_model_as_it_is(veiltune: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path, design="local")
    ran = veiltune("generate", str(config), "--prompt", PROMPT, "--max-new-tokens", "4", "--json")
    assert ran.code == 0
    assert ran.json["is_tuned"] is False
    assert not (tmp_path / "out").exists(), "the place is left to the run that is to be"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep", encoding="utf-8")
    assert veiltune("generate", str(config), "--prompt", PROMPT, "--max-new-tokens", "4", "--json").code == 0
    assert contents(tmp_path / "out") == {str(tmp_path / "out" / "mine.txt"): b"keep"}


def test_sampling_draws_anew_unless_told_the_seed(veiltune: Any, tmp_path: Path) -> None:
    ask = ("generate", str(write_config(tmp_path, design="local")), "--prompt", PROMPT, "--json", "--top-k", "50")
    seven, again = (veiltune(*ask, "--seed", "7").json for _ in range(2))
    assert seven["tokens"] == again["tokens"]
    first, second = veiltune(*ask), veiltune(*ask)
    assert first.json["tokens"] != second.json["tokens"]
    assert f"--seed {first.json['settings']['seed']}" in first.err, "a draw can be repeated"
    greedy = veiltune(*ask[:-2])
    assert "seed" not in greedy.json["settings"]


# --- inspect, help ----------------------------------------------------------------------------------------------------


def test_inspect_counts_without_making_weights(veiltune: Any) -> None:
    before = contents(helpers.scratch() / "cache")
    shown = veiltune("inspect", "random:gpt2-xl", "--json").json
    found, sees = shown["designs"], shown["sees"]
    assert contents(helpers.scratch() / "cache") == before
    assert set(found) == {"local", "obfuscatune compact", "obfuscatune paper", "veil 1+0", "cut 2+2"}
    assert set(sees) == set(DESIGNS)
    assert found["obfuscatune compact"]["param_share"] < 0.054, "the paper's figure for GPT2-XL"
    assert found["local"]["revealed_param_share"] == 1.0
    holders = {place["name"]: place["holder"] for place in found["obfuscatune compact"]["tensors"]}
    assert holders["transformer.wte.weight"] == "enclave"
    assert holders["transformer.h.0.attn.c_attn.weight"] == "host"
    assert any(line.startswith("besides: Q, K and V") for line in sees["obfuscatune"]["host"])
    holders = {place["name"]: place["holder"] for place in found["cut 2+2"]["tensors"]}
    assert [holders[f"transformer.h.{block}.attn.c_attn.weight"] for block in (1, 2, 45, 46)] == [
        "owner",
        "provider",
        "provider",
        "owner",
    ]
    assert 0.13 < found["cut 2+2"]["owner_share"] < 0.14


def test_inspect_shows_people_where_everything_is(veiltune: Any) -> None:
    ran = veiltune("inspect", "random:opt", "--placement", "paper")
    assert ran.code == 0
    assert ran.out == ""
    for text in ("token embedding", "host, masked", "obfuscatune paper", "under obfuscatune the host sees", "besides:"):
        assert text in ran.err
    assert "compact" not in ran.err.split("under local")[0]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["tune", "--help"]])
def test_help_is_on_stdout(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "veiltune" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error() -> None:
    with outside(["inspect", "random:llama", "--json"]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert err == ""


# --- what people see --------------------------------------------------------------------------------------------------


def shown(*, terminal: bool, seconds_per_step: float) -> str:
    """What a display writes of a short session."""
    now = itertools.count(0.0, seconds_per_step)
    screen = Console(file=io.StringIO(), force_terminal=terminal, width=150, highlight=False)
    with Display(screen, "tuning M under D", clock=lambda: next(now)) as display:
        display("attested", {"enclave": "simulated"})
        display("training", {"examples": 9, "total_steps": 40})
        display("border", {"bytes": 2_000_000, "messages": 3, "border": "enclave's border"})
        for step in range(1, 41):
            display("step", {"step": step, "total_steps": 40, "loss": 1.5, "tokens_per_second": 20.0})
        display("text", {"text": "a secret answer"})
        display("an event of a later version", {})
    return screen.file.getvalue()  # pyrefly: ignore[missing-attribute]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_the_simulated_enclave_and_shows_no_text(terminal: bool) -> None:
    text = shown(terminal=terminal, seconds_per_step=1.0)
    assert "SIMULATED ENCLAVE" in text
    assert "tuning M under D" in text
    assert "40/40" in text
    assert "loss 1.5000  20 tokens/s  2.0 MB over the enclave's border" in text
    assert "secret" not in text


def test_lines_are_not_written_too_often() -> None:
    def count(seconds_per_step: float) -> int:
        return shown(terminal=False, seconds_per_step=seconds_per_step).count("loss 1.5000")

    assert count(10.0) == 40
    assert count(0.01) == 1, "the last step alone"
    # A tick for each step and one for each line written: at most (41 + n) / 5 of n lines, and the two ends.
    assert 8 <= count(1.0) <= 12
