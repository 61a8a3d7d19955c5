"""What the parties of a session must have alike, and what makes an owner's run what it is: two digests of a configuration.

Both take a configuration as plain JSON values, and give SHA-256 of canonical JSON in hexadecimal.

*Agreed on* (`agreed_fingerprint`): the design and its own options, model, dtype, cut, LoRA's shape and first factors, which
parameters are trained by which optimiser with which decay, who gets the adapter, whether a simulated enclave may do, and
every peer's key. So parties differ in nothing that one of them computes with and another relies on. Links compare it before
anything else crosses, and evidence is bound to it.

*One party's business*, and left out: the owner's text, seed, schedule and evaluation, where things are kept, started and
listened for, the provider's precautions, how an enclave is judged, and `OWN_OPTIONS`. Owners with different texts can
share one provider, enclave and host. Steps, learning rate and clipping come from the owner by message, and so does the seed.

*The run* (`run_fingerprint`): what is agreed on and the owner's share. Checkpoints, transcripts and records carry it; it is
never compared between parties.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

OWN_OPTIONS: Final = frozenset({"server", "cache", "warm_up", "decorrelation", "protected", "key"})
"""Options of designs that are one party's business: how a provider serves, what an owner keeps, how it warms up or
decorrelates its own layers, where host and enclave keep a protected checkpoint. What is named neither here nor in
`MACHINE_OPTIONS` is agreed on."""
MACHINE_OPTIONS: Final = frozenset({"ranks", "rendezvous", "compile", "compile_backend", "checkpointing"})
"""Options that say how a host's machine computes, as ``device`` does: neither agreed on nor part of what a run is."""
_OWN_PREFIX: Final = "distil_"  # how a provider distils its emulator
_AGREED: Final = ("design", "model", "dtype", "cut", "lora", "peers")
_AGREED_IN_TABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("method", "optimizer", "weight_decay"),
    "adapter": ("to",),
    "enclave": ("allow_simulated",),
}
_NOT_OF_THE_RUN: Final = frozenset({"output", "provider", "session", "device", "identity"})


def agreed_fingerprint(values: Mapping[str, Any]) -> str:
    """Of what all parties of a session must have alike."""
    agreed = {name: values[name] for name in _AGREED}
    for table, names in _AGREED_IN_TABLES.items():
        agreed[table] = {name: values[table][name] for name in names}
    agreed["options"] = _without_own(values["design_options"].get(values["design"], {}))
    return _digest(agreed)


def run_fingerprint(values: Mapping[str, Any]) -> str:
    """Of what an owner's run is made of."""
    kept = {name: value for name, value in values.items() if name not in _NOT_OF_THE_RUN}
    tables: Mapping[str, Mapping[str, Any]] = values["design_options"]
    kept["design_options"] = {design: _without(options, MACHINE_OPTIONS) for design, options in tables.items()}
    kept["enclave"] = {name: values["enclave"][name] for name in _AGREED_IN_TABLES["enclave"]}
    if not kept["peers"]:  # a run without keys keeps the fingerprint it had before there were any
        del kept["peers"]
    return _digest(kept)


def _without_own(options: Mapping[str, Any]) -> dict[str, Any]:
    mine = _without(options, OWN_OPTIONS | MACHINE_OPTIONS)
    mine = {name: value for name, value in mine.items() if not name.startswith(_OWN_PREFIX)}
    return {name: _without_own(value) if isinstance(value, Mapping) else value for name, value in mine.items()}


def _without(options: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
