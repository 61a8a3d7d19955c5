"""The host of `veil` as several ranks: rank 0 has the link to the enclave, the others do what it does, each with its share.

Rank 0 passes every request on before it acts on it. It alone keeps whole factors and their optimiser; after a step the others are
sent the new ones. So its checkpoint is that of a host of one rank. The others are processes of `rank_main`, here or on other
machines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from veiltune.designs.veil.group import BroadcastChannel, RankGroup, on_loopback
from veiltune.errors import ConfigError, RankLostError, VeiltuneError
from veiltune.models.rotated.parallel import ParallelTrunk
from veiltune.models.skeleton import resolve_device
from veiltune.parties.party import how_it_ended
from veiltune.transport.messages import (
    FactorGradientsRequest,
    Factors,
    Forget,
    Goodbye,
    Message,
    TrunkPlan,
    TrunkShard,
    VeiledBackward,
    VeiledForward,
)
from veiltune.transport.stream import parse_address

STORE_FILE = "VEILTUNE_RANKS_FILE"
START_SECONDS = 300.0
GRACE_SECONDS = 5.0

Build = Callable[[TrunkPlan, RankGroup], ParallelTrunk]


def device_of_rank(name: str, local_rank: int) -> torch.device:
    """Where a rank computes: the first GPU of the configured ones and its successors, or the CPU.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks.
    """
    first = resolve_device(name)
    if first.type != "cuda":
        return first
    index = (first.index or 0) + local_rank
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"veil.ranks: rank {local_rank} of this machine needs cuda:{index}, and there are {torch.cuda.device_count()} GPUs",
            hint="lower veil.ranks, or set veil.rendezvous and start ranks on other machines",
        )
    return torch.device("cuda", index)


@final
class RankProcesses:
    """The other ranks: their processes where they are started here, and how they died.

    Args:
        size: ranks in all.
        rendezvous: HOST:PORT where ranks that are started elsewhere find this one; ``None``: they are started here.
    """

    def __init__(self, size: int, rendezvous: str | None) -> None:
        self.size = size
        self.rendezvous = rendezvous
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._directory: str | None = None

    def start(self, group: RankGroup) -> None:
        """Start them, if they are to be, and meet them.

        Raises:
            ConfigError: the rendezvous is no address of this machine.
            RankLostError: one died first, or they did not come in time.
        """
        group.diagnose = self.how_they_died
        if self.rendezvous is not None:
            store = _listen(self.rendezvous, self.size)
            self._wait_for(store)
            group.join(store)
            return
        from torch.distributed import FileStore

        self._directory = tempfile.mkdtemp(prefix="veiltune-ranks-")  # others look into it after rank 0 has met them
        path = Path(self._directory) / "store"
        with on_loopback():
            self.processes |= {rank: self._spawn(rank, path) for rank in range(1, self.size)}
            store = FileStore(str(path), self.size)
            self._wait_for(store)
            group.join(store)

    def _spawn(self, rank: int, path: Path) -> subprocess.Popen[bytes]:
        """One rank as a process, its words in this one's log. Local ranks share the cores."""
        threads = str(max(1, (os.cpu_count() or 1) // self.size))
        ours = {"OMP_NUM_THREADS": threads, **os.environ}  # what the user sets wins
        ours |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size), STORE_FILE: str(path)}
        return subprocess.Popen(
            [sys.executable, "-m", "veiltune.designs.veil.rank_main"], stdin=subprocess.DEVNULL, env=ours
        )

    def _wait_for(self, store: Any) -> None:
        end = time.monotonic() + START_SECONDS
        for rank in range(1, self.size):
            while not store.check([arrival(rank)]):
                if any(process.poll() is not None for process in self.processes.values()):
                    raise RankLostError(self.how_they_died(), hint="the host's log has its last words")
                if time.monotonic() > end:
                    raise RankLostError(
                        f"rank {rank} of the host did not come within {START_SECONDS:g} s",
                        hint="start it as the veil page says, or leave out veil.rendezvous",
                    )
                time.sleep(0.05)

    def how_they_died(self) -> str:
        """In words, if one was started here; waits a moment for it to be dead."""
        end = time.monotonic() + GRACE_SECONDS
        while self.processes and time.monotonic() < end:
            for rank, process in self.processes.items():
                if (code := process.poll()) is not None:
                    return f"rank {rank} of the host {how_it_ended(code)}"
            time.sleep(0.05)
        return "another rank of the host is gone, or answers nothing"

    def stop(self) -> None:
        """Let them end, or end them."""
        for process in self.processes.values():
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def arrival(rank: int) -> str:
    """The key in the store by which a rank says that it is there."""
    return f"veiltune/here/{rank}"


def _address(rendezvous: str) -> tuple[str, int]:
    try:
        return parse_address(rendezvous)
    except ConfigError:
        raise ConfigError(
            f"veil.rendezvous = {rendezvous!r} is not HOST:PORT", hint="for example 10.0.0.1:29500"
        ) from None


