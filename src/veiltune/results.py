"""The record a run leaves: ``result.json``, its schema, and what it says of the machine it ran on.

One file holds utility, exactness, cost and privacy of one run, measured in that run. Reports print it and compute
nothing. The schema has a number, `SCHEMA_VERSION`; a file of another number is refused rather than half understood, and
so are unknown keys. Numbers that are not finite are kept, as the strings "NaN", "Infinity" and "-Infinity", because a
run that diverged is a result too.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veiltune import __version__
from veiltune.errors import UserError

SCHEMA_VERSION = 1

Share = Annotated[float, Field(ge=0, le=1)]
Link = Annotated[str, Field(pattern=r"^[a-z_]+->[a-z_]+$")]
"""A directed pair of parties, ``sender->receiver``."""


class Record(BaseModel):
    """Base of every part of a record: frozen, strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class Measurement(Record):
    """A figure measured on ``n`` items, with its 95% interval (low, high) in its own unit; None where it has none."""

    value: float
    n: int = Field(ge=1)
    ci95: tuple[float, float] | None

    @model_validator(mode="after")
    def _interval_holds_value(self) -> Self:
        if self.ci95 is not None and not self.ci95[0] <= self.value <= self.ci95[1]:
            raise ValueError(f"the interval {list(self.ci95)} does not hold the value {self.value}")
        return self


def measurements(utility: Mapping[str, Mapping[str, Any]]) -> dict[str, Measurement]:
    """The form a record keeps of what tasks measured: ``task/metric`` to value, n and interval.

    Args:
        utility: by task, ``{"metric", "value", "n", "ci95", "others": {metric: value}}``. A task's other metrics are
            over the same items and have no interval.
    """
    kept: dict[str, Measurement] = {}
    for task, found in utility.items():
        kept[f"{task}/{found['metric']}"] = Measurement(value=found["value"], n=found["n"], ci95=found["ci95"])
        for metric, value in found.get("others", {}).items():
            kept[f"{task}/{metric}"] = Measurement(value=value, n=found["n"], ci95=None)
    return kept


class Spread(Record):
    """A repeated measurement: median, 10th and 90th percentile, and how often it was made."""

    median: float
    p10: float
    p90: float
    n: int = Field(ge=1)

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Summarise values, percentiles interpolated between the sorted ones.

        Raises:
            ValueError: there are none.
        """
        if not values:
            raise ValueError("no values to summarise")
        tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
        return cls(median=statistics.median(values), p10=tenths[0], p90=tenths[8], n=len(values))


class Exactness(Record):
    """Largest errors against the plain model, relative to the largest entry of the plain quantity; None: not measured.

    ``bounds`` holds, by the same names, the bound c·κ·eps that each was checked against.
    """

    logits: float | None = None
    loss: float | None = None
    gradients: float | None = None
    adapter: float | None = None
    bounds: dict[Literal["logits", "loss", "gradients", "adapter"], float] = {}

    def exceeded(self) -> list[str]:
        """Names of the errors that are beyond their bound; an error that is not a number is."""
        measured = self.model_dump(exclude={"bounds"}, exclude_none=True)
        return [name for name, error in measured.items() if name in self.bounds and not error <= self.bounds[name]]


class EnclaveCost(Record):
    """The enclave's part, as shares from 0 to 1, and its checks of the host; None: not measured or not counted."""

    param_share: Share | None = None
    flop_share: Share | None = None
    seconds_share: Share | None = None
    checks: int | None = Field(default=None, ge=0)
    check_seconds: float | None = Field(default=None, ge=0)


class Cost(Record):
    """What a run cost.

    Attributes:
        seconds_per_step: wall seconds of an optimiser step.
        step_ratio: to the plain step, where both were timed alternately in one run.
        bytes: whole frames over the whole run: ``{"sender->receiver": {kind of message: bytes}}``.
        messages: how many frames those were, by the same names.
        bytes_per_step: what one training step moves between all parties, provisioning and evaluation left out.
        crossings_per_step: messages over the enclave's (or the cut's) border in a training step.
        rounds: requests that waited for an answer over the whole run.
        peak_rss: largest resident set in bytes, by party.
        enclave: the enclave's shares.
        revealed_param_share: share of the model's parameters that an observer sees in the clear, by observer.
    """

    seconds_per_step: Spread | None = None
    step_ratio: Spread | None = None
    bytes: dict[Link, dict[str, int]] = {}
    messages: dict[Link, dict[str, int]] = {}
    bytes_per_step: float | None = Field(default=None, ge=0)
    crossings_per_step: float | None = Field(default=None, ge=0)
    rounds: int | None = Field(default=None, ge=0)
    peak_rss: dict[str, int] = {}
    enclave: EnclaveCost = EnclaveCost()
    revealed_param_share: dict[str, Share] = {}


class Labels(Record):
    """What a reader must know before believing the figures.

    Attributes:
        reproducible_secrets: keys were drawn from a seed, so whoever has the seed has the keys.
        bfloat16: ``rounded`` between float32 operations, ``native`` arithmetic, or None if another dtype was used.
        public_ancestors: what the provider found when it held the weights against public ones, by their names.
    """

    reproducible_secrets: bool = False
    public_ancestors: dict[str, str] = {}
    bfloat16: Literal["rounded", "native"] | None = None


