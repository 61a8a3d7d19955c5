"""What goes wrong around the parties: full disks, wrong clocks, a provider that dies early, floods, mutated frames.

Each ends in a message with a hint and a code that is not zero, and costs a bounded amount of memory.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks._parties import COMMON, Parties, kill, parties, polling, tuning
from benchmarks.kills import measure_design
from commands import outside, write_config
from cutting import cut_config, serving
from helpers import make_config
from test_container import address_space_bounded, mutate
from test_secure_channel import connecting, listening, meet
from test_service_limits import opening, running
from test_trunk_server import forward, opened, until
from veiltune.config import IdentityConfig
from veiltune.designs import DESIGNS
from veiltune.errors import (
    ConfigError,
    FrameError,
    PeerLostError,
    ProtocolError,
    UserError,
    VeiltuneError,
    storage_fault,
)
from veiltune.peers import PeerConfig
from veiltune.session import locking
from veiltune.session import service as service_module
from veiltune.session.dialling import dial
from veiltune.session.run import prepare_output
from veiltune.session.wiring import channel_options
from veiltune.training import COMMIT
from veiltune.transport import channel as channel_module
from veiltune.transport.codec import encode
from veiltune.transport.frame import MAX_PAYLOAD_BYTES, pack_head
from veiltune.transport.identity import (
    BACK_DATED,
    VALID_DAYS,
    load_identity,
    make_identity,
    private_file,
    renew_identity,
)
from veiltune.transport.messages import Acknowledged, TrunkShard, WeightShard
from veiltune.transport.secure_channel import SecureChannel
from veiltune.transport.stream import SocketChannel

MOUNT, UNMOUNT = shutil.which("mount") or "mount", shutil.which("umount") or "umount"
STEPS = 30
HOUR = timedelta(hours=1)
MIB = 1 << 20


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (OSError(errno.ENOENT, "No such file"), None),
        (RuntimeError("something else (os error 2)"), None),
        (ValueError("28"), None),
    ],
)
def test_what_is_a_disks_fault_and_what_is_not(error: Exception, said: str | None) -> None:
    fault = storage_fault(error, "the host's")
    if said is None:
        assert fault is None
    else:
        assert fault is not None
        assert fault.message == f"the host's disk cannot be written to: {said}"
        assert "--resume" in str(fault.hint)


def test_an_output_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    """With a hundred bytes allowed in any file: what a full disk leads to, where nothing can be mounted."""
    resource = pytest.importorskip("resource")
    config = write_config(tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # noqa: E731
    with outside(["tune", str(config)], preexec_fn=limit) as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    assert "error: this machine's disk cannot be written to: File too large" in err
    assert "hint: make room" in err
    assert "Traceback" not in err


def test_an_output_that_a_kill_left_half_prepared_is_taken_again(tmp_path: Path) -> None:
    """Killed while the configuration was written, and while an old run was cleared away: neither blocks what comes next."""
    config = make_config("obfuscatune", "llama", tmp_path / "run")
    output = Path(config.output)
    output.mkdir()
    (output / "config.json.123.partial").write_text("{", encoding="utf-8")
    prepare_output(config, resume=False, overwrite=False)
    (output / "parties" / "owner").mkdir(parents=True)
    (output / COMMIT).write_text("{}", encoding="utf-8")
    removed: list[str] = []
    plain = shutil.rmtree

    def killed(path: Path, *_: Any) -> None:
        removed.append(path.name)
        raise KeyboardInterrupt

    shutil.rmtree = killed  # pyrefly: ignore
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare_output(config, resume=False, overwrite=True)
    finally:
        shutil.rmtree = plain
    assert removed == ["parties"]
    assert not (output / COMMIT).exists(), "the commit goes before what it names"
    prepare_output(config, resume=False, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["config.json"]
    (output / "config.json").rename(output / "precious.txt")
    with pytest.raises(ConfigError, match="is not a run of Veiltune"):
        prepare_output(config, resume=False, overwrite=True)


def test_an_output_is_one_sessions_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "WAIT_SECONDS", 0.2)
    output = tmp_path / "run"
    with locking.sole_use(output) as held:
        if held is None:
            pytest.skip("this system has no such locks")
        with pytest.raises(UserError, match="another session is at work in"), locking.sole_use(output):
            pass
    assert not output.exists(), "nothing came of it"
    with locking.sole_use(output):
        (output / "config.json").touch()
    with locking.sole_use(output):
        assert output.exists()


@pytest.mark.slow
@pytest.mark.ci
def test_a_party_that_outlives_its_supervisor_keeps_others_out_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "WAIT_SECONDS", 0.5)
    made = Parties(tmp_path, {**COMMON, "design": "local", "model": "random:llama:2,32,4,259"})
    owner = made.tune(tuning(tmp_path / "train.jsonl", 5000))
    output = made.output("owner")
    for _ in polling(100):
        assert owner.is_running, owner.errors()
        if (output / COMMIT).exists():
            break
    parent, *workers = owner.pids()
    assert workers
    for pid in workers:
        kill(pid, signal.SIGSTOP)
    kill(parent)
    owner.process.wait()
    with pytest.raises(UserError, match="another session is at work in"), locking.sole_use(output):
        pass
    for pid in workers:
        kill(pid, signal.SIGCONT)
    monkeypatch.setattr(locking, "WAIT_SECONDS", 30.0)
    with locking.sole_use(output):
        assert (output / COMMIT).exists()


def enclaved(design: str, model: str, **more: Any) -> dict[str, Any]:
    return {
        "design": design,
        "model": model,
        f"{design}.key_seed": 5,
        "enclave.allow_simulated": True,
        **COMMON,
        **more,
    }


@contextmanager
def small_disk(path: Path) -> Generator[None]:
    """A file system of its own with little room; skipped where nothing may be mounted."""
    path.mkdir(parents=True)
    command = [MOUNT, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if shutil.which(MOUNT) is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run([UNMOUNT, "-l", str(path)], check=False)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("full", ["host", "owner"])
def test_a_disk_that_fills_up_ends_in_a_message_and_the_run_goes_on_when_there_is_room(
    full: str, tmp_path: Path
) -> None:
    agreed = enclaved("obfuscatune", "random:llama:2,32,4,259")
    own = tuning(tmp_path / "train.jsonl", STEPS)
    with small_disk(tmp_path / full / "out"), parties(tmp_path, agreed) as made:
        whole = made.tune(own, "--overwrite")
        assert whole.ended() == 0, whole.errors()
        expected = json.loads(whole.printed())["loss"]
        owner = made.tune(own, "--overwrite")
        commit, filler = made.output("owner") / COMMIT, made.output(full) / "filler"
        for _ in polling(100):
            assert owner.is_running, owner.errors()
            if commit.exists() and 2 <= json.loads(commit.read_text())["step"] < STEPS - 4:
                break
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert owner.ended() == 1, owner.errors()
        said = owner.errors()
        assert f"the {full}'s disk cannot be written to: No space left on device" in said
        assert "hint: make room" in said
        assert "Traceback" not in said
        step = json.loads(commit.read_text())["step"]
        assert 2 <= step < STEPS
        filler.unlink()
        again = made.tune(own, "--resume")
        assert again.ended() == 0, again.errors()
        assert json.loads(again.printed())["loss"] == expected


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_an_hour_off_is_no_obstacle_to_a_fresh_certificate(hours: int, tmp_path: Path) -> None:
    make_identity(tmp_path, "owner")
    now = datetime.now(UTC) + hours * HOUR
    load_identity(private_file(tmp_path, "owner"), now=now)
    near, far = meet(listening(clock=lambda: now), connecting())
    with near, far:
        assert near.peer.role == "provider"


WRONG = {
    "not valid yet by an hour": (BACK_DATED + HOUR, "is not valid before"),
    "expired an hour ago": (-timedelta(days=VALID_DAYS) - HOUR, "expired on"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.ci] if number else [])
        for number, name in enumerate(WRONG)
    ],
)
def test_a_certificate_out_of_its_dates_ends_a_run_before_anything_is_dialled(name: str, tmp_path: Path) -> None:
    shift, said = WRONG[name]
    made = Parties(tmp_path, {**COMMON, "design": "split", "model": "random:llama:5,32,4,259"})
    made.addresses["provider"] = "127.0.0.1:1"
    renew_identity(tmp_path / "owner", "owner", now=datetime.now(UTC) + shift)
    owner = made.tune(tuning(tmp_path / "train.jsonl", STEPS))
    assert owner.ended() == 2
    assert f"its certificate {said}" in owner.errors()
    assert "--renew" in owner.errors()
    assert "this machine's clock says" in owner.errors()
    assert "Traceback" not in owner.errors()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.ci
def test_a_certificate_that_expires_while_a_service_runs(tmp_path: Path) -> None:
    """Sessions are refused by name at both ends until it is renewed."""
    keys = {role: make_identity(tmp_path, role) for role in ("host", "enclave")}
    last = datetime.now(UTC) - timedelta(days=VALID_DAYS) + timedelta(seconds=8)
    renew_identity(tmp_path, "host", now=last)
    peers = tuple(PeerConfig(role=role, key=identity.pin) for role, identity in keys.items())

    def config(role: str) -> Any:
        plain = make_config("obfuscatune", "llama", tmp_path / "out", session={"processes": True, "retry_seconds": 2.0})
        return plain.model_copy(update={"identity": IdentityConfig(key=private_file(tmp_path, role)), "peers": peers})

    with running(config("host"), "host") as made:
        session = config("enclave").session.model_copy(update={"connect": {"host": made.service.address}})
        asking = config("enclave").model_copy(update={"session": session})
        options = channel_options(DESIGNS["obfuscatune"], "enclave", "host", ())
        dial(asking, "host", options, me="enclave").close()
        made.until(lambda: "owner_gone" in made.names())
        time.sleep(max(0.0, (last + timedelta(days=VALID_DAYS) - datetime.now(UTC)).total_seconds() + 1.1))
        with pytest.raises(ProtocolError):
            dial(asking, "host", options, me="enclave")
        made.until(lambda: "turned_away" in made.names())
        assert "own certificate expired on" in made.events[-1][1]["why"]


# --- a provider that dies while the model is on its way ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
def test_a_provider_that_is_killed_while_it_sends_the_model(tmp_path: Path) -> None:
    """The enclave is held in the middle of the stream; without the provider it can only end the session."""
    blocks = 40
    agreed = enclaved("veil", f"random:llama:{blocks},32,4,259")
    own = tuning(tmp_path / "train.jsonl", 2)
    with parties(tmp_path, agreed) as made:
        owner = made.tune(own)
        enclave, provider = made.running["enclave"], made.running["provider"]
        provider.wait_for("provisioned")
        kill(enclave.pid, signal.SIGSTOP)
        time.sleep(0.3)
        seen = len(provider.events("provisioned"))
        provider.kill()
        kill(enclave.pid, signal.SIGCONT)
        assert 1 <= seen < blocks, "it was to be killed in the middle"
        assert owner.ended() == 4, owner.errors()
        said = owner.errors()
        assert "the provider closed its link" in said
        assert "hint: " in said
        assert "Traceback" not in said
        made.start("provider")
        again = made.tune(own, "--overwrite")
        assert again.ended() == 0, again.errors()


# --- floods -----------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Of this process, now."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def plain_pair(**theirs: Any) -> tuple[SocketChannel, SocketChannel]:
    near, far = socket.socketpair()
    return SocketChannel(near, "owner", "provider"), SocketChannel(far, "provider", "owner", **theirs)


def secured_pair(**theirs: Any) -> tuple[SecureChannel, SecureChannel]:
    near, far = meet(listening(), connecting())
    return SecureChannel(near, "owner", "provider"), SecureChannel(far, "provider", "owner", **theirs)


@pytest.mark.parametrize("pair", [plain_pair, secured_pair], ids=["plain", "secured"])
def test_who_sends_faster_than_it_is_read_waits(pair: Callable[..., Any]) -> None:
    """Of 400 MiB that are sent and not read, what the sockets' own buffers hold is all that is anywhere."""
    mine, theirs = pair()
    mine._stall_seconds = 1.0
    shard = WeightShard({"w": torch.zeros(4 * MIB, dtype=torch.uint8)}, last=False)
    before, sent = resident_bytes(), 0

    def send() -> None:
        nonlocal sent
        for _ in range(100):
            mine.send(shard)
            sent += 1

    with mine, theirs, pytest.raises(PeerLostError, match=r"made no progress for 1 s"):
        send()
    assert sent < 10
    assert resident_bytes() - before < 64 * MIB


