"""Parties killed (-9) at random moments: is any committed step lost, any file torn, any loss another than undisturbed?

Services with keys, on this machine, and an owner that tunes; a tiny random model, a checkpoint every other step. Who is killed
and when is drawn: while the session is opened, while the model reaches its places, in a step, or while that party writes its
share of a checkpoint. Whoever was killed is started again at once; an owner that ended is started again with `--resume`.

After every kill: the committed step never goes back; the losses of each commit are those of the undisturbed run, bit for bit;
every file of state opens. At a run's end: losses and adapter are the undisturbed run's. A row a kill; ``seconds`` is from the
kill to a commit that was not yet under way.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._cells import cell
from benchmarks._parties import COMMON, EVERY, Parties, Program, kill, parties, polling, tuning
from benchmarks._record import Row, run
from veiltune.checkpoints import StateStore
from veiltune.config import load_config
from veiltune.designs import option_tables
from veiltune.errors import CheckpointError
from veiltune.tee.sealing import SealingKey
from veiltune.training import COMMIT

STEPS = 60
CASES: dict[str, dict[str, Any]] = {
    "obfuscatune": {"model": "random:llama:2,32,4,259", "obfuscatune.key_seed": 5, "enclave.allow_simulated": True},
    "veil": {"model": "random:llama:3,32,4,259", "veil.key_seed": 5, "enclave.allow_simulated": True},
    "online": {"model": "random:llama:5,32,4,259", "cut.bottom_layers": 1, "cut.top_layers": 1},
}
KILLS = {"obfuscatune": 40, "veil": 40, "online": 20}
YOUNG = ("opening", "provisioning")
"""Phases of a run that has committed nothing since its owner was started."""
LATER = ("training", "checkpoint")
PATIENCE = 180.0
_MAX_STARTS = 5


class Fault(Exception):  # noqa: N818 - what was found
    """Something that must not happen did."""


class Disturbed:
    """One run of the owner's that is killed into, and what is known of it.

    Args:
        made: all parties, services up.
        draw: decides who is killed and when.
        steps: of the run.
    """

    def __init__(self, made: Parties, draw: random.Random, steps: int) -> None:
        self.made = made
        self.draw = draw
        self.own = tuning(made.directory / "owner" / "train.jsonl", steps)
        self.step = 0
        self.rows: list[Row] = []
        self.runs = 0
        self._waiting: list[tuple[Row, float]] = []
        self._starts = 0
        self._began_at = 0
        self.owner = self._start()
        self._undisturbed()

    def _undisturbed(self) -> None:
        begin = time.monotonic()
        for _ in polling(PATIENCE):
            if self._committed() is not None:
                break
        self.opening_seconds = time.monotonic() - begin
        if self.owner.ended(PATIENCE) != 0:
            raise Fault(f"the undisturbed run failed: {self.owner.errors()}")
        self.losses: list[float] = json.loads(self.owner.printed())["loss"]
        self.adapter = self._adapter()

    def _adapter(self) -> str:
        path = self.made.output("owner") / "adapter" / "adapter_model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _start(self, *, anew: bool = False) -> Program:
        self._starts += 1
        resumes = not anew and (self.made.output("owner") / COMMIT).exists()
        return self.made.tune(self.own, "--resume" if resumes else "--overwrite")

    # --- looking on ---------------------------------------------------------------------------------------------------

    def _committed(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.made.output("owner") / COMMIT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Fault(f"a torn {COMMIT}: {error}") from None

    def look(self) -> None:
        """Take note of the committed step, and hold it against what is known.

        Raises:
            Fault: it went back, or its losses are others.
        """
        commit = self._committed()
        if commit is None:
            if self.step:
                raise Fault(f"step {self.step} was committed, and now nothing is")
            return
        step = commit["step"]
        if step < self.step:
            raise Fault(f"step {self.step} was committed, and now {step} is")
        if commit["history"]["loss"] != self.losses[:step]:
            raise Fault(f"up to step {step} the losses are not the undisturbed run's")
        if step > self.step:
            self._starts = 0
            self._recovered(lambda row: step > row["step"] + EVERY)  # one more may have been under way
        self.step = step

    def _recovered(self, condition: Callable[[Row], bool]) -> None:
        for row, begin in self._waiting:
            if condition(row):
                row.update(recovered=True, seconds=round(time.monotonic() - begin, 2))
        self._waiting = [each for each in self._waiting if not each[0]["recovered"]]

    def look_at_files(self) -> None:
        """Every file of state is whole, and those of the committed step are there; nobody is writing.

        Raises:
            Fault: one is not.
        """
        fingerprint = load_config(self.made.write("owner", self.own), options=option_tables()).fingerprint()
        for role in self.made.roles:
            for path in self.made.state(role).rglob("step-*"):
                if path.suffix not in {".safetensors", ".sealed"}:
                    continue  # torn by a kill, under a name that nobody looks for
                key = SealingKey.load_or_create(path.parent) if path.suffix == ".sealed" else None
                step = int(path.stem.removeprefix("step-"))
                try:
                    _load(path, step, fingerprint, key)
                except CheckpointError as error:
                    if path.exists():  # a service may still be dropping what is old
                        raise Fault(f"the {role}'s {path.name}: {error.message}") from None

    # --- killing ------------------------------------------------------------------------------------------------------

    def strike(self) -> None:
        """Wait for a drawn moment, kill somebody, start them again, and go on if the owner did not.

        Raises:
            Fault: what `look` and `look_at_files` find.
        """
        victim = self.draw.choice(self.made.roles)
        while True:
            phase = self._phase(victim)
            if self._wait_for_moment(phase, victim):
                break
            self.complete()
            self._anew()
        row: Row = {"design": self.made.design.name, "party": victim, "phase": phase, "step": self.step}
        begin = time.monotonic()
        self._kill(victim)
        row.update(recovered=False, seconds=None)
        self.rows.append(row)
        self._waiting.append((row, begin))
        self._settle()

    def _phase(self, victim: str) -> str:
        later = LATER[:1] if victim == "provider" else LATER  # it writes nothing
        if self.step > self._began_at:
            return self.draw.choice(later)
        return self.draw.choice((*(YOUNG if self.made.design.trainer == "enclave" else YOUNG[:1]), *later))

    def _wait_for_moment(self, phase: str, victim: str) -> bool:
        """False if the run completed first."""
        target = self.step + self.draw.randint(1, 6)
        provider = self.made.running["provider"]
        sent = len(provider.events("provisioned"))
        reached: dict[str, Callable[[], bool]] = {
            "opening": lambda: True,
            "provisioning": lambda: len(provider.events("provisioned")) > sent or self.step > self._began_at,
            "training": lambda: self.step >= target,
            "checkpoint": lambda: self.step >= target,
        }
        waits = {"opening": self.opening_seconds, "provisioning": 0.05, "training": 0.15, "checkpoint": 0.0}
        if not self._until(reached[phase]):
            return False
        if phase == "checkpoint":
            before = self._changed(victim)
            return self._until(lambda: self._changed(victim) != before)
        begin, pause = time.monotonic(), self.draw.uniform(0.0, waits[phase])
        return self._until(lambda: time.monotonic() - begin > pause)

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Look on until the condition holds. An owner that fails is started again. False if the run completes."""
        for _ in polling(PATIENCE):
            self.look()
            if not self.owner.is_running:
                if self.owner.process.returncode == 0:
                    return False
                self._go_on()
            if condition():
                return True
        return False

    def _changed(self, role: str) -> int:
        """When something last appeared in, or went from, where a party keeps its state."""
        places = [self.made.output(role), self.made.state(role), *self.made.state(role).glob("*/")]
        times: list[int] = []
        for place in places:
            try:
                times.append(place.stat().st_mtime_ns)
            except OSError:
                continue
        return max(times, default=0)

    def _kill(self, victim: str) -> None:
        if victim != "owner":
            self.made.running[victim].kill()
            self.made.start(victim)
            return
        pids = self.owner.pids()
        for pid in self.draw.choice([pids, pids[:1], pids[-1:]]):
            kill(pid)

    def _settle(self) -> None:
        """Until the owner has ended, or has gone on by itself, as it may without a provider."""
        seen = self.step
        if not self._until_ended_or(lambda: self.step > seen):
            return
        self.look_at_files()
        if self.owner.process.returncode != 0:
            self._go_on()

    def _until_ended_or(self, condition: Callable[[], bool]) -> bool:
        for _ in polling(PATIENCE):
            self.look()
            if not self.owner.is_running:
                self.look()
                return True
            if condition():
                return False
        return False

    def _go_on(self) -> None:
        """The owner ended before its time: it said why, or was killed. It is started again."""
        said = self.owner.errors()
        if self.owner.process.returncode >= 0 and (
            "Traceback" in said or "error: " not in said or "hint: " not in said
        ):
            raise Fault(f"the owner ended with code {self.owner.process.returncode} and said: {said[-2000:]}")
        if self._starts >= _MAX_STARTS:
            raise Fault(f"no step in {self._starts} starts: {said[-2000:]}")
        self._began_at = self.step
        self.owner = self._start()

    # --- ends ---------------------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Let the run come to its end, and compare.

        Raises:
            Fault: losses or adapter are others.
        """
        self._until(lambda: False)
        self.look()
        if json.loads(self.owner.printed())["loss"] != self.losses or self._adapter() != self.adapter:
            raise Fault("the losses or the adapter are not the undisturbed run's")
        self._recovered(lambda _: True)  # killed after the last commit but one
        self.look_at_files()
        self.runs += 1

    def _anew(self) -> None:
        self.step = self._began_at = self._starts = 0
        self.owner = self._start(anew=True)
        for _ in polling(PATIENCE):
            commit = self._committed()
            if commit is None or commit["step"] < len(self.losses) or not self.owner.is_running:
                return


def _load(path: Path, step: int, fingerprint: str, key: SealingKey | None) -> None:
    StateStore(path.parent, fingerprint, key).load(step)


def measure_design(design: str, kills: int, seed: int, steps: int = STEPS) -> list[Row]:
    """That many kills under one design: a row each, and one of the whole."""
    with tempfile.TemporaryDirectory(prefix="veiltune-kills-") as directory:
        agreed = {"design": design, **COMMON, **CASES[design]}
        with parties(Path(directory), agreed) as made:
            disturbed = Disturbed(made, random.Random(seed), steps)
            disturbed._anew()
            fault: str | None = None
            try:
                for _ in range(kills):
                    disturbed.strike()
                disturbed.complete()
            except (Fault, TimeoutError) as found:
                fault = str(found)
    whole = {"kills": len(disturbed.rows), "runs": disturbed.runs, "is_exact": fault is None, "fault": fault}
    return [*disturbed.rows, {"design": design, "party": "all", **whole}]


def measure(quick: bool) -> list[Row]:
    """Rows of every design."""
    if quick:
        return [row for number, design in enumerate(CASES) for row in measure_design(design, 1, number)]
    rows: list[Row] = []
    for number, (design, kills) in enumerate(KILLS.items()):
        settings = {"design": design, "kills": kills, "steps": STEPS, "case": CASES[design]}
        rows += cell("kills", settings, lambda d=design, k=kills, n=number: measure_design(d, k, n))
    return rows


if __name__ == "__main__":
    run("kills", __doc__, measure)
