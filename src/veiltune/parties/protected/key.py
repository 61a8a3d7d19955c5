"""The key of a protected checkpoint: one file that its owner alone may read, sealed, bound to what it opens.

The file is sealed state (`tee.sealing`), so all of it is authenticated: the master secret that every map is drawn from, the
fingerprint of the source checkpoint, the identity of the protected one, and the digest of its manifest once that is complete. The
manifest has each shard's digest, so whoever holds the key knows every byte that the host ought to have.

The sealing key lies beside it, in a folder of the enclave's own. In a real enclave it comes from the hardware; here it is
SIMULATED, a plain file, so that whoever can read the folder has the secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, final

import torch

from veiltune.errors import CheckpointError
from veiltune.parties.protected.manifest import Manifest, cannot_write
from veiltune.secrets import MasterSecret, Secret
from veiltune.tee.sealing import SIMULATED_KEY_FILE, SealingKey, require_private, seal_file, unseal_file

CONTEXT: Final = "protected-checkpoint/1"


@final
class ProtectionKey(Secret):
    """The secret of one protected checkpoint, and which one that is.

    Args:
        master: what the maps are drawn from.
        fingerprint: of the source checkpoint.
        identity: of the protected checkpoint.
        manifest: digest of the complete manifest; empty until there is one.
    """

    def __init__(self, master: MasterSecret, fingerprint: str, identity: str, manifest: str = "") -> None:
        self.master = master
        self.fingerprint = fingerprint
        self.identity = identity
        self.manifest = manifest

    def save(self, path: Path) -> None:
        """Seal it into ``path``, mode 0600, whole or not at all.

        Raises:
            CheckpointError: the disk is full, or refuses.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            seal_file(
                path,
                {"master": torch.frombuffer(bytearray(self.master.reveal()), dtype=torch.uint8)},
                {"fingerprint": self.fingerprint, "identity": self.identity, "manifest": self.manifest},
                SealingKey.load_or_create(path.parent),
                CONTEXT,
            )
        except OSError as error:
            raise cannot_write(path, error) from None

    def require_source(self, fingerprint: str) -> None:
        """Raise CheckpointError if it is the key to another checkpoint than the one with this fingerprint."""
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                f"the key is of the checkpoint {self.fingerprint[:16]}…, this one is {fingerprint[:16]}…",
                hint="use the key that was made with this checkpoint, or protect this one",
            )

    def require_manifest(self, manifest: Manifest) -> None:
        """Raise CheckpointError if ``manifest`` is not the very one that the key was made with.

        A manifest that is not complete is compared by identity alone.
        """
        self.require_source(manifest.fingerprint)
        if manifest.identity != self.identity:
            raise CheckpointError(
                f"the key is of the protected checkpoint {self.identity[:16]}…, this one is {manifest.identity[:16]}…",
                hint="use the key that was made with it",
            )
        if manifest.complete and self.manifest and manifest.digest() != self.manifest:
            raise CheckpointError(
                "the manifest is not the one that the key was made with: it was altered",
                hint="use an intact copy of the protected checkpoint",
            )


def default_key_path(directory: Path) -> Path:
    """Where the key of a protected checkpoint is if nothing else is said: in a folder beside it, the enclave's own."""
    return directory.with_name(f"{directory.name}.enclave") / "protection.key"


def open_key(path: Path) -> ProtectionKey:
    """The key in a file of `ProtectionKey.save`.

    Raises:
        CheckpointError: it is missing, may be read by others, was altered, or was sealed elsewhere.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no key {str(path)!r}",
            hint="give the key file that veiltune protect wrote; without it the checkpoint is of no use",
        )
    require_private(path)
    if not (path.parent / SIMULATED_KEY_FILE).is_file():
        raise CheckpointError(
            f"the (simulated) enclave's {SIMULATED_KEY_FILE}, which sealed {str(path)!r}, is not beside it",
            hint="keep both files in one folder",
        )
    opened = unseal_file(path, SealingKey.load_or_create(path.parent), CONTEXT)
    said = opened.metadata
    master = MasterSecret(bytes(opened.tensors["master"].tolist()))
    return ProtectionKey(master, said["fingerprint"], said["identity"], said["manifest"])
