"""The parties: what each holds and may do, whatever the design."""

from veiltune.parties.party import Job, Party

__all__ = ["Job", "Party"]
