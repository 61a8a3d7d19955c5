"""Whole sessions: threads and processes alike, links alike, deaths, interruptions, and what an output directory may hold.

Tests that start processes are slow: each party is a new interpreter.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import veiltune
from helpers import (
    exported_adapter,
    make_config,
    own_cache,
    relative_error,
    run,
    run_with,
    scratch,
    texts_of,
    tuned,
    write_examples,
)
from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import CheckpointError, ConfigError, VeiltuneError
from veiltune.parties.party import Job
from veiltune.secrets import MasterSecret
from veiltune.session import PartyDied, PartyFailure, Session
from veiltune.session.run import prepare_output
from veiltune.tee.attestation.simulated import WARNING
from veiltune.training import COMMIT
from veiltune.transport.messages import Message

SOURCE = str(Path(veiltune.__file__).parents[1])
STEPS = 10
KEY_SEED = 5


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_examples(tmp_path / "train.jsonl", 24)


@pytest.fixture(autouse=True)
def _processes_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", SOURCE)


def config_for(
    output: Path,
    data: Path,
    *,
    design: str = "obfuscatune",
    optimizer_at: str = "enclave",
    dropout: float = 0.0,
    session: dict[str, Any] | None = None,
    **train: Any,
) -> Config:
    """A run of `STEPS` AdamW steps of a tiny Llama; every random choice but the enclave's own is fixed."""
    tables: dict[str, Any] = (
        {"obfuscatune": {"optimizer_at": optimizer_at, "key_seed": KEY_SEED}} if design != "local" else {}
    )
    return make_config(
        design,
        "llama",
        output,
        data={"train": str(data)},
        lora={"dropout": dropout},
        train={"steps": STEPS, "batch_size": 4, "optimizer": "adamw", "learning_rate": 3e-3, **train},
        session=session or {},
        **tables,
    )


def committed(output: Path) -> dict[str, Any]:
    return json.loads((output / COMMIT).read_text(encoding="utf-8"))


# --- the output directory ---------------------------------------------------------------------------------------------


def test_a_transcript_of_nobody_is_refused(tmp_path: Path, data: Path) -> None:
    config = config_for(tmp_path / "run", data, session={"record": ["hots"]})
    with pytest.raises(ConfigError, match="'hots'") as raised:
        run(config, "tune")
    assert "'host'" in str(raised.value.hint)
    assert not (tmp_path / "run").exists()


