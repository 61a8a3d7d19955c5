"""What designs with an enclave have in common: the enclave's session, the host's, and where the LoRA factors are."""

from veiltune.parties.enclaved.backend import HostedBackend
from veiltune.parties.enclaved.enclave import EnclaveSession, run_enclave
from veiltune.parties.enclaved.host import HostedTrunk, HostSession, run_host

__all__ = ["EnclaveSession", "HostSession", "HostedBackend", "HostedTrunk", "run_enclave", "run_host"]
