"""What this machine has of what the project needs, as a table with the next action for whatever is missing.

A check never raises: what it cannot find out is its answer. `fail` means that the demo cannot run, `warn` that
something will be slower or is only needed elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.open_emoji import EMOJIBASE, STYLES

GIB = 2**30
MIN_FREE_DISK_BYTES = 4 * GIB
MIN_MEMORY_BYTES = 6 * GIB
MIN_SHM_BYTES = GIB // 4
COMMAND_TIMEOUT_S = 20
REDIRECTED_WIDTH = 140
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One answer: what was looked at, how it stands, what was found and what to do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    action: str = ""


def run_doctor(*, data_root: Path = Path("data")) -> bool:
    """Print the table of all checks; whether none of them failed.

    Args:
        data_root: Where the demo keeps its corpus; with it in place no network is needed.
    """
    table = Table(title="tensorar doctor", title_justify="left")
    for heading in ("check", "status", "found", "next"):
        table.add_column(heading, overflow="fold")
    checks = [_guarded(name, check) for name, check in _checks(data_root).items()]
    for check in checks:
        table.add_row(check.name, Text(check.status, style=COLOURS[check.status]), check.found, check.action)
    width = None if Console().is_terminal else REDIRECTED_WIDTH
    Console(width=width, markup=False, emoji=False).print(table)
    return all(check.status != "fail" for check in checks)


def _checks(data_root: Path) -> dict[str, Callable[[], Check]]:
    """All checks by what the table calls one that fails itself."""
    return {
        "python": check_python,
        "torch": check_torch,
        "cuda devices": check_cuda,
        "ray": lambda: check_package("ray"),
        "deepspeed": lambda: check_package("deepspeed"),
        "native pixels": check_native_pixels,
        "native ops": check_native_ops,
        "nvcc": check_nvcc,
        "cpu cores": check_cores,
        "memory": lambda: check_size(
            "memory", _memory_bytes(), MIN_MEMORY_BYTES, action="use a machine with more memory"
        ),
        "free disk": lambda: check_size(
            "free disk", shutil.disk_usage(".").free, MIN_FREE_DISK_BYTES, action="free some space"
        ),
        "shared memory": check_shared_memory,
        "tokenizer": check_tokenizer,
        "demo corpus": lambda: check_corpus(data_root),
    }


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a process boundary: the table is where errors are told
        return Check(name, "fail", f"{type(error).__name__}: {error}", "install the project anew: make venv")


def check_python() -> Check:
    """Python's version and place."""
    return Check("python", "ok", platform.python_version())


def check_torch() -> Check:
    """PyTorch's version and build."""
    import torch  # noqa: PLC0415  (heavy; only this command needs it)

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Check("torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def check_cuda() -> Check:
    """The CUDA devices that PyTorch sees."""
    import torch  # noqa: PLC0415  (heavy; only this command needs it)

    if not torch.cuda.is_available():
        return Check("cuda devices", "warn", "none", "the demo needs none; a job asks with cluster.gpus_per_worker")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("cuda devices", "ok", ", ".join(names))


def check_package(name: str) -> Check:
    """Whether a package is installed, and its version."""
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", "install the pinned environment: make venv")


def check_native_pixels() -> Check:
    """Whether the library of native pixels is built from its sources."""
    from tokenization.build_pixels import LIBRARY  # noqa: PLC0415  (only this command needs it)
    from tokenization.native import NativePixelsError, load_library  # noqa: PLC0415  (only this command needs it)

    try:
        load_library()
    except NativePixelsError as error:
        advice = "nothing needs it, tokenizing is slower; run `tensorar build-ops`"
        return Check("native pixels", "warn", str(error), advice)
    return Check("native pixels", "ok", LIBRARY.name)


def check_native_ops() -> Check:
    """Whether the library of native ops is built from its sources, and whether for CUDA."""
    from training.build_ops import LIBRARY, sources_mark  # noqa: PLC0415  (only this command needs it)
    from training.ops import NativeOpError, load_ops  # noqa: PLC0415  (heavy; only this command needs it)

    try:
        load_ops()
    except NativeOpError as error:
        return Check(
            "native ops",
            "fail",
            str(error).rpartition("; ")[0],
            "run `tensorar build-ops`, or set engine.ops: reference",
        )
    has_cuda = sources_mark(has_cuda=True).encode() in LIBRARY.read_bytes()
    return Check("native ops", "ok", f"{LIBRARY.name}, for the CPU {'and CUDA' if has_cuda else 'alone'}")


def check_nvcc() -> Check:
    """The CUDA compiler, which only native CUDA kernels need."""
    path = shutil.which("nvcc")
    if path is None:
        return Check("nvcc", "warn", "not on PATH", "nothing on a CPU; install the CUDA toolkit to compile kernels")
    version = _output([path, "--version"]).splitlines()
    return Check("nvcc", "ok", next((line for line in version if "release" in line), path))


def check_cores() -> Check:
    """CPU cores against the two that the demo's two ranks use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Check("cpu cores", "warn", str(count), "expect the demo to take twice as long")
    return Check("cpu cores", "ok", str(count))


def check_size(name: str, found_bytes: int, need_bytes: int, *, action: str) -> Check:
    """A size against the least that the demo needs."""
    found = f"{found_bytes / GIB:.1f} GiB"
    if found_bytes < need_bytes:
        return Check(name, "fail", found, f"{action}: {need_bytes / GIB:.1f} GiB are needed")
    return Check(name, "ok", found)


def check_shared_memory() -> Check:
    """Shared memory, where Ray keeps its object store."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("shared memory", "warn", "no /dev/shm", "Ray keeps its objects on disk, which is slower")
    free_bytes = shutil.disk_usage(path).free
    if free_bytes < MIN_SHM_BYTES:
        found = f"{free_bytes / GIB:.2f} GiB"
        return Check("shared memory", "warn", found, "in a container, start it with --shm-size=1g")
    return Check("shared memory", "ok", f"{free_bytes / GIB:.1f} GiB")


def check_tokenizer() -> Check:
    """Whether the shipped tokenizer loads, and its fingerprint."""
    # Heavy; only this command needs them.
    from tokenization.config import TokenizerConfig  # noqa: PLC0415
    from tokenization.tokenizer import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.load(TokenizerConfig(weights="open-emoji-64", image_size_px=64))
    found = f"open-emoji-64, {tokenizer.codebook_size} codes, fingerprint {tokenizer.fingerprint.digest}"
    return Check("tokenizer", "ok", found)


def check_corpus(data_root: Path) -> Check:
    """Whether the demo's corpus is here or can be fetched."""
    packages = (EMOJIBASE, *STYLES.values())
    if (data_root / "open-emoji" / "corpus.json").is_file():
        return Check("demo corpus", "ok", f"{data_root / 'open-emoji'}; no network needed")
    if all((data_root / "downloads" / package.tarball).is_file() for package in packages):
        return Check("demo corpus", "ok", f"packages in {data_root / 'downloads'}; no network needed")
    npm = shutil.which("npm")
    if npm is None:
        return Check("demo corpus", "warn", "npm is not on PATH", "install npm, or let the demo fetch one from PyPI")
    try:
        _output([npm, "view", EMOJIBASE.spec, "version"])
    except (OSError, subprocess.SubprocessError):
        commands = " ".join(package.spec for package in packages)
        action = f"elsewhere run `npm pack {commands}` and copy the .tgz files into {data_root / 'downloads'}"
        return Check("demo corpus", "fail", "npm does not reach its registry", action)
    return Check("demo corpus", "ok", f"npm at {npm} reaches its registry")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S).stdout
