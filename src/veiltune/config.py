"""The configuration of a run: data, never code.

A TOML file (or a mapping) becomes a frozen `Config`. Each design brings a model of its own options, which live in the table
named after it (``[obfuscatune]``), so one file can hold the options of several designs and only ``design`` need change.
The `fingerprint` covers everything the parties must agree on and nothing that is one party's own business; the
`run_fingerprint` tells an owner's runs apart.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veiltune.errors import ConfigError, nearest
from veiltune.fingerprints import agreed_fingerprint, run_fingerprint
from veiltune.peers import IdentityConfig, PeerConfig

T = TypeVar("T", bound=BaseModel)


class Section(BaseModel):
    """Base of every table: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete_tables(cls, values: Any) -> Any:
        """A table given in part keeps the rest of its default here, which need not be its own class's.

        Without this, one option of a wire that is 8 bits by default would silently make it 32.
        """
        if not isinstance(values, Mapping):
            return values
        given = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Section) and isinstance(given.get(name), Mapping):
                given[name] = {**field.default.model_dump(), **given[name]}
        return given


class DataConfig(Section):
    """What is trained on. ``train`` is a file, a hub data set or ``package:DISTRIBUTION/TASK``."""

    train: str | None = None
    validation: str | None = None
    limit: int | None = Field(default=None, ge=1, description="use at most this many examples")
    max_length: int = Field(default=512, ge=2, description="tokens an example may have")
    too_long: Literal["error", "truncate"] = "error"


class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021): rank, alpha, dropout, and which linears."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all", description="'all' or a list of names such as q_proj"
    )
    init_seed: int | None = Field(
        default=None,
        description="reproducible first factors, for tests and comparisons; unset: from the system's randomness",
    )


class CutConfig(Section):
    """Where designs that cut the model do so: what the data owner holds of its blocks, beside embeddings, norm and head."""

    bottom_layers: int = Field(default=2, ge=0, description="first blocks, before the trunk")
    top_layers: int = Field(default=2, ge=0, description="last blocks, after the trunk")


class TrainConfig(Section):
    """The training loop. ``steps`` wins over ``epochs``."""

    method: Literal["lora", "full"] = Field(
        default="lora",
        description="train LoRA factors, or the blocks' own parameters (only where the owner holds them)",
    )
    steps: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1, description="micro-batches of batch_size a step")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=2e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="0: no clipping")
    evaluate_every: int = Field(default=0, ge=0, description="0: at the end only")
    checkpoint_every: int = Field(default=0, ge=0, description="0: at interruption and at the end only")


class AdapterConfig(Section):
    """Who gets what was trained: agreed on by all, and kept to by the party that trains."""

    to: Literal["owner", "provider", "both", "nobody"] = Field(
        default="owner", description="nobody: it stays sealed at the enclave, which answers questions with it"
    )

    def goes_to(self, role: str) -> bool:
        """Whether a role gets the adapter."""
        return self.to == role or (self.to == "both" and role in {"owner", "provider"})


class EnclaveConfig(Section):
    """What the parties accept as an enclave. Without ``policy`` no hardware is accepted, and nothing at all by default."""

    allow_simulated: bool = Field(default=False, description="accept a simulated enclave, which protects nothing")
    policy: Path | None = Field(
        default=None, description="file of what this party accepts; each verifier's own business"
    )
    certificates: Path | None = Field(
        default=None, description="the enclave's own: folder with AMD's certificates, where its host provides none"
    )
    sealed_model: Path | None = Field(
        default=None,
        description="the enclave's own: a copy of the provider's sealed model, opened with the key that the provider hands over",
    )


class ProviderConfig(Section):
    """The provider's own precautions before it hands masked weights to a host."""

    public_ancestors: tuple[str, ...] = Field(
        default=(), description="public models that this one may descend from: hub ids, paths, package:… as for model"
    )
    allow_public_ancestor: bool = Field(
        default=False, description="go on although the host can recover keys and weights from an ancestor"
    )
    ancestor_blocks: int = Field(default=8, ge=1, description="blocks that are compared, evenly spaced")


class SessionConfig(Section):
    """How the parties of this machine are started and linked."""

    processes: bool = Field(default=True, description="a process a party; false: threads of one process, for tests")
    link: Literal["shared_memory", "tcp"] = "shared_memory"
    record: tuple[str, ...] = Field(default=(), description="observers whose transcript is written to disk")
    threads: int | None = Field(default=None, ge=1, description="compute threads a party may use; unset: all cores")
    connect: dict[str, str] = Field(
        default_factory=dict, description="parties that already run as services: role = 'HOST:PORT'"
    )
    token_file: Path | None = Field(default=None, description="the services' session token")
    retry_seconds: float = Field(default=60.0, ge=0, description="how long to look for a service that went away")
    stop_seconds: float = Field(default=60.0, ge=0, description="how long a stopping service lets an open session save")
    health: str | None = Field(default=None, description="a service's health and metrics: 'HOST:PORT' on loopback")
    allow_unauthenticated: bool = Field(
        default=False, description="link beyond this machine by the session token alone: nothing is encrypted"
    )


class EvaluateConfig(Section):
    """Accuracy on multiple-choice tasks, measured through the design's own forward pass."""

    tasks: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1, description="items a task")
    before: bool = Field(default=False, description="measure before tuning too (zero-shot)")


