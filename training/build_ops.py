"""Compiles training/csrc into training/_ops.so, the library of native ops: `tensorar build-ops`.

Light: setup.py runs it too, so torch is found and not imported. The library runs on any machine of its architecture
(tokenization/compiler.py). CUDA kernels join in where nvcc and a CUDA build of torch are; TENSORAR_CUDA=0 leaves them
out, =1 insists on them.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenization import compiler
from tokenization.compiler import LANGUAGE, BuildError, compile_library, digest_of, find_compiler

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "_ops.so"

CUDA_ARCHITECTURES = (80, 90, 100)
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, in the form of torch/headeronly/version.h


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
    warnings = ("-Wall", "-Wextra", "-Wno-unused-parameter", f"-I{SOURCES}")
    compile_library(
        sources,
        target,
        flags=(*warnings, *_torch_headers(), f'-DOPS_SOURCES="{sources_mark(has_cuda=has_cuda)}"'),
        libraries=_torch_libraries(),
        cuda_command=cuda_command() if has_cuda else (),
        linker=_cuda_linker() if has_cuda else (),
    )


def sources_mark(*, has_cuda: bool = False) -> str:
    """The text that is inside a library built from the sources as they are now; without CUDA, the start of it."""
    headers = compiler.HEADERS.glob("*.h")
    digest = digest_of([Path(__file__), Path(compiler.__file__), *headers, *compiler.sources_in(SOURCES)])
    return f"tensorar ops {digest}" + (" with CUDA" if has_cuda else "")


def cuda_command() -> list[str]:
    """What compiles a .cu file for every architecture, short of -c, its name and its output."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES]
    host = [f"-ccbin={shlex.join(find_compiler())}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return ["nvcc", *LANGUAGE, *targets, "--threads=0", *host, *_torch_headers()]


def _cuda_linker() -> list[str]:
    """What links a library with CUDA kernels: it names torch's CUDA library even where the linker sees no need to."""
    return ["nvcc", f"-ccbin={shlex.join(find_compiler())}", "-cudart=static", "-Xlinker=--no-as-needed"]


def _torch_libraries() -> list[str]:
    """What links a library against torch."""
    directory = _torch_root() / "lib"
    names = [name for name in ("torch_cpu", "torch_cuda", "c10") if (directory / f"lib{name}.so").exists()]
    return [f"-L{directory}", *(f"-l{name}" for name in names)]


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


def _torch_headers() -> list[str]:
    return ["-isystem", str(_torch_root() / "include"), OLDEST_TORCH]


def _torch_root() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "build native ops: torch, whose headers they need, is not installed; then run `tensorar build-ops`"
        )
    return Path(spec.origin).parent
