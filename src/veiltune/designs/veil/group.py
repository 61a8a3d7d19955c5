"""The ranks of one host: sums over them by torch.distributed, and messages from rank 0 to all others.

gloo carries messages and what is on CPUs, nccl what is on GPUs. Messages are the frames of `transport.codec`, broadcast: torch's
own way to broadcast an object would unpickle it. Waiting is passive. Nothing here is encrypted: all ranks are the host's, and
they carry no more than it sees.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Shaped
from torch import Tensor

from veiltune.errors import ProtocolError, RankLostError
from veiltune.transport.channel import Channel
from veiltune.transport.frame import PREAMBLE_BYTES, Frame, read_preamble

COMPUTE_SECONDS = 300.0
"""How long a rank may keep the others waiting in the middle of a pass."""
IDLE_SECONDS = 30 * 24 * 3600.0
"""How long rank 0 may have nothing to say: as long as the owner thinks."""

_BACKEND = "veiltune/backend"


def _nothing_known() -> str:
    return "another rank of the host is gone"


@final
@dataclass
class RankGroup:
    """Implements `models.rotated.parallel.Ranks` over torch.distributed.

    Attributes:
        rank: this process's number; 0 has the link to the enclave.
        size: how many there are.
        diagnose: says, once an exchange has failed, which rank is to blame.
    """

    rank: int
    size: int
    diagnose: Callable[[], str] = _nothing_known
    _control: Any = None

    def join(self, store: Any) -> None:
        """Meet the others, who make the same call with the same store and size. Rank 0 says by what to exchange.

        Raises:
            ProtocolError: this process is in a group of its own already.
            RankLostError: the others did not come.
        """
        import torch.distributed as dist

        if dist.is_initialized():
            raise ProtocolError(
                "torch.distributed is in use in this process already", hint="run the host as a process of its own"
            )
        with self._failures():
            if self.rank == 0:
                store.set(_BACKEND, "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            backend = store.get(_BACKEND).decode()
            timeout = dt.timedelta(seconds=COMPUTE_SECONDS)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)
            self._control = dist.new_group(backend="gloo", timeout=dt.timedelta(seconds=IDLE_SECONDS))

    @contextmanager
    def _failures(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:  # which is all that gloo and nccl raise
            raise RankLostError(self.diagnose(), hint="the host's log has its last words") from error

    def total(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """See `Ranks.total`.

        Raises:
            RankLostError: a rank is gone, or kept the others waiting too long.
        """
        import torch.distributed as dist

        if torch.compiler.is_compiling():  # the one form of a sum that a graph can hold
            from torch.distributed._functional_collectives import all_reduce, wait_tensor

            every: Any = dist.group.WORLD
            return wait_tensor(all_reduce(x, "sum", every))
        summed = x.detach().clone(memory_format=torch.contiguous_format)
        with self._failures():
            dist.all_reduce(summed)
        return summed

    def agree(self, value: int) -> int:
        """See `Ranks.agree`."""
        agreed = torch.tensor([value])
        self.broadcast(agreed)
        return int(agreed)

    def broadcast(self, value: Tensor) -> None:
        """Overwrite ``value``, which is on the CPU, with rank 0's, waiting as long as it takes.

        Raises:
            RankLostError: a rank is gone.
        """
        import torch.distributed as dist

        with self._failures():
            dist.broadcast(value, src=0, group=self._control)

    def leave(self) -> None:
        """Close the connections; ranks that wait for this one fail."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@final
class BroadcastChannel(Channel):
    """Frames from rank 0 to every other rank. Only rank 0 sends."""

    def __init__(self, group: RankGroup) -> None:
        me, peer = ("rank 0", "other ranks") if group.rank == 0 else (f"rank {group.rank}", "rank 0")
        super().__init__(me, peer)
        self._group = group
        self._rest = memoryview(b"")

    def poll(self, timeout: float | None = 0.0) -> bool:  # noqa: ARG002 - a broadcast cannot be waited for in part
        """See `Channel.poll`; always, as the receipt itself waits."""
        return True

    def close(self) -> None:
        """See `Channel.close`; the group stays."""
        self._closed = True

    def _send_frame(self, frame: Frame) -> None:
        data = bytearray().join((frame.head, *frame.segments))
        self._group.broadcast(torch.tensor([len(data)]))
        self._group.broadcast(torch.frombuffer(data, dtype=torch.uint8))

    def _recv_head(self) -> bytes:
        num_bytes = torch.zeros(1, dtype=torch.int64)
        self._group.broadcast(num_bytes)
        data = bytearray(int(num_bytes))
        self._group.broadcast(torch.frombuffer(data, dtype=torch.uint8))
        view = memoryview(data)
        header_bytes, _ = read_preamble(view[:PREAMBLE_BYTES], self._max_payload_bytes)
        self._rest = view[PREAMBLE_BYTES + header_bytes :]
        return bytes(view[: PREAMBLE_BYTES + header_bytes])

    def _recv_payload(self, segments: list[memoryview], num_bytes: int) -> None:  # noqa: ARG002
        for segment in segments:
            segment[:] = self._rest[: len(segment)]
            self._rest = self._rest[len(segment) :]


@contextmanager
def on_loopback() -> Generator[None]:
    """Within, a group that is joined listens on this machine's loopback interface alone, unless the user named another."""
    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ:
        yield
        return
    os.environ[name] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        yield
    finally:
        del os.environ[name]