class Config(Section):
    """One run. ``options`` are the chosen design's own."""

    design: str
    model: str
    output: Path
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32", description="bfloat16 on a CPU rounds between float32 operations"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, …")
    data: DataConfig = DataConfig()
    cut: CutConfig = CutConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    adapter: AdapterConfig = AdapterConfig()
    enclave: EnclaveConfig = EnclaveConfig()
    provider: ProviderConfig = ProviderConfig()
    session: SessionConfig = SessionConfig()
    identity: IdentityConfig = IdentityConfig()
    peers: tuple[PeerConfig, ...] = Field(default=(), description="which key may act in which role")
    design_options: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_warmup(self) -> Config:
        if self.train.steps is not None and self.train.warmup_steps > self.train.steps:
            raise ValueError(f"train.warmup_steps {self.train.warmup_steps} exceeds train.steps {self.train.steps}")
        return self

    def fingerprint(self) -> str:
        """Of what all parties of a session must have alike (hex); see `fingerprints` for what that is and why."""
        return agreed_fingerprint(self.model_dump(mode="json"))

    def run_fingerprint(self) -> str:
        """Of what makes the owner's run what it is (hex): what is agreed on, and its text, seed and schedule."""
        return run_fingerprint(self.model_dump(mode="json"))

    def to_json(self) -> str:
        """The whole configuration as JSON, as it is handed to a party's process."""
        return self.model_dump_json()


def load_config(
    source: Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    options: Mapping[str, type[BaseModel]],
) -> Config:
    """Read, override and check a configuration.

    Args:
        source: a TOML file, or a mapping of the same shape.
        overrides: ``key=value`` strings; keys are dotted, values are TOML (bare words are taken as strings).
        options: the model of each design's own options, by design name.

    Raises:
        ConfigError: an unreadable file, an unknown key, table or design, or a value out of range.
    """
    raw = _read_toml(source) if isinstance(source, Path) else json.loads(json.dumps(source, default=str))
    for override in overrides:
        _apply_override(raw, override)
    known = set(Config.model_fields) | set(options)
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in the configuration", hint=nearest(key, known))
    design = raw.get("design")
    if design is None:
        raise ConfigError("the configuration lacks 'design'", hint=f"add design = …; {nearest('', options)}")
    if design not in list(options):
        raise ConfigError(f"unknown design {design!r}", hint=nearest(str(design), options))
    tables: dict[str, Any] = {str(design): {}, **_design_tables(raw, options)}  # its defaults are agreed on too
    raw["design_options"] = {
        name: _validated(options[name], table, prefix=f"{name}.").model_dump(mode="json")
        for name, table in tables.items()
    }
    return _validated(Config, raw, prefix="")


def load_section(source: Path | Mapping[str, Any], model: type[T], *, prefix: str = "") -> T:
    """Read and check what is no run's configuration, or one table of it.

    Args:
        source: a TOML file, or a mapping of the same shape.
        model: its form.
        prefix: stands before the keys in messages: ``attacks.mine.``.

    Raises:
        ConfigError: an unreadable file, an unknown key, or a value out of range.
    """
    raw = _read_toml(source) if isinstance(source, Path) else source
    return _validated(model, raw, prefix=prefix)


def _design_tables(raw: dict[str, Any], options: Collection[str]) -> dict[str, Any]:
    """Take the designs' own tables out of ``raw``: by name, or gathered as a `Config` has them."""
    gathered = raw.pop("design_options", {})
    if not isinstance(gathered, dict):
        raise ConfigError(f"design_options = {gathered!r}: not a table", hint="name a table after the design instead")
    for name in gathered:
        if name not in options:
            raise ConfigError(f"unknown design {name!r} in design_options", hint=nearest(name, options))
    return {**gathered, **{name: raw.pop(name) for name in options if name in raw}}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {str(path)!r}", hint="write one as the quick start shows") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}", hint="give a TOML text file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path}: not valid TOML: {error}", hint="strings need quotes; tables look like [data]"
        ) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r} is not key=value", hint="for example --set train.steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, leaf = key.strip().split(".")
    target = raw
    for name in tables:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {name!r} is a value, not a table", hint="check the dotted key")
    target[leaf] = value


def _validated(model: type[T], raw: Any, *, prefix: str) -> T:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _as_config_error(model, error, prefix) from None


def _as_config_error(model: type[BaseModel], error: ValidationError, prefix: str) -> ConfigError:
    errors = error.errors()  # a key that is lacking may be there under a name that is unknown: say that first
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    where = prefix + _key(first["loc"])
    if first["type"] == "extra_forbidden":
        table = _model_at(model, first["loc"][:-1])
        unknown = prefix + ".".join(str(part) for part in first["loc"])
        return ConfigError(
            f"unknown key {unknown!r} in the configuration", hint=nearest(str(first["loc"][-1]), table.model_fields)
        )
    if first["type"] == "missing":
        return ConfigError(f"the configuration lacks {where!r}", hint=f"add {where} = …")
    messages = [each["msg"].removeprefix("Value error, ") for each in errors if prefix + _key(each["loc"]) == where]
    said, _, hint = " or ".join(messages).partition("; ")
    if not first["loc"]:  # a check of the whole table
        return ConfigError(f"{prefix.rstrip('.') or 'configuration'}: {said}", hint=hint or "correct the value")
    return ConfigError(f"{where} = {first.get('input')!r}: {said}", hint=hint or "correct the value")


def _key(location: Sequence[int | str]) -> str:
    """The dotted key of an error. pydantic adds the branch of a union that it tried, ``literal['all']``: no key."""
    return ".".join(str(part) for part in location if isinstance(part, int) or part.isidentifier())


def _model_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    for part in path:
        if isinstance(part, int):
            continue  # an entry of a list, whose model was found by the list's name
        annotation = model.model_fields[str(part)].annotation
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return model
