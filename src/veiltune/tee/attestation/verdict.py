"""What verification hands back: a description of who was verified, for the log and the record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SIMULATED: Final = "simulated"
"""The label of an enclave without hardware, wherever it is named."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A party that proved what it is. There is no false one: verification raises instead.

    Attributes:
        tee: ``sgx``, ``tdx``, ``snp`` or ``simulated``.
        measurement: what was measured (hex): MRENCLAVE, MRTD or the launch measurement; empty where simulated.
        tcb: the status or the versions of the platform's trusted computing base, in words.
        advisories: known weaknesses that apply to this platform, as its maker names them.
        platform: which platform it is, as far as the evidence tells: FMSPC, or product and chip.
    """

    tee: str
    measurement: str
    tcb: str
    advisories: tuple[str, ...] = ()
    platform: str = ""

    @property
    def simulated(self) -> bool:
        """No hardware stands behind it."""
        return self.tee == SIMULATED

    @property
    def label(self) -> str:
        """What logs and results call it: the label of a simulated one is the word alone."""
        return self.tee if self.simulated else f"{self.tee} {self.measurement[:16]} ({self.tcb})"

    def record(self) -> dict[str, str | bool | list[str]]:
        """For JSON."""
        return {
            "tee": self.tee,
            "simulated": self.simulated,
            "measurement": self.measurement,
            "tcb": self.tcb,
            "advisories": list(self.advisories),
            "platform": self.platform,
        }
