"""What a party accepts as an enclave: a TOML file that it writes itself. Nothing is accepted by default.

::

    version = 1
    allow_simulated = false           # true: accept enclaves that protect nothing

    [[sgx]]
    mr_enclave = ["<64 hex digits>"]
    collateral = "sgx-collateral.json"  # beside this file, or absolute; fetch it anew every few weeks
    tcb_statuses = ["UpToDate"]

    [[tdx]]
    mr_td = ["<96 hex digits>"]
    rtmr0 = ["<96 hex digits>"]       # or "any", for each of the four: a decision, so it has to be written
    rtmr1 = ["<96 hex digits>"]
    rtmr2 = ["<96 hex digits>"]
    rtmr3 = "any"
    collateral = "tdx-collateral.json"
    allow_dynamic_platform = true

    [[snp]]
    product = "Genoa"
    measurements = ["<96 hex digits>"]
    min_tcb = { boot_loader = 9, tee = 0, snp = 23, microcode = 72 }
    vmpl = [0]

Evidence has to meet every line of one table. Debug enclaves are refused whatever the file says, and so are platforms
that their maker calls out of date or revoked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, Field

from veiltune.config import Section, load_section
from veiltune.errors import ConfigError

Product = Literal["Milan", "Genoa", "Turin"]
# Out of date, revoked and relaunch-advised are left out on purpose: no policy accepts them.
TcbStatus = Literal["UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded"]
MAX_SVN: Final = 255
T = TypeVar("T", bound=Section)


def _digest(num_bytes: int) -> AfterValidator:
    def check(text: str) -> str:
        digits = text.lower()
        if len(digits) != 2 * num_bytes or set(digits) - set("0123456789abcdef"):
            raise ValueError(f"not a measurement; give {2 * num_bytes} hex digits")
        if not digits.strip("0"):
            raise ValueError("all zero, which stands for nothing measured; give the measurement of your own build")
        return digits

    return AfterValidator(check)


Digest32 = Annotated[str, _digest(32)]
Digest48 = Annotated[str, _digest(48)]
Accepted48 = Literal["any"] | Annotated[tuple[Digest48, ...], Field(min_length=1)]
Flag = Annotated[bool, Field(strict=True)]
Svn = Annotated[int, Field(strict=True, ge=0, le=MAX_SVN)]


class QuoteTerms(Section):
    """What SGX and TDX have in common."""

    collateral: Path = Field(description="file of TCB info, QE identity, revocation lists and their certificates")
    tcb_statuses: tuple[TcbStatus, ...] = Field(default=("UpToDate",), min_length=1)
    min_tcb_evaluation: int = Field(default=0, strict=True, ge=0, description="least TCB evaluation data number")
    reject_advisories: tuple[str, ...] = ()
    allow_dynamic_platform: Flag = False
    allow_cached_keys: Flag = False
    allow_smt: Flag = False


class SgxTerms(QuoteTerms):
    """An accepted enclave in SGX. By MRENCLAVE alone: a signer could change the code behind an MRSIGNER."""

    mr_enclave: tuple[Digest32, ...] = Field(min_length=1)


class TdxTerms(QuoteTerms):
    """An accepted virtual machine in TDX.

    MRTD covers the firmware only. What runs above it is in the run-time registers, so each has to be named or waived.
    """

    mr_td: tuple[Digest48, ...] = Field(min_length=1)
    rtmr0: Accepted48 = Field(description="firmware configuration")
    rtmr1: Accepted48 = Field(description="boot loader and kernel")
    rtmr2: Accepted48 = Field(description="kernel command line and initial file system")
    rtmr3: Accepted48 = Field(description="the application's own")


class SnpTcb(Section):
    """The least security versions of an SEV-SNP platform, each 0 … 255."""

    boot_loader: Svn
    tee: Svn
    snp: Svn
    microcode: Svn
    fmc: Svn = Field(default=0, description="Turin only")


class SnpTerms(Section):
    """An accepted virtual machine in SEV-SNP."""

    product: Product
    measurements: tuple[Digest48, ...] = Field(min_length=1)
    min_tcb: SnpTcb
    vmpl: tuple[Annotated[int, Field(strict=True, ge=0, le=3)], ...] = Field(default=(0,), min_length=1)


class Policy(Section):
    """All that is accepted. An empty one accepts nothing."""

    allow_simulated: bool = False
    sgx: tuple[SgxTerms, ...] = ()
    tdx: tuple[TdxTerms, ...] = ()
    snp: tuple[SnpTerms, ...] = ()


class _File(Section):
    """The file's top level; its tables are read one by one, so that messages can name them."""

    version: Literal[1]
    allow_simulated: Flag = False
    sgx: tuple[dict[str, Any], ...] = ()
    tdx: tuple[dict[str, Any], ...] = ()
    snp: tuple[dict[str, Any], ...] = ()


def load_policy(path: Path) -> Policy:
    """Read a policy file; its collateral files are looked for beside it.

    Raises:
        ConfigError: an unreadable file, an unknown or lacking key, a value out of range, or a file that accepts nothing.
    """
    file = load_section(path, _File)
    sgx = _tables("sgx", file.sgx, SgxTerms)
    tdx = _tables("tdx", file.tdx, TdxTerms)
    snp = _tables("snp", file.snp, SnpTerms)
    if not (sgx or tdx or snp or file.allow_simulated):
        raise ConfigError(
            f"the policy {str(path)!r} accepts nothing",
            hint="add a table [[sgx]], [[tdx]] or [[snp]]; see attestation.md",
        )
    return Policy(
        allow_simulated=file.allow_simulated,
        sgx=tuple(_beside(path, terms) for terms in sgx),
        tdx=tuple(_beside(path, terms) for terms in tdx),
        snp=snp,
    )


def _tables(name: str, tables: tuple[Mapping[str, Any], ...], form: type[T]) -> tuple[T, ...]:
    return tuple(load_section(table, form, prefix=f"{name}[{index}].") for index, table in enumerate(tables))


Q = TypeVar("Q", bound=QuoteTerms)


def _beside(path: Path, terms: Q) -> Q:
    return terms.model_copy(update={"collateral": path.parent / terms.collateral})
