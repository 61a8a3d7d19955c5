"""Protecting a checkpoint once, on disk, before any session: ``veiltune protect``, and the table of designs that can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veiltune.config import load_config
from veiltune.designs import DESIGNS, option_tables
from veiltune.designs.veil.protection import protection_plan as veil_plan
from veiltune.errors import ConfigError, nearest
from veiltune.models.sources import resolve_model
from veiltune.parties.party import peak_rss_bytes
from veiltune.parties.preflight import check_ancestors
from veiltune.parties.protected import Plan, default_key_path, protect
from veiltune.session.party_main import design_options

Planner = Callable[..., Plan]
PROTECTORS: Mapping[str, Planner] = {"veil": veil_plan}
"""By design: from a model's configuration and the design's options to the plan of its protected checkpoint."""


@dataclass(frozen=True)
class Protection:
    """What was made.

    Attributes:
        design: for whose host.
        directory: of the protected checkpoint: the host's.
        key: the key's file: the enclave's.
        fingerprint: of the source.
        shards: number of files.
        num_bytes: their size together.
        peak_rss: largest resident set of this process so far, bytes.
    """

    design: str
    directory: Path
    key: Path
    fingerprint: str
    shards: int
    num_bytes: int
    peak_rss: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "directory": str(self.directory), "key": str(self.key)}


def protect_model(
    model: str,
    directory: Path,
    *,
    design: str = "veil",
    overrides: Sequence[str] = (),
    key: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    on_event: Callable[[str, dict[str, Any]], None] = lambda _name, _fields: None,
) -> Protection:
    """Protect a model on disk; see `parties.protected.protect`.

    Args:
        model: a model source.
        directory: for the host.
        design: one of `PROTECTORS`.
        overrides: ``key=value`` strings, as `load_config` takes them.
        key: the key's file; by default in a folder beside ``directory``.
        dtype: of the tensors, before and after; as stored if ``None``.
        overwrite: begin anew.
        on_event: told of progress.

    Raises:
        ConfigError: the design cannot, or its options do not fit.
        ModelError: the model cannot be used, or descends from one of ``provider.public_ancestors``.
        CheckpointError: the directory holds something else, or the disk is full.
    """
    if design not in PROTECTORS:
        raise ConfigError(f"no protected checkpoints are made for {design!r}", hint=nearest(design, PROTECTORS))
    raw = {"design": design, "model": model, "output": str(directory)}
    config = load_config(raw, overrides=overrides, options=option_tables())
    checkpoint = resolve_model(model)
    check_ancestors(config.provider, checkpoint, on_event)
    options = design_options(DESIGNS[design], config.design_options)
    plan = PROTECTORS[design](checkpoint.config, options, dtype=dtype)
    key = key or default_key_path(directory)
    made = protect(checkpoint, plan, directory, key, overwrite=overwrite, report=on_event)
    return Protection(
        design=design,
        directory=directory,
        key=key,
        fingerprint=made.fingerprint,
        shards=len(made.shards),
        num_bytes=sum(shard.num_bytes for shard in made.shards),
        peak_rss=peak_rss_bytes(),
    )