def announcing(num_bytes: int) -> bytes:
    """The head of a frame whose one tensor has so many bytes."""
    fields = {"tensors": {"w": 0}, "last": False}
    blobs = [["uint8", [num_bytes], 0, num_bytes]]
    return pack_head({"kind": "WeightShard", "fields": fields, "blobs": blobs}, num_bytes)


@pytest.mark.parametrize("pair", [plain_pair, secured_pair], ids=["plain", "secured"])
@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [(1 << 30, r"made no progress for 0\.3 s"), (MAX_PAYLOAD_BYTES + 64, "exceeds the limit")],
)
def test_a_huge_frame_that_is_announced_and_does_not_come_costs_nothing(
    pair: Callable[..., Any], num_bytes: int, said: str
) -> None:
    mine, theirs = pair(stall_seconds=0.3)
    before = resident_bytes()
    with mine, theirs:
        mine._send_pieces([memoryview(announcing(num_bytes)), memoryview(bytes(1000))])
        with pytest.raises(VeiltuneError, match=said):
            theirs.recv(5)
        assert resident_bytes() - before < 16 * MIB
        with pytest.raises(ProtocolError, match="out of step"):
            theirs.recv(5)


def test_a_payload_for_which_there_is_no_memory_is_refused() -> None:
    mine, theirs = plain_pair()
    with mine, theirs, address_space_bounded(256 * MIB):
        mine._send_pieces([memoryview(announcing(1 << 30))])
        with pytest.raises(FrameError, match="there is no memory for a payload of 1073741824 bytes"):
            theirs.recv(5)


