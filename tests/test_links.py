"""The links that benchmarks and tests imitate: nothing arrives early, and what is lost was to be."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import network, tables
from benchmarks._link import probe, shaped_pair
from benchmarks._pace import UNHINDERED, Pace, Shape
from benchmarks._wire import Direction, carry

RATE, DELAY = 8e6, 0.03


@pytest.fixture
def shape() -> Generator[Shape]:
    made = Shape.create(RATE, DELAY)
    yield made
    made.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(pieces=st.lists(st.tuples(st.floats(0, 5), st.integers(0, 1 << 20)), min_size=1, max_size=20))
def test_pieces_leave_one_after_another(pieces: list[tuple[float, int]]) -> None:
    """Against the plain recurrence: a piece begins to leave when it is sent and the one before it has left."""
    shape, clock = Shape.create(RATE, DELAY), Clock()
    pace = Pace(shape, clock)
    left = 0.0
    for pause, num_bytes in pieces:
        clock.now += pause
        assert pace.waiting_bytes() == pytest.approx(max(0.0, left - clock.now) * RATE / 8)
        begins = max(clock.now, left)
        left = begins + num_bytes * 8 / RATE
        assert pace.due(num_bytes) == pytest.approx(left + DELAY)
    shape.close()


def test_a_shape_changes_for_whoever_has_it(shape: Shape) -> None:
    other = Shape(os.dup(shape.fd))
    pace = Pace(other, Clock())
    assert pace.due(1000) == pytest.approx(8000 / RATE + DELAY)
    shape.set(*UNHINDERED)
    assert other.get() == UNHINDERED
    assert pace.due(1000) == pytest.approx(8000 / RATE, abs=1e-6), "what waits still leaves when it would have"
    other.close()


@pytest.mark.parametrize("impossible", [(0.0, 0.0), (-1.0, 0.0), (1e6, -1e-3), (float("nan"), 0.0)])
def test_a_link_that_cannot_be_is_refused(shape: Shape, impossible: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no link has"):
        shape.set(*impossible)
    assert shape.get() == (RATE, DELAY)


def test_a_full_queue_loses_what_comes_and_keeps_what_was_there(shape: Shape) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        direction = Direction(shape, near.fileno(), queue_bytes=2500)
        for number in range(4):
            direction.take(bytes([number]) * 1000)  # a millisecond each
        assert direction.dropped == 2
        moment = direction.deliver(time.perf_counter())
        assert moment is not None, "not before it is due"
        assert direction.deliver(moment + 1) is None
        assert [far.recv(2000)[0] for _ in range(2)] == [0, 1]
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(2000)


def test_frames_cross_both_ways_after_the_delay(shape: Shape) -> None:
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    (one, inner_one), (other, inner_other) = ends
    stopped, stop = os.pipe()
    carrying = threading.Thread(target=carry, args=(inner_one.fileno(), inner_other.fileno(), shape, stopped))
    carrying.start()
    for source, sink in ((one, other), (other, one)):
        begin = time.perf_counter()
        source.send(b"x" * 1000)
        assert sink.recv(2000) == b"x" * 1000
        assert time.perf_counter() - begin >= DELAY + 8000 / RATE
    os.close(stop)
    carrying.join(10)
    assert not carrying.is_alive()
    os.close(stopped)
    for pair in ends:
        for end in pair:
            end.close()


def test_a_relay_keeps_bytes_and_order_and_is_no_faster_than_its_shape(shape: Shape) -> None:
    num_bytes = 400_000
    text = os.urandom(num_bytes)
    near, far, process = shaped_pair(shape)
    near.sendall(b"!")
    assert far.recv(1) == b"!"  # it is up
    begin = time.perf_counter()
    near.sendall(text)
    near.shutdown(socket.SHUT_WR)
    got = bytearray()
    while piece := far.recv(1 << 16):
        got += piece
    seconds = time.perf_counter() - begin
    near.close()
    far.close()
    assert process.wait(10) == 0, "it ends with them"
    assert bytes(got) == text
    assert seconds >= 8 * num_bytes / RATE + DELAY


def test_what_a_link_really_does_is_measured(shape: Shape) -> None:
    found = probe(shape)
    assert found["measured_round_trip_seconds"] >= 2 * DELAY
    assert found["measured_bits_per_second"] <= 1.01 * RATE
    shape.set(*UNHINDERED)
    assert probe(shape)["measured_round_trip_seconds"] < 2 * DELAY, "it was the shape"


# --- the table ----------------------------------------------------------------------------------------------------------


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "p10": value, "p90": value, "n": 2}


EARLIER: dict[str, Any] = {
    "link": "1 Gbit/s, 1 ms",
    "design": "obfuscatune",
    "setting": "compact",
    "step_seconds": spread(5.5),
    "token_seconds": spread(0.276),
    "crossings_per_step": 246.0,
    "border_bytes_per_step": 321183104.0,
    "step_ratio_to_compact": None,
    "generation_ratio_to_compact": None,
}
"""As rows were before designs that cut the model had any."""


def test_links_are_columns_and_what_was_left_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    thin = network.Link(100e6, 10e-3, 2)
    count = {"messages": 485.0, "bytes": 1e9}
    measured = {"measured_round_trip_seconds": 0.0203, "measured_bits_per_second": 9.9e7}
    long = {
        **EARLIER,
        **measured,
        "link": thin.name,
        "setting": "paper",
        "link_seconds": thin.seconds(count),
        "left_out": "the link alone",
    }
    small = {**EARLIER, "batch": 1, "length": 32, "step_seconds": spread(0.9)}
    del small["token_seconds"]
    monkeypatch.setattr(tables, "rows_of", lambda _: [EARLIER, long, small])
    grid = tables.TABLES["links"]()
    assert "| 1 Gbit/s, 1 ms | 100 Mbit/s, 10 ms |" in grid.splitlines()[0]
    assert "20.3 ms there and back, 0.10 Gbit/s" in grid
    assert "| compact | 246 | 321.2 MB | 5.50 s; 276 ms | – |" in grid
    assert "| paper | 246 | 321.2 MB | – | over 85 s (computed) |" in grid
    assert "900 ms" not in grid, "a step of fewer tokens is not in this table"
    page = tables.TABLES["network"]()
    assert "| 1 × 32 | compact | 900 ms | – | – | – |" in page
    assert "| 4 × 128 | compact | 5.50 s | – | 276 ms | – |" in page
    assert "paper" not in page, "another link"