def _listen(rendezvous: str, size: int) -> Any:
    from torch.distributed import DistError, TCPStore

    host, port = _address(rendezvous)
    try:
        return TCPStore(host, port, size, is_master=True, wait_for_workers=False)
    except (DistError, RuntimeError) as error:
        raise ConfigError(
            f"veil.rendezvous = {rendezvous!r} cannot be listened at: {error}".splitlines()[0],
            hint="name an address of this machine and a free port",
        ) from None


class LeadingTrunk:
    """Rank 0's trunk: implements `parties.enclaved.host.HostedTrunk`, passing on to the others what it is asked.

    Args:
        local: rank 0's own share.
        channel: to the others.
        group: all ranks.
        processes: the others.
    """

    def __init__(
        self, local: ParallelTrunk, channel: BroadcastChannel, group: RankGroup, processes: RankProcesses
    ) -> None:
        self._local = local
        self._channel = channel
        self._group = group
        self._processes = processes
        self._in_step = True
        self.parameters: dict[str, nn.Parameter] = {}

    @contextmanager
    def _together(self, message: Message) -> Generator[None]:
        """All ranks act on ``message``. Once one has failed in the middle, they no longer are where this one is."""
        self._in_step = False
        self._channel.send(message)
        yield
        self._in_step = True

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `HostedTrunk.load`."""
        with self._together(TrunkShard(dict(tensors))):
            self._local.load(tensors)

    def load_factors(self, factors: Mapping[str, Tensor]) -> None:
        """See `HostedTrunk.load_factors`; the whole ones are kept here too."""
        self._hand_out(factors)
        for name, value in factors.items():
            on_device = value.to(self._local.device)
            if name in self.parameters:
                with torch.no_grad():
                    self.parameters[name].copy_(on_device)
            else:
                self.parameters[name] = nn.Parameter(on_device.detach().clone())

    def _hand_out(self, factors: Mapping[str, Tensor]) -> None:
        with self._together(Factors(dict(factors))):
            self._local.load_factors(factors)

    def ready(self) -> None:
        """See `HostedTrunk.ready`; the others know by their first factors."""
        self._local.ready()

    def forward(self, request: VeiledForward) -> Tensor:
        """See `RotatedTrunk.forward`."""
        with self._together(request):
            return self._local.forward(request)

    def backward(self, request: VeiledBackward) -> Tensor | None:
        """See `RotatedTrunk.backward`."""
        with self._together(request):
            return self._local.backward(request)

    def forget(self, cache_id: int) -> None:
        """See `HostedTrunk.forget`."""
        with self._together(Forget(cache_id)):
            self._local.forget(cache_id)

    def collect_gradients(self) -> None:
        """Add to the gradients of ``parameters`` those of every rank since the last time."""
        with self._together(FactorGradientsRequest(clear=True)):
            gradients = self._local.take_gradients()
        for name, gradient in gradients.items():
            parameter = self.parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def spread(self) -> None:
        """Send ``parameters``, which have changed, to every rank."""
        self._hand_out({name: value.detach() for name, value in self.parameters.items()})

    def stay_centred(self) -> None:
        """See `RotatedTrunk.stay_centred`."""
        self._local.stay_centred(self.parameters)

    def close(self) -> None:
        """Part from the others. Those that are in step go by themselves, the rest fail once this one is gone."""
        if self._in_step:
            with suppress(VeiltuneError):
                self._channel.send(Goodbye())
        self._group.leave()
        self._processes.stop()


def lead(plan: TrunkPlan, processes: RankProcesses, build: Build) -> LeadingTrunk:
    """Rank 0: build its own share of the trunk, then start the others and tell them the plan.

    Raises:
        ConfigError: the trunk cannot be shared out; nothing was started.
        RankLostError: another rank is gone.
    """
    group = RankGroup(0, processes.size)
    local = build(plan, group)
    try:
        processes.start(group)
        channel = BroadcastChannel(group)
        channel.send(plan)
    except BaseException:
        group.leave()
        processes.stop()
        raise
    return LeadingTrunk(local, channel, group, processes)


def follow(group: RankGroup, build: Build) -> None:
    """Another rank: do what rank 0 does until it says goodbye."""
    channel = BroadcastChannel(group)
    trunk = build(channel.recv_as(TrunkPlan), group)
    is_ready = False
    while not isinstance(message := channel.recv(), Goodbye):
        if isinstance(message, TrunkShard):
            trunk.load(message.tensors)
        elif isinstance(message, Factors):
            trunk.load_factors(message.tensors)
            if not is_ready:
                trunk.ready()
                is_ready = True
        elif isinstance(message, VeiledForward):
            trunk.forward(message)
        elif isinstance(message, VeiledBackward):
            trunk.backward(message)
        elif isinstance(message, Forget):
            trunk.forget(message.cache_id)
        elif isinstance(message, FactorGradientsRequest):
            trunk.take_gradients()
