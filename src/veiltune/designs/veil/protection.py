"""`veil` on disk: the host's trunk, folded and rotated once, and who opens it with what.

What the shards hold is, bit for bit, what a session's enclave would send under the same secret and in the same dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from veiltune.designs.veil.options import VeilOptions, refuse_sandwich_norms
from veiltune.errors import CheckpointError, ConfigError
from veiltune.models.cut import Cut, Trunk
from veiltune.models.families import find_family
from veiltune.models.rotated import Folding, rotated_model
from veiltune.models.skeleton import assign_parameter, config_from_json, require_complete
from veiltune.parties.protected import Manifest, ProtectionKey, default_key_path, map_tensors, open_key, read_manifest
from veiltune.parties.protected.streaming import Plan
from veiltune.privacy.orthogonal import Key, make_key
from veiltune.secrets import MasterSecret

NAME = "veil"
_PLAIN_LEAF = {"constant": "bias", "gain": "weight"}
"""What the host's norms hold, and what of the plain norm it is made of."""


def depends_on(options: VeilOptions) -> dict[str, Any]:
    """The options that the host's tensors depend on."""
    return {name: getattr(options, name) for name in ("enclave_layers", "enclave_top_layers", "inner")}


def stream_key(config: Any, secret: MasterSecret) -> Key:
    """R, the key of the stream, not drawn yet."""
    return make_key("orthogonal", int(config.hidden_size), secret, "stream")


def protection_plan(config: Any, options: VeilOptions, *, dtype: str | None = None) -> Plan:
    """How a checkpoint with this `transformers` configuration is protected for `veil`.

    Raises:
        ConfigError: the options do not fit the model, or its family's folding gives the rotation away.
    """
    refuse_sandwich_norms(options, find_family(config))
    cut = Cut.of(config, options.enclave_layers, options.enclave_top_layers)
    return Plan(
        NAME, depends_on(options), lambda secret: VeilProtector(config, cut, secret, inner=options.inner), dtype=dtype
    )


class VeilProtector:
    """Implements `parties.protected.Protector`.

    Args:
        config: a `transformers` configuration.
        cut: which blocks are the trunk.
        secret: the master secret.
        inner: whether there are maps inside blocks.
    """

    def __init__(self, config: Any, cut: Cut, secret: MasterSecret, *, inner: bool) -> None:
        self._folding = Folding(config, cut, stream_key(config, secret), secret, inner=inner)
        self._model = rotated_model(config, cut)

    def layout(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """See `Protector.layout`."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, parameter in self._model.named_parameters():
            path, _, leaf = name.rpartition(".")
            found[name] = (f"{path}.{_PLAIN_LEAF.get(leaf, leaf)}", tuple(parameter.shape))
        return found

    def protect(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """See `Protector.protect`."""
        return self._folding.fold({name: value})

    def done(self, block: int) -> None:
        """See `Protector.done`."""
        self._folding.release(block)


def load_protected(directory: Path, *, verify: bool = True) -> Trunk:
    """The host's trunk from a protected checkpoint, an ordinary module in the rotated basis; no key is needed or known.

    Its parameters are mapped from the files, not read into memory.

    Args:
        directory: of the protected checkpoint.
        verify: compare every shard with its digest first, which reads all of it once.

    Raises:
        CheckpointError: it is half-written, altered, incomplete, or of another design.
    """
    manifest = read_manifest(directory)
    config, options = config_from_json(manifest.config), options_of(manifest)
    cut = Cut.of(config, options.enclave_layers, options.enclave_top_layers)
    model = rotated_model(config, cut)
    for name, value in map_tensors(directory, manifest, verify=verify).items():
        assign_parameter(model, name, value)
    require_complete(model)
    return Trunk(model.eval(), config, cut)


def options_of(manifest: Manifest) -> VeilOptions:
    """The options that a protected checkpoint was made with.

    Raises:
        CheckpointError: it is of another design.
    """
    if manifest.design != NAME:
        raise CheckpointError(
            f"the protected checkpoint is of {manifest.design!r}, not of {NAME}", hint="use the design it was made for"
        )
    return VeilOptions.model_validate(manifest.options)


def load_key(options: VeilOptions, fingerprint: str) -> ProtectionKey:
    """The key that ``[veil]`` names, once it is known to be of the provider's model and of these options.

    Args:
        options: of the session, with ``protected``.
        fingerprint: of the provider's model.

    Raises:
        CheckpointError: it is missing, altered, or of another checkpoint; the protection is half-written or of other options.
        ConfigError: ``key_seed`` is set besides, or no protected checkpoint is named.
    """
    if options.protected is None or options.key_seed is not None:
        raise ConfigError(
            "veil.protected and veil.key_seed cannot both say where keys come from", hint="leave out veil.key_seed"
        )
    directory = Path(options.protected)
    key = open_key(default_key_path(directory) if options.key is None else Path(options.key))
    key.require_source(fingerprint)
    manifest = read_manifest(directory)
    key.require_manifest(manifest)
    if (made := depends_on(options_of(manifest))) != (wanted := depends_on(options)):
        name = next(name for name in made if made[name] != wanted[name])
        raise CheckpointError(
            f"{options.protected!r} was protected with veil.{name} = {made[name]}, the session has {wanted[name]}",
            hint=f"set veil.{name} = {str(made[name]).lower()}, or protect the model again",
        )
    return key