def service_config(directory: Path) -> Any:
    session = {"processes": True, "token_file": str(directory / "token"), "retry_seconds": 5.0}
    return make_config("obfuscatune", "llama", directory / "host", session=session)


def test_what_a_peer_says_first_must_be_short(tmp_path: Path) -> None:
    with running(service_config(tmp_path), "host") as made:
        link = made.link("enclave", "host")
        link.send(TrunkShard({"w": torch.zeros(2 * MIB, dtype=torch.uint8)}))
        with pytest.raises(ProtocolError, match="a payload of 2097152 bytes exceeds the limit of 1048576"):
            link.recv(10)
        link.close()
        link = made.link("enclave", "host")
        link.send(opening(made.config))
        assert isinstance(link.recv(10), Acknowledged)
        link.close()


def test_no_more_links_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_LINKS", 3)
    with running(service_config(tmp_path), "host") as made:
        links = [made.link("enclave", "host") for _ in range(4)]
        made.until(lambda: "turned_away" in made.names())
        assert made.events[-1][1]["why"] == "3 links are open already"
        for link in links:
            link.close()
        made.until(lambda: made.names().count("owner_gone") == 3)


def test_an_owner_that_floods_a_provider_and_reads_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "STALL_SECONDS", 1.0)
    config = cut_config("split", tmp_path / "provider", session={"token_file": str(tmp_path / "token")})
    with serving(config) as made:
        link = opened(made)
        before, sent = resident_bytes(), 0
        states = torch.zeros(16, 256, 32)
        try:
            for ticket in range(1, 2000):  # half a gibibyte and more
                link.send(forward(ticket, states, keep=False))
                sent = ticket
        except PeerLostError:
            pass
        assert sent < 500
        assert resident_bytes() - before < 128 * MIB
        until(lambda: "owner_gone" in made.names())
        (why,) = [fields["why"] for name, fields in made.events if name == "owner_gone"]
        assert why in {"the owner made no progress for 1 s in the middle of a message", "the owner closed its link"}
        link.close()
        opened(made).close()


