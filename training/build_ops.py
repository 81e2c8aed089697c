"""Compiles training/csrc into training/_ops.so, the library of native ops: `tensorar build-ops`.

Light: setup.py runs it too, so it imports torch only to find its headers. Every .cpp of an op is compiled once per
instruction set (csrc/instruction_sets.h), so the library runs on any machine of its architecture. CUDA kernels join
in where nvcc and a CUDA build of torch are; TENSORAR_CUDA=0 leaves them out, =1 insists on them.
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

CUDA_ARCHITECTURES = ("80", "90", "100")
COMPILE_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
# The oldest torch that the library runs with, 2.10, in the form of torch/headeronly/version.h.
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ("-DIS_BASELINE",)}
if platform.machine() == "x86_64":
    INSTRUCTION_SETS["avx2"] = ("-mavx2", "-mfma")
    avx512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
    INSTRUCTION_SETS["avx512"] = (*INSTRUCTION_SETS["avx2"], *avx512)


class BuildError(RuntimeError):
    """The native ops cannot be built here; the message says why and what to do."""


def sources_mark(*, has_cuda: bool = False) -> str:
    """The text inside a library that was built from the sources as they are now."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.iterdir(), Path(__file__)]):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return f"tensorar ops {digest.hexdigest()[:32]}" + (" with CUDA" if has_cuda else "")


def build_ops() -> Path:
    """Compile the library and put it in its place in one rename.

    Returns:
        Its path.

    Raises:
        BuildError: no compiler, no torch, or a source does not compile.
    """
    compiler, torch_root = _compiler(), _torch_root()
    nvcc = _nvcc(torch_root)
    mark = sources_mark(has_cuda=nvcc is not None)
    with tempfile.TemporaryDirectory(dir=LIBRARY.parent, prefix=".build-ops-") as scratch:
        commands: list[list[str]] = []
        objects: list[str] = []

        def compile_into(name: str, command: list[str]) -> None:
            objects.append(f"{scratch}/{name}.o")
            commands.append([*command, "-o", objects[-1]])

        include = [f"-isystem{torch_root}/include", *TORCH_FLAGS]
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.name == "library.cpp":
                compile_into(
                    "library", [*compiler, *COMPILE_FLAGS, *include, f'-DOPS_SOURCES="{mark}"', "-c", str(source)]
                )
                continue
            for name, flags in INSTRUCTION_SETS.items():
                command = [*compiler, *COMPILE_FLAGS, *flags, *include, f"-DINSTRUCTION_SET={name}", "-c", str(source)]
                compile_into(f"{source.stem}-{name}", command)
        if nvcc is not None:
            for source in sorted(SOURCES.glob("*.cu")):
                compile_into(f"{source.stem}-cuda", [*cuda_command(nvcc, torch_root), "-c", str(source)])
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        staged = f"{scratch}/{LIBRARY.name}"
        _run([*_linker(compiler, nvcc), "-shared", *objects, "-o", staged, *_torch_libraries(torch_root, nvcc)])
        Path(staged).replace(LIBRARY)
    return LIBRARY


def cuda_command(nvcc: str, torch_root: Path, *, architectures: Sequence[str] = CUDA_ARCHITECTURES) -> list[str]:
    """What compiles a .cu file, short of -c and its name."""
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    host = ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-ccbin={shlex.join(_compiler())}"]
    return [nvcc, "-std=c++20", "-O3", *targets, *host, f"-isystem={torch_root}/include", *TORCH_FLAGS]


def _linker(compiler: list[str], nvcc: str | None) -> list[str]:
    return compiler if nvcc is None else [nvcc, f"-ccbin={shlex.join(compiler)}", "-cudart=static"]


def _torch_libraries(torch_root: Path, nvcc: str | None) -> list[str]:
    names = ["torch_cpu", "c10", *(["torch_cuda"] if nvcc is not None else [])]
    return [f"-L{torch_root}/lib", *(f"-l{name}" for name in names)]


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    found = shlex.split(named) if named else [next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")]
    if not shutil.which(found[0]):
        raise BuildError(
            f"build native ops: a C++20 compiler must be on PATH or in CXX, got {named or 'none'}; install g++ and run "
            f"`tensorar build-ops`, or train with engine.ops: reference"
        )
    return found


def _torch_root() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "build native ops: torch, whose headers they need, is not installed here; after the installation run "
            "`tensorar build-ops`"
        )
    return Path(spec.origin).parent


def _nvcc(torch_root: Path) -> str | None:
    """The CUDA compiler, where CUDA kernels are to be built."""
    wanted = os.environ.get("TENSORAR_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"build native ops: TENSORAR_CUDA must be auto, 0 or 1, got {wanted!r}; unset it for auto")
    nvcc, has_cuda_torch = shutil.which("nvcc"), (torch_root / "lib" / "libtorch_cuda.so").exists()
    if wanted == "1" and not (nvcc and has_cuda_torch):
        lacking = " and ".join(["nvcc on PATH"] * (not nvcc) + ["a CUDA build of torch"] * (not has_cuda_torch))
        raise BuildError(f"build native ops: TENSORAR_CUDA=1 needs {lacking}; install that, or set TENSORAR_CUDA=auto")
    return nvcc if wanted != "0" and has_cuda_torch else None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"build native ops: `{shlex.join(command)}` failed:\n{done.stderr.strip()}")


def main() -> None:
    """Build, and say where the library is."""
    try:
        sys.stdout.write(f"native ops: {build_ops()}\n")
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
