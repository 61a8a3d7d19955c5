"""A party's own share of a checkpoint: tensors of one step in one file, written whole or not at all.

The owner commits a checkpoint by writing ``checkpoint.json`` after every party has acknowledged its file. Each party keeps the
last two steps' files, so a crash while a new checkpoint is written leaves the committed one whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from veiltune.errors import CheckpointError
from veiltune.tee.sealing import SealingKey, seal_file, sync_directory, unseal_file

KEPT = 2
_STEP = re.compile(r"step-(\d{8})\.(safetensors|sealed)")


class StateStore:
    """Files of one party's state, one a step; sealed if a key is given.

    Args:
        directory: the party's own directory.
        fingerprint: of the configuration; a file of another run is refused.
        key: seals the files (AES-256-GCM). Without it they are plain safetensors.
    """

    def __init__(self, directory: Path, fingerprint: str, key: SealingKey | None = None) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.key = key

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.{'safetensors' if self.key is None else 'sealed'}"

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the state of ``step`` and drop all but the newest files."""
        from safetensors.torch import save_file

        self.directory.mkdir(parents=True, exist_ok=True)
        values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {"fingerprint": self.fingerprint, "step": str(step)}
        path = self._path(step)
        if self.key is None:
            partial = path.with_name(path.name + ".partial")
            save_file(values, partial, metadata=metadata)
            with partial.open("rb") as written:
                os.fsync(written.fileno())  # it must not be younger on the disk than the commit that names it
            partial.replace(path)
            sync_directory(path.parent)
        else:
            seal_file(path, values, metadata, self.key, self._context(step))
        self._prune(step)

    def _prune(self, step: int) -> None:
        """Keep the newest up to ``step``. Later ones are of a run that went back, and must not push out the committed one."""
        found = sorted(path for path in self.directory.iterdir() if _STEP.fullmatch(path.name))
        upto = [path for path in found if path.name <= self._path(step).name]
        # Torn by a kill: nobody else writes here.
        torn = [*self.directory.glob(".step-*"), *self.directory.glob("step-*.partial")]
        for old in {*found, *torn} - set(upto[-KEPT:]):
            old.unlink()

    def _context(self, step: int) -> str:
        return f"checkpoint:{self.fingerprint}:{step}"

    def load(self, step: int) -> dict[str, Tensor]:
        """Read the state of ``step``.

        Raises:
            CheckpointError: no such file, a torn or altered file, or one of another run.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(step)
        if not path.is_file():
            raise CheckpointError(
                f"no state of step {step} in {str(self.directory)!r}", hint="start anew with --overwrite"
            )
        if self.key is not None:
            return unseal_file(path, self.key, self._context(step)).tensors
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}", hint="start anew with --overwrite") from None
        if metadata.get("step") != str(step):
            raise CheckpointError(
                f"{str(path)!r} holds the state of step {metadata.get('step')}", hint="start anew with --overwrite"
            )
        if metadata.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{str(path)!r} belongs to a run with another configuration",
                hint="resume with the configuration it began with",
            )
        return tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters, the optimiser's state of each, and the random state, as named tensors."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"value:{name}"] = parameter.detach()
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{field}:{name}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Undo `optimizer_tensors` in place."""
    torch.set_rng_state(tensors["rng"].to(torch.uint8))
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    state: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in parameters.values()}
    for key, value in tensors.items():
        field, _, name = key.partition(":")
        if name not in parameters:
            continue
        if field == "value":
            with torch.no_grad():
                parameters[name].copy_(value)
        else:
            on_device = value if field == "step" else value.to(parameters[name].device)
            state[parameters[name]][field] = on_device.clone()
    for parameter, values in state.items():
        optimizer.state.pop(parameter, None)
        if values:
            optimizer.state[parameter] = values
