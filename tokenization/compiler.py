"""Compiles C++ into a shared library: every source once per instruction set that a processor may have.

Light: setup.py runs it before anything is installed. How the right copy of a function is found at run time stands in
csrc/instruction_sets.h.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HEADERS = Path(__file__).parent / "csrc"
LANGUAGE = ("-std=c++20", "-O3")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ("-DIS_BASELINE",)}
if platform.machine() == "x86_64":
    _AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
    INSTRUCTION_SETS |= {"avx2": ("-mavx2", "-mfma"), "avx512": ("-mavx2", "-mfma", *_AVX512)}


class BuildError(RuntimeError):
    """A native library cannot be built here; the message says why and what to do."""


def compile_library(
    sources: Sequence[Path],
    target: Path,
    *,
    flags: Sequence[str],
    libraries: Sequence[str] = (),
    cuda_command: Sequence[str] = (),
    linker: Sequence[str] = (),
) -> None:
    """Compile sources below TMPDIR, where a compiler that is killed leaves its scratch, and put the library in place.

    It is copied beside its place, as `.build-ops-*`, and takes it in one rename: a process that has the old one open
    keeps it, and builds at the same time do not meet.

    Args:
        sources: .cpp files, each compiled once per instruction set, and .cu files.
        target: the library.
        flags: what .cpp files are compiled with besides `LANGUAGE`.
        libraries: the linker's flags for the libraries that this one needs.
        cuda_command: what compiles a .cu file, short of -c, its name and its output.
        linker: what links the objects; the C++ compiler if left out.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    host = [*find_compiler(), *LANGUAGE, "-fPIC", "-fvisibility=hidden", f"-I{HEADERS}", *flags]
    with tempfile.TemporaryDirectory(prefix="build-ops-") as scratch:
        commands: list[list[str]] = []
        for source in sources:
            if source.suffix == ".cu":
                commands.append([*cuda_command, "-c", str(source), "-o", f"{scratch}/{source.stem}-cuda.o"])
                continue
            for name, set_flags in INSTRUCTION_SETS.items():
                command = [*host, *set_flags, f"-DINSTRUCTION_SET={name}"]
                commands.append([*command, "-c", str(source), "-o", f"{scratch}/{source.stem}-{name}.o"])
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(run_compiler, commands))
        linked = Path(scratch) / target.name
        objects = [command[-1] for command in commands]
        run_compiler([*(linker or find_compiler()), "-shared", *objects, "-o", str(linked), *libraries])
        staged = target.with_name(f".build-ops-{secrets.token_hex(8)}")
        try:
            shutil.copy(linked, staged)
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)


def run_compiler(command: list[str]) -> str:
    """Run a compiler and return what it said.

    Raises:
        BuildError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"build native ops: `{shlex.join(command)}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def find_compiler() -> list[str]:
    """Return the C++ compiler's command: what CXX names, or the first that there is.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX")
    found = shlex.split(named) if named else [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found or shutil.which(found[0]) is None:
        raise BuildError(
            f"build native ops: a C++20 compiler must be on PATH or named by CXX, got {named or 'none'}; install g++ "
            f"and run `tensorar build-ops`, or set engine.ops: reference"
        )
    return found


def sources_in(directory: Path) -> list[Path]:
    """Return the C++ and CUDA files in a directory, and nothing that an editor leaves beside them."""
    kinds = (".h", ".cpp", ".cu")
    return [path for path in directory.iterdir() if path.suffix in kinds and not path.name.startswith(".")]


def digest_of(paths: Iterable[Path]) -> str:
    """Return a digest of the names and contents of files, wherever they lie: what a library was built from."""
    digest = hashlib.sha256()
    for name, content in sorted((path.name, path.read_bytes()) for path in paths):
        digest.update(f"\n{name}\n".encode() + content)
    return digest.hexdigest()[:32]
