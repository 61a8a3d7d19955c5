"""The trusted side: the enclave's identity, and state sealed at rest."""