def test_an_output_directory_is_not_overwritten_unasked(tmp_path: Path, data: Path) -> None:
    config = config_for(tmp_path / "run", data)
    prepare_output(config, resume=False, overwrite=False)
    (tmp_path / "run" / "precious").write_text("kept")
    with pytest.raises(ConfigError, match="is not empty") as caught:
        run(config, "tune")
    assert "--resume or --overwrite" in str(caught.value.hint)
    assert (tmp_path / "run" / "precious").exists()
    prepare_output(config, resume=False, overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_directory_that_is_no_run_is_never_overwritten(tmp_path: Path, data: Path) -> None:
    output = tmp_path / "photos"
    output.mkdir()
    (output / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is not a run of Veiltune"):
        prepare_output(config_for(output, data), resume=False, overwrite=True)
    assert (output / "holiday.jpg").exists()


def test_an_empty_directory_is_fine(tmp_path: Path, data: Path) -> None:
    (tmp_path / "run").mkdir()
    assert prepare_output(config_for(tmp_path / "run", data), resume=False, overwrite=False) is None


DAMAGED = ["", "{", "[]", '{"step": 3}', '{"step": "x", "fingerprint": "y"}', '{"step": null, "fingerprint": "y"}']


@pytest.mark.parametrize("content", [None, *DAMAGED])
def test_there_must_be_something_to_resume(content: str | None, tmp_path: Path, data: Path) -> None:
    config = config_for(tmp_path / "run", data)
    prepare_output(config, resume=False, overwrite=False)
    if content is not None:
        (tmp_path / "run" / COMMIT).write_text(content)
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        prepare_output(config, resume=True, overwrite=False)


def test_only_the_same_configuration_resumes(tmp_path: Path, data: Path) -> None:
    config = config_for(tmp_path / "run", data)
    history = tuned(config)
    assert history["step"] == STEPS
    with pytest.raises(CheckpointError, match="another configuration") as caught:
        run(config_for(tmp_path / "run", data, learning_rate=1e-3), "tune", resume=True)
    assert caught.value.exit_code == 7
    # how the parties are started is nobody's agreement
    other_session = config_for(tmp_path / "run", data, session={"link": "tcp"})
    assert prepare_output(other_session, resume=True, overwrite=False) == STEPS
    assert tuned(other_session, resume=True)["loss"] == history["loss"]


# --- interruption and resumption, in threads --------------------------------------------------------------------------


class InterruptedInbox(queue.Queue[tuple[str, Message | None]]):
    """Ctrl-C falls on the supervisor as it waits, once its ``step`` has passed."""

    def __init__(self, session: Session, step: int) -> None:
        super().__init__()
        self.session = session
        self.step = step

    def get(self, block: bool = True, timeout: float | None = None) -> tuple[str, Message | None]:
        if self.session._step >= self.step:
            self.step = 1 << 30
            raise KeyboardInterrupt
        return super().get(block, timeout)


def run_interrupted(config: Config, step: int, events: list[str]) -> Any:
    """Run ``tune`` until Ctrl-C after ``step``."""
    prepare_output(config, resume=False, overwrite=False)
    session = Session(config, Job(verb="tune"), lambda name, _: events.append(name))
    session._inbox = InterruptedInbox(session, step)
    with own_cache():
        return session.run()


@pytest.mark.parametrize(
    ("design", "optimizer_at"), [("local", "host"), ("obfuscatune", "host"), ("obfuscatune", "enclave")]
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    design: str, optimizer_at: str, tmp_path: Path, data: Path
) -> None:
    """With dropout, so the random state of whoever draws must go on too."""
    options = {"design": design, "optimizer_at": optimizer_at, "dropout": 0.3, "steps": 30}
    whole = tuned(config_for(tmp_path / "whole", data, **options))
    config, events = config_for(tmp_path / "parts", data, **options), []
    outcome = run_interrupted(config, 2, events)
    assert outcome.interrupted
    assert "interrupting" in events
    done = committed(tmp_path / "parts")["step"]
    assert 2 <= done < 30, "the run was over before it could be interrupted"
    assert outcome.owner["history"]["step"] == done
    assert not (tmp_path / "parts" / "adapter").exists()
    history = tuned(config, resume=True)
    assert history["loss"] == whole["loss"], "bit for bit"
    assert not history["interrupted"]
    one, other = exported_adapter(tmp_path / "whole"), exported_adapter(tmp_path / "parts")
    assert all(relative_error(other[name], value) == 0.0 for name, value in one.items())


def test_dropout_is_not_idle_in_these_runs_and_follows_the_seed(tmp_path: Path, data: Path) -> None:
    losses = [tuned(config_for(tmp_path / str(rate), data, dropout=rate))["loss"] for rate in (0.0, 0.3)]
    assert losses[0][0] == losses[1][0], "the second factors are zero at first, so the first loss cannot differ"
    assert losses[0][-1] != losses[1][-1]
    torch.rand(3)  # whatever state the generator is in
    again = tuned(config_for(tmp_path / "again", data, dropout=0.3))["loss"]
    assert again == losses[1]


def test_ctrl_c_while_progress_is_shown_counts_as_well(tmp_path: Path, data: Path) -> None:
    def on_event(_: Session, name: str, fields: dict[str, Any]) -> None:
        if name == "step" and fields["step"] == 2:
            raise KeyboardInterrupt

    outcome = run_with(config_for(tmp_path / "run", data, steps=1000), Job(verb="tune"), on_event)
    assert outcome.interrupted
    assert 2 <= committed(tmp_path / "run")["step"] < 1000


def test_a_second_interruption_stops_at_once(tmp_path: Path, data: Path) -> None:
    config = config_for(tmp_path / "run", data, steps=100_000)
    seen = 0

    def on_event(session: Session, name: str, _: dict[str, Any]) -> None:
        nonlocal seen
        seen += name == "step"
        if seen == 2 and name == "step":
            session._inbox.get = interrupt  # type: ignore[method-assign]

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_with(config, Job(verb="tune"), on_event)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_ctrl_c_where_nothing_is_to_be_saved_stops_at_once(verb: Any, tmp_path: Path, data: Path) -> None:
    config = config_for(tmp_path / "run", data, steps=2)
    begun = False

    def on_event(session: Session, name: str, _: dict[str, Any]) -> None:
        nonlocal begun
        begun = begun or name == "provisioned"
        if name == "provisioned":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with(config, Job(verb=verb, prompt="a"), on_event)
    assert begun


def test_ctrl_c_while_the_result_is_measured_stops_at_once_and_loses_nothing(tmp_path: Path, data: Path) -> None:
    config = config_for(tmp_path / "run", data, steps=2)

    def on_event(_: Session, name: str, __: dict[str, Any]) -> None:
        if name == "exported":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with(config, Job(verb="tune"), on_event)
    assert committed(tmp_path / "run")["step"] == 2
    history = tuned(config, resume=True)
    assert len(history["loss"]) == 2
    assert exported_adapter(tmp_path / "run")


# --- failures of a party ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "optimizer_at"), [("local", "host"), ("obfuscatune", "host"), ("obfuscatune", "enclave")]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    design: str, optimizer_at: str, tmp_path: Path, data: Path
) -> None:
    """A learning rate at which float32 overflows; the rate warms up, so that the first steps do nothing and are kept."""
    train = {
        "learning_rate": 1e38,
        "warmup_steps": STEPS,
        "optimizer": "sgd",
        "max_grad_norm": 0,
        "checkpoint_every": 1,
    }
    config = config_for(tmp_path / "run", data, design=design, optimizer_at=optimizer_at, **train)
    with pytest.raises(PartyFailure, match=r"the (loss|gradient norm) of step \d+ is (nan|inf)") as caught:
        run(config, "tune")
    assert caught.value.role == "owner"
    assert caught.value.kind == "TrainingError"
    assert caught.value.exit_code == 6
    assert "learning_rate" in str(caught.value.hint)
    step = committed(tmp_path / "run")["step"]
    assert step >= 1
    assert all(math.isfinite(loss) for loss in committed(tmp_path / "run")["history"]["loss"])
    again = Job(verb="probe", probe={"input_ids": [[1, 2, 3]], "steps": 1})
    assert run(config, again, resume=True).owner is not None  # every party's share of it loads


def test_a_malformed_line_stops_the_run_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    with pytest.raises(VeiltuneError, match=r"bad\.jsonl:2") as caught:
        run(config_for(tmp_path / "run", path), "tune")
    assert caught.value.exit_code == 2


def test_a_party_that_breaks_names_itself_and_quotes_nothing(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of an unexpected error may hold data, so it stays in the party's own log."""
    from veiltune.models.trunk import HostTrunk

    def explode(*_: Any) -> Any:
        raise ValueError("the patient's name is")

    monkeypatch.setattr(HostTrunk, "forward", explode)
    with pytest.raises(PartyFailure, match="internal error in the host: ValueError") as caught:
        run(config_for(tmp_path / "run", data), "tune")
    assert "patient" not in caught.value.message + str(caught.value.hint)
    assert caught.value.role == "host"


# --- what is kept on disk ---------------------------------------------------------------------------------------------


def written(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def secret_words(data: Path) -> list[bytes]:
    key = MasterSecret.for_tests(KEY_SEED).reveal()
    return [*(text.encode() for text in texts_of(data)), key, key.hex().encode()]


def assert_no_secret(files: dict[str, bytes], data: Path) -> None:
    for name, content in files.items():
        for word in secret_words(data):
            assert word not in content, name


def test_neither_events_nor_files_nor_results_hold_text_or_keys(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The owner's own transcript is what it sent, so it is the one exception; it holds token ids."""
    events: list[Any] = []
    session = {"record": ["owner", "provider", "enclave", "host"]}
    config = config_for(tmp_path / "run", data, session=session, checkpoint_every=4)
    outcome = run(config, "tune", on_event=lambda name, fields: events.append((name, fields)))
    files = written(tmp_path / "run")
    assert {"transcript/host.vtt", "transcript/owner.vtt", COMMIT, "config.json"} <= files.keys()
    assert_no_secret(files, data)
    said = json.dumps([events, outcome.figures, outcome.traffic], default=str).encode() + caplog.text.encode()
    assert_no_secret({"what was said": said}, data)
    assert WARNING in caplog.text
    assert outcome.owner["enclave"] == "simulated"
    for role in DESIGNS["obfuscatune"].roles:
        transcript = tmp_path / "run" / "transcript" / f"{role}.vtt"
        assert transcript.stat().st_mode & 0o777 == 0o600


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The data and the losses of an undisturbed run, in threads."""
    directory = tmp_path_factory.mktemp("reference")
    data = write_examples(directory / "train.jsonl", 24)
    return data, tuned(config_for(directory / "run", data))["loss"]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("link", ["shared_memory", "tcp"])
def test_processes_and_links_change_no_bit(link: str, reference: tuple[Path, list[float]], tmp_path: Path) -> None:
    data, losses = reference
    config = config_for(tmp_path / "run", data, session={"processes": True, "link": link, "record": ["host"]})
    outcome = run(config, "tune")
    assert outcome.owner["history"]["loss"] == losses
    assert outcome.figures.keys() == DESIGNS["obfuscatune"].roles.keys()
    logs = {path.name: path.read_text() for path in (tmp_path / "run" / "log").iterdir()}
    assert logs.keys() == {f"{role}.log" for role in DESIGNS["obfuscatune"].roles}
    assert WARNING in logs["enclave.log"]
    assert "Traceback" not in "".join(logs.values())
    assert_no_secret(written(tmp_path / "run"), data)


def kill_at(role: str, step: int, pids: dict[str, int]) -> Any:
    """An observer that kills a party once a step is done."""

    def on_event(session: Session, name: str, fields: dict[str, Any]) -> None:
        pids.update({each: running.process.pid for each, running in session._parties.items() if running.process})
        if name == "step" and fields["step"] == step:
            os.kill(pids[role], signal.SIGKILL)

    return on_event


def is_gone(pid: int) -> bool:
    """Whether a child has ended and was waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("role", "optimizer_at"), [("host", "host"), ("enclave", "enclave"), ("owner", "enclave"), ("provider", "enclave")]
)
def test_a_party_that_is_killed_stops_the_others_and_the_run_resumes_exactly(
    role: str, optimizer_at: str, tmp_path: Path, data: Path
) -> None:
    options = {"optimizer_at": optimizer_at, "checkpoint_every": 2, "steps": 60}
    losses = tuned(config_for(tmp_path / "whole", data, **options))["loss"]
    config = config_for(tmp_path / "run", data, session={"processes": True}, **options)
    pids: dict[str, int] = {}
    with pytest.raises(PartyDied) as caught:
        run_with(config, Job(verb="tune"), kill_at(role, 5, pids))
    assert caught.value.message.startswith(f"the {role} was killed by signal 9 after step ")
    assert "the others have stopped" in caught.value.message
    assert "\n" not in caught.value.message
    assert "--resume" in str(caught.value.hint)
    assert caught.value.exit_code == 4
    assert pids.keys() == DESIGNS["obfuscatune"].roles.keys()
    assert all(is_gone(pid) for pid in pids.values())
    done = committed(tmp_path / "run")["step"]
    assert 4 <= done <= 60
    assert done < 60 or role == "provider"  # whom nobody needs until the end
    history = tuned(config_for(tmp_path / "run", data, **options), resume=True)
    assert history["loss"] == losses, "bit for bit"


@pytest.mark.slow
@pytest.mark.ci
def test_a_party_killed_before_there_is_a_checkpoint(tmp_path: Path, data: Path) -> None:
    config = config_for(tmp_path / "run", data, session={"processes": True}, steps=1000)
    with pytest.raises(PartyDied, match=r"the host was killed by signal 9 after step \d+; the others") as caught:
        run_with(config, Job(verb="tune"), kill_at("host", 2, {}))
    assert "--overwrite" in str(caught.value.hint)
    assert not (tmp_path / "run" / COMMIT).exists()


SUPERVISOR = """
import json, sys
from pathlib import Path
from veiltune.config import load_config
from veiltune.designs import option_tables
from veiltune.parties.party import Job
from veiltune.session import run_session

def main():
    config = load_config(json.loads(Path(sys.argv[1]).read_text()), options=option_tables())
    def show(name, fields):
        print(json.dumps([name, fields], default=str), flush=True)
    outcome = run_session(config, Job(verb="tune"), on_event=show, resume=sys.argv[2] == "resume")
    print(json.dumps(["outcome", {"history": outcome.owner["history"], "interrupted": outcome.interrupted}]), flush=True)

main()
"""


def supervise(config: Config, how: str, *, interrupt_after: int | None = None) -> dict[str, Any]:
    """Run ``tune`` in a supervisor of its own, with a real SIGINT after a step; returns its outcome."""
    path = Path(config.output).with_suffix(".json")
    path.write_text(config.to_json())
    environment = {**os.environ, "VEILTUNE_CACHE": str(scratch() / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", SUPERVISOR, str(path), how]
    outcome: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            name, fields = json.loads(line)
            if name == "step" and fields["step"] == interrupt_after:
                process.send_signal(signal.SIGINT)
            if name == "outcome":
                outcome = fields
    assert process.returncode == 0
    return outcome


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("optimizer_at", "dropout"), [("enclave", 0.3), ("host", 0.3)])
def test_ctrl_c_leaves_a_checkpoint_and_resuming_gives_the_same_losses(
    optimizer_at: str, dropout: float, tmp_path: Path, data: Path
) -> None:
    options: dict[str, Any] = {"optimizer_at": optimizer_at, "dropout": dropout, "steps": 80}
    options["session"] = {"processes": True}
    whole = supervise(config_for(tmp_path / "whole", data, **options), "anew")
    config = config_for(tmp_path / "parts", data, **options)
    parts = supervise(config, "anew", interrupt_after=3)
    assert parts["interrupted"]
    done = parts["history"]["step"]
    assert 3 <= done < 80
    assert committed(tmp_path / "parts")["step"] == done
    assert parts["history"]["loss"] == whole["history"]["loss"][:done]
    rest = supervise(config, "resume")
    assert not rest["interrupted"]
    assert rest["history"]["loss"] == whole["history"]["loss"], "bit for bit"
