"""Compiles training/csrc into training/_ops.so, the library of native ops: `tensorar build-ops`.

Light: setup.py runs it too, so torch is found and not imported. Every .cpp of an op is compiled once per instruction
set (csrc/instruction_sets.h), so the library runs on any machine of its architecture. CUDA kernels join in where nvcc
and a CUDA build of torch are; TENSORAR_CUDA=0 leaves them out, =1 insists on them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "_ops.so"

CUDA_ARCHITECTURES = (80, 90, 100)
LANGUAGE = ("-std=c++20", "-O3")
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, in the form of torch/headeronly/version.h
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ("-DIS_BASELINE",)}
if platform.machine() == "x86_64":
    _AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
    INSTRUCTION_SETS |= {"avx2": ("-mavx2", "-mfma"), "avx512": ("-mavx2", "-mfma", *_AVX512)}


class BuildError(RuntimeError):
    """The native ops cannot be built here; the message says why and what to do."""


def build_ops() -> Path:
    """Compile the library of the ops; returns its path.

    Raises:
        BuildError: no compiler, no torch, a CUDA build that is asked for and cannot be, or an error of the compiler.
    """
    kernels = [*SOURCES.glob("*.cpp"), *(SOURCES.glob("*.cu") if nvcc_for_build() else ())]
    build_library(sorted(kernels), LIBRARY)
    return LIBRARY


def build_library(sources: Sequence[Path], target: Path) -> None:
    """Compile sources and put the library in its place in one rename.

    Args:
        sources: .cpp files, each compiled once per instruction set, and .cu files.
        target: the library.

    Raises:
        BuildError: see `build_ops`.
    """
    has_cuda = any(source.suffix == ".cu" for source in sources)
    host, mark = _host_command(), f'-DOPS_SOURCES="{sources_mark(has_cuda=has_cuda)}"'
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-ops-") as scratch:
        commands: list[list[str]] = []
        for source in sources:
            if source.suffix == ".cu":
                commands.append([*cuda_command(), "-c", str(source), "-o", f"{scratch}/{source.stem}-cuda.o"])
                continue
            for name, flags in INSTRUCTION_SETS.items():
                command = [*host, *flags, f"-DINSTRUCTION_SET={name}", mark]
                commands.append([*command, "-c", str(source), "-o", f"{scratch}/{source.stem}-{name}.o"])
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(run_compiler, commands))
        staged = Path(scratch) / target.name
        linker = _cuda_linker() if has_cuda else _compiler()
        objects = [command[-1] for command in commands]
        run_compiler([*linker, "-shared", *objects, "-o", str(staged), *_torch_libraries()])
        staged.replace(target)


def sources_mark(*, has_cuda: bool = False) -> str:
    """The text that is inside a library built from the sources as they are now; without CUDA, the start of it."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(SOURCES.iterdir()):
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return f"tensorar ops {digest.hexdigest()[:32]}" + (" with CUDA" if has_cuda else "")


def _host_command() -> list[str]:
    """What compiles a .cpp file against torch, short of -c, its name and its output."""
    warnings = ("-Wall", "-Wextra", "-Wno-unused-parameter", f"-I{SOURCES}")
    return [*_compiler(), *LANGUAGE, "-fPIC", "-fvisibility=hidden", *warnings, *_torch_headers()]


def cuda_command() -> list[str]:
    """What compiles a .cu file for every architecture, short of -c, its name and its output."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES]
    host = [f"-ccbin={shlex.join(_compiler())}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return ["nvcc", *LANGUAGE, *targets, "--threads=0", *host, *_torch_headers()]


def _cuda_linker() -> list[str]:
    """What links a library with CUDA kernels: it names torch's CUDA library even where the linker sees no need to."""
    return ["nvcc", f"-ccbin={shlex.join(_compiler())}", "-cudart=static", "-Xlinker=--no-as-needed"]


def _torch_libraries() -> list[str]:
    """What links a library against torch."""
    directory = _torch_root() / "lib"
    names = [name for name in ("torch_cpu", "torch_cuda", "c10") if (directory / f"lib{name}.so").exists()]
    return [f"-L{directory}", *(f"-l{name}" for name in names)]


def run_compiler(command: list[str]) -> str:
    """Run a compiler and return what it said.

    Raises:
        BuildError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"build native ops: `{shlex.join(command)}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def nvcc_for_build() -> str | None:
    """The CUDA compiler where the library is to have CUDA kernels.

    Raises:
        BuildError: TENSORAR_CUDA=1, and nvcc or a CUDA build of torch is missing.
    """
    wanted = os.environ.get("TENSORAR_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"build native ops: TENSORAR_CUDA must be auto, 0 or 1, got {wanted!r}; unset it for auto")
    nvcc, has_torch = shutil.which("nvcc"), (_torch_root() / "lib" / "libtorch_cuda.so").exists()
    if wanted == "1" and not (nvcc and has_torch):
        missing = " and ".join(["nvcc on PATH"] * (nvcc is None) + ["a CUDA build of torch"] * (not has_torch))
        raise BuildError(f"build native ops: TENSORAR_CUDA=1 needs {missing}; install that, or set TENSORAR_CUDA=auto")
    return nvcc if wanted != "0" and has_torch else None


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    found = shlex.split(named) if named else [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found or shutil.which(found[0]) is None:
        raise BuildError(
            f"build native ops: a C++20 compiler must be on PATH or named by CXX, got {named or 'none'}; install g++ "
            f"and run `tensorar build-ops`, or set engine.ops: reference"
        )
    return found


def _torch_headers() -> list[str]:
    return ["-isystem", str(_torch_root() / "include"), OLDEST_TORCH]


def _torch_root() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "build native ops: torch, whose headers they need, is not installed; then run `tensorar build-ops`"
        )
    return Path(spec.origin).parent


def main() -> None:
    """Build, and say where the library is."""
    try:
        sys.stdout.write(f"native ops: {build_ops()}\n")
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
