"""What the tests of designs that cut the model share: deeper tiny models, exact settings, a trunk server in this process."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import helpers
from helpers import make_config, scratch
from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import PeerLostError, ProtocolError
from veiltune.models.presets import random_config
from veiltune.models.random_weights import byte_tokenizer, write_random_weights
from veiltune.parties.owner import JOBS
from veiltune.parties.party import Job, Party
from veiltune.parties.split.owner import SplitOwner
from veiltune.parties.split.plan import SplitPlan
from veiltune.parties.split.provider import Provider
from veiltune.session.launch import channel_options, start_processes
from veiltune.session.party_main import design_options
from veiltune.session.run import prepare_output
from veiltune.session.service import Service
from veiltune.transport.channel import Channel, memory_pair
from veiltune.transport.messages import Progress
from veiltune.transport.transcript import Meter

LAYERS = 5
CUT = {"bottom_layers": 1, "top_layers": 1}
TRUNK = LAYERS - 2
WIRE = {"activation_bits": 32, "gradient_bits": 32}
KEEP_ALL = {"layers": TRUNK, "compression": "none"}
EXACT: dict[str, dict[str, Any]] = {
    "split": {},
    "online": {"wire": WIRE, "decorrelation": {"alpha": 0.0}},
    "gradfree": {"wire": WIRE},
    "offsite": {"emulator": KEEP_ALL},
    "offline": {"emulator": KEEP_ALL, "wire": WIRE, "decorrelation": {"alpha": 0.0}},
}
"""Each design's options under which it computes what `local` does: nothing is rounded, the emulator is the trunk itself."""


def deep_model(family: str = "llama", dropout: float = 0.0, seed: int = 0, layers: int = LAYERS) -> str:
    """The folder of a tiny random model with blocks enough for a bottom, a trunk and a top; ``seed`` tells weights apart."""
    return _deep_model(family, dropout, seed, layers)


