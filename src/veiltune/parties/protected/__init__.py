"""A protected checkpoint: a trunk that was put in its secret basis once, on disk, and the key to it in a file elsewhere."""

from veiltune.parties.protected.key import ProtectionKey, default_key_path, open_key
from veiltune.parties.protected.manifest import MANIFEST, Manifest, read_manifest
from veiltune.parties.protected.reading import map_tensors
from veiltune.parties.protected.streaming import Plan, Protector, protect

__all__ = [
    "MANIFEST",
    "Manifest",
    "Plan",
    "ProtectionKey",
    "Protector",
    "default_key_path",
    "map_tensors",
    "open_key",
    "protect",
    "read_manifest",
]