# --- mutated frames ---------------------------------------------------------------------------------------------------

FRAME = encode(WeightShard({"a": torch.arange(40.0), "b": torch.tensor([True, False])}, last=True)).to_bytes()


def heard(link: SocketChannel) -> bool:
    """Whether a message came; if not, then an error of ours."""
    try:
        link.recv(2)
    except (ProtocolError, PeerLostError):
        return False
    return True


def hear(pair: Callable[..., Any], data: bytes) -> bool:
    mine, theirs = pair(stall_seconds=1.0)
    with theirs:
        with mine, suppress(PeerLostError):
            mine._send_pieces([memoryview(data)])
        return heard(theirs)


def test_a_thousand_mutated_frames_over_a_plain_channel() -> None:
    draw, refused, slowest = random.Random(3), 0, 0.0
    assert hear(plain_pair, FRAME)
    with address_space_bounded(256 * MIB):
        for _ in range(1000):
            begin = time.perf_counter()
            refused += not hear(plain_pair, mutate(FRAME, draw))
            slowest = max(slowest, time.perf_counter() - begin)
    assert refused > 500
    assert slowest < 3.0


@pytest.mark.slow
@pytest.mark.ci
def test_a_thousand_mutated_frames_over_a_secured_channel() -> None:
    """Half from a peer that is let in and sends what it likes, half altered between the ends, where TLS notices."""
    draw, refused, slowest = random.Random(4), 0, 0.0
    assert hear(secured_pair, FRAME)
    before = resident_bytes()
    for number in range(1000):
        begin = time.perf_counter()
        if number % 2:
            refused += not hear(secured_pair, mutate(FRAME, draw))
        else:
            refused += not hear_record(mutate(FRAME, draw))
        slowest = max(slowest, time.perf_counter() - begin)
    assert refused > 900
    assert slowest < 5.0
    assert resident_bytes() - before < 64 * MIB


def hear_record(data: bytes) -> bool:
    """As `hear`, with bytes that are put onto the wire beneath TLS."""
    mine, theirs = secured_pair(stall_seconds=1.0)
    with theirs:
        socket.socket.send(mine._tls, data)
        mine.close()
        return heard(theirs)


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(("design", "kills"), [("veil", 3), ("online", 1)])
def test_killed_parties_cost_nothing_that_was_committed(design: str, kills: int) -> None:
    """The benchmark's own function, with few kills; `python -m benchmarks.kills` does a hundred."""
    rows = measure_design(design, kills, seed=11, steps=STEPS)
    assert rows[-1]["fault"] is None
    assert rows[-1]["is_exact"] is True
    assert [row["recovered"] for row in rows[:-1]] == [True] * kills