@cache
def _deep_model(family: str, dropout: float, seed: int, layers: int) -> str:
    config = random_config(f"random:{family}:{layers},32,4,259")
    if dropout:
        for name in ("attention_dropout",) if family == "llama" else ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            assert hasattr(config, name)
            setattr(config, name, dropout)
    directory = scratch() / f"deep-{family}-{dropout}-{seed}-{layers}"
    directory.mkdir()
    write_random_weights(config, directory, torch.float32)
    for path in directory.glob("*.safetensors") if seed else ():  # another model of the same shape
        tensors = {name: value * (1 + 0.01 * seed) for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def cut_config(design: str, output: Path, model: str | None = None, **tables: Any) -> Config:
    """A small configuration of a design that cuts the model, under its exact settings where ``tables`` say no other."""
    tables = {"cut": CUT, "lora": {"init_seed": 1}, **tables}
    if design in EXACT:
        tables[design] = {**EXACT[design], **tables.get(design, {})}
    return make_config(design, model or deep_model(), output, **tables)


def plainly(design: str, output: Path, model: str | None = None, **tables: Any) -> Config:
    """`local`, with the layers trained that the design trains."""
    return cut_config("local", output, model, **tables, local=dict(DESIGNS[design].baseline))


def plain(model: str) -> Any:
    """The plain model of a folder, as `transformers` alone loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()


def probed(config: Config, *, steps: int = 3, generate: int = 0, **arguments: Any) -> dict[str, Tensor]:
    """Run one probe; what it left."""
    job = Job(verb="probe", probe={"input_ids": helpers.PROBE_IDS, "steps": steps, "generate": generate})
    helpers.run(config, job, **arguments)
    return load_file(Path(config.output) / "parties" / "owner" / "probe.safetensors")


# --- a provider in this process -----------------------------------------------------------------------------------------


def plan_of(config: Config) -> SplitPlan:
    """The plan that a configuration makes."""
    role: Any = DESIGNS[config.design].roles["provider"]  # a partial over the planner
    return role.keywords["planner"](design_options(DESIGNS[config.design], config.design_options))


def provider_of(config: Config) -> Provider:
    """A provider, with nobody linked; what it reports goes nowhere."""
    mine, theirs = memory_pair("supervisor", "provider")

    def drain() -> None:
        try:
            while True:
                mine.recv()
        except Exception:  # noqa: BLE001 - it is over
            return

    threading.Thread(target=drain, daemon=True).start()
    directory = Path(config.output) / "parties" / "provider"
    directory.mkdir(parents=True, exist_ok=True)
    options = design_options(DESIGNS[config.design], config.design_options)
    party = Party("provider", config, options, Job(verb="tune"), {}, theirs, Meter("provider"), directory)
    with helpers.own_cache():
        return Provider(party, plan_of(config))


class Client:
    """An owner's bare end of a link to a provider that serves it in a thread; nothing guards what it sends but the link."""

    def __init__(self, provider: Provider) -> None:
        design = DESIGNS[provider.config.design]
        self.provider = provider
        self.errors: list[BaseException] = []
        self.link, theirs = memory_pair("owner", "provider", b_options=channel_options(design, "provider", "owner", ()))
        self.thread = threading.Thread(target=self._serve, args=(theirs,), daemon=True)
        self.thread.start()

    def _serve(self, link: Channel) -> None:
        try:
            self.provider.serve(link)
        except BaseException as error:  # noqa: BLE001 - for the test to look at
            self.errors.append(error)
        finally:
            link.close()

    def close(self) -> None:
        """Vanish, and wait until the provider has noticed."""
        self.link.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


# --- a service in this process --------------------------------------------------------------------------------------


class Running:
    """A provider that listens, in a thread; it can be stopped and started again at the same address."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Load and listen; at the address it had, if it had one."""
        host, _, port = self.address.rpartition(":")
        listening = threading.Event()

        def on_event(name: str, fields: Mapping[str, Any]) -> None:
            self.events.append((name, dict(fields)))
            if name == "listening":
                listening.set()

        with helpers.own_cache():
            self.service = Service(self.config, "provider", (host, int(port)), on_event)
        self.address = self.service.address
        self.thread = threading.Thread(target=self.service.run, daemon=True)
        self.thread.start()
        assert listening.wait(60)

    def stop(self) -> None:
        """End it and all of its sessions."""
        self.service.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()

    def names(self) -> list[str]:
        """What happened, in order."""
        return [name for name, _ in self.events]


_JOINING = threading.Lock()
"""`transformers` builds one model at a time in a process; owners are processes of their own but in these tests."""


def connected(design: str, output: Path, running: Running, **tables: Any) -> Config:
    """An owner's configuration that has its provider in ``running``."""
    session = {
        "processes": True,
        "connect": {"provider": running.address},
        "token_file": str(running.config.session.token_file),
        "retry_seconds": 20.0,
        **tables.pop("session", {}),
    }
    return cut_config(design, output, session=session, **tables)


def own_here(
    config: Config, verb: str = "tune", *, resume: bool = False, on_event: Any = None, **job: Any
) -> dict[str, Any]:
    """Be the owner, in this thread, of a session whose provider is a service; its figures."""
    step = prepare_output(config, resume=resume, overwrite=False)
    started, party = start_processes(config, Job(verb=verb, resume_step=step, **job), here="owner")  # pyrefly: ignore
    assert party is not None

    def listen(control: Channel) -> None:
        try:
            while True:
                message = control.recv()
                if on_event is not None and isinstance(message, Progress):
                    on_event(message.event, dict(message.fields))
        except (PeerLostError, ProtocolError):
            return

    listeners = [threading.Thread(target=listen, args=(running.control,), daemon=True) for running in started]
    for listener in listeners:
        listener.start()
    owner: Any = None
    try:
        party.dial_services()
        with _JOINING:
            owner = DESIGNS[config.design].join(party)
        JOBS[party.job.verb](owner)
        owner.leave()
        return {**party.figures, "traffic": party.meter.snapshot()}
    finally:
        for link in [*party.links.values(), *([owner.port.link] if isinstance(owner, SplitOwner) else [])]:
            link.close()
        party.control.close()
        for running, listener in zip(started, listeners, strict=True):
            listener.join(10)  # it reads to the end of what the other end said, which closing would lose
            running.control.close()


@contextmanager
def serving(config: Config) -> Generator[Running]:
    """A provider's service for the length of a test."""
    running = Running(config)
    try:
        yield running
    finally:
        if running.thread.is_alive():
            running.stop()