class Answer(Record):
    """One generated answer."""

    prompt: str
    text: str


class EmulatorReport(Record):
    """What an emulator of the trunk is, and how much of the trunk it gives away.

    Attributes:
        kind: how it was made, compression included.
        layers: the trunk's layers, and those of them that it keeps.
        parameter_share: its numbers over the trunk's.
        byte_share: its bytes over the trunk's.
        largest_error: of its compressed weights, relative in the Frobenius norm; 0 where weights are as they are.
        margin: by task and metric, accuracy through the trunk less accuracy on the emulator: what the provider keeps.
    """

    kind: str
    layers: tuple[int, int]
    parameter_share: float = Field(ge=0)
    byte_share: float = Field(ge=0)
    largest_error: float = Field(default=0.0, ge=0)
    margin: dict[str, float] = {}


class DataSummary(Record):
    """Where the data came from, as configured, and how much of it there was."""

    train: str | None = None
    validation: str | None = None
    train_examples: int | None = Field(default=None, ge=0)
    validation_examples: int | None = Field(default=None, ge=0)
    train_tokens: int | None = Field(default=None, ge=0)


class Machine(Record):
    """What a run had to run on. No name, address or path of it."""

    platform: str
    cpu_count: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    accelerators: list[str] = []


class RunResult(Record):
    """One run.

    Attributes:
        schema_version: of this record (``schema`` in JSON).
        design: its name.
        model: as configured.
        data: what it was tuned on.
        config: the whole configuration.
        fingerprint: of the configuration, as the parties agreed on it.
        versions: of what computed, see `versions`.
        machine: see `machine`.
        loss: mean cross-entropy in nats a target token, one per step.
        validation_loss: (step, loss) of each evaluation.
        utility: accuracy and the like after tuning, by ``task/metric``.
        utility_before: the same before the first step (zero-shot).
        utility_emulator: the same after tuning, on the emulator in the place of the trunk.
        emulator: what that emulator is.
        correlation: distance correlation of embeddings and sent states, one per step, where it is part of the objective.
        exactness: errors against the plain model.
        cost: times, bytes, memory, shares.
        privacy: by attack and metric; empty if nothing attacked.
        simulated_enclave: the enclave had no hardware protection: it protected nothing.
        labels: further reservations.
        answers: generated answers.
    """

    schema_version: Literal[1] = Field(default=SCHEMA_VERSION, alias="schema")
    design: str
    model: str
    data: DataSummary = DataSummary()
    config: dict[str, Any]
    fingerprint: str
    versions: dict[str, str]
    machine: Machine | None = None
    loss: list[float] = []
    validation_loss: list[tuple[int, float]] = []
    utility: dict[str, Measurement] = {}
    utility_before: dict[str, Measurement] = {}
    utility_emulator: dict[str, Measurement] = {}
    emulator: EmulatorReport | None = None
    correlation: list[float] = []
    exactness: Exactness = Exactness()
    cost: Cost = Cost()
    privacy: dict[str, dict[str, dict[str, Any]]] = {}
    simulated_enclave: bool
    labels: Labels = Labels()
    answers: list[Answer] = []


def write_result(path: Path, result: RunResult) -> None:
    """Write a record, whole or not at all."""
    write_text(path, result.model_dump_json(indent=1, by_alias=True) + "\n")


def read_result(path: Path) -> RunResult:
    """Read a record.

    Raises:
        UserError: there is no such file, it is no JSON, has another schema version, or does not fit the schema.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no result {str(path)!r}", hint="give the result.json that a finished run wrote") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the result {str(path)!r}: {error}", hint="it is no JSON file; run again"
        ) from None
    found = raw.get("schema") if isinstance(raw, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{str(path)!r} has result schema {found!r}, this version of veiltune reads {SCHEMA_VERSION}",
            hint="read it with the version of veiltune that wrote it, or run again",
        )
    try:
        return RunResult.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{str(path)!r}: {where}: {first['msg']}", hint="the file was altered; run again") from None


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON (see `to_json`), whole or not at all."""
    write_text(path, to_json(value, indent=1) + "\n")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Plain values as JSON that every reader takes: numbers that are not finite become strings, as in a `RunResult`."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(item) for item in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, then move it there; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


_DISTRIBUTIONS = {name: name.replace("_", "-") for name in ("torch", "transformers", "peft", "lm_eval", "datasets")}


def versions() -> dict[str, str]:
    """Versions of Python, Veiltune and the libraries that compute, without importing them; absent ones are left out."""
    found = {"python": platform.python_version(), "veiltune": __version__}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> Machine:
    """Processors this process may use, memory, platform, and CUDA devices by their product names."""
    import psutil
    import torch

    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return Machine(
        platform=f"{platform.system()} {platform.machine()}",
        cpu_count=len(affinity(0)) if affinity else os.cpu_count() or 1,
        memory_bytes=int(psutil.virtual_memory().total),
        accelerators=[torch.cuda.get_device_name(index) for index in devices],
    )
