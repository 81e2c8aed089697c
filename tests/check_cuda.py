"""Compiles every CUDA kernel for every architecture and checks what came out; needs no GPU: `make check-cuda`.

A kernel that spills registers or keeps a stack frame, or that has no load or no store of 16 bytes, is an error; those
for `Unaligned` rows go number by number and are held to the registers only. What a kernel uses is printed and kept in
build/check-cuda/resources.json. Widths are read from the machine code where cuobjdump and nvdisasm are on PATH (pip
install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm), else from PTX.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tokenization.compiler import BuildError, run_compiler
from training.build_ops import CUDA_ARCHITECTURES, SOURCES, cuda_command

OUTPUT = Path("build/check-cuda")


def main() -> None:
    """Check every kernel, or say that there is no compiler; exits 1 where a kernel fails."""
    if shutil.which("nvcc") is None:
        print("check-cuda: nvcc is not on PATH; no CUDA kernel was compiled or checked")
        return
    kernels = [kernel for source in sorted(SOURCES.glob("*.cu")) for kernel in check_source(source)]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "resources.json").write_text("".join(f"{json.dumps(kernel)}\n" for kernel in kernels))
    problems = [f"{kernel['kernel']} for sm_{kernel['sm']}: {fault}" for kernel in kernels for fault in faults(kernel)]
    for kernel in kernels:
        print(json.dumps(kernel))
    if problems or not kernels:
        sys.exit("\n".join(["error: check-cuda", *problems]))


def check_source(source: Path) -> list[dict[str, Any]]:
    """Compile a source for every architecture and measure its kernels."""
    directory = OUTPUT / source.stem
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{source.stem}.o"
    keep = ["--keep", f"--keep-dir={directory}", "-Xptxas=-v", "-Werror=all-warnings"]
    said = run_compiler([*cuda_command(), *keep, "-c", str(source), "-o", str(target)])
    return [
        {"kernel": name, "sm": sm, **resources_of(said, name=name, sm=sm), **widths}
        for sm in CUDA_ARCHITECTURES
        for name, widths in widths_of(directory, target, sm=sm).items()
    ]


def faults(kernel: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel."""
    wrong = [f"{name} must be 0, got {kernel[name]}" for name in ("stack", "spilled") if kernel[name] != 0]
    is_unaligned = "9UnalignedE" in kernel["kernel"]
    widths = [] if is_unaligned else [("loads", kernel["loads"]), ("stores", kernel["stores"])]
    return wrong + [
        f"some global {name} must be 16 bytes wide, got {found}" for name, found in widths if 16 not in found
    ]


def resources_of(said: str, *, name: str, sm: int) -> dict[str, int]:
    """Registers, and bytes of static shared memory, stack and spills, from ptxas's report."""
    report = said.split(f"Compiling entry function '{name}' for 'sm_{sm}'")[1].split("Compiling entry function")[0]

    def number(pattern: str) -> int:
        return sum(int(value) for value in re.findall(pattern, report))

    return {
        "registers": number(r"Used (\d+) registers"),
        "static_shared": number(r"(\d+) bytes smem"),
        "stack": number(r"(\d+) bytes stack frame"),
        "spilled": number(r"(\d+) bytes spill"),
    }


def widths_of(directory: Path, target: Path, *, sm: int) -> dict[str, dict[str, Any]]:
    """Per kernel, how many instructions load and store global memory and load from shared memory, by their bytes."""
    if shutil.which("cuobjdump") and shutil.which("nvdisasm"):
        code = run_compiler(["cuobjdump", "-sass", f"-arch=sm_{sm}", str(target)])
        found, read_from, width = r"Function : (\S+)(.*?)(?=Function : |\Z)", "SASS", _sass_bytes
        patterns = {"loads": r"\bLDG\S*", "stores": r"\bSTG\S*", "shared_loads": r"\bLDS\S*"}
    else:
        code = next(directory.glob(f"*compute_{sm}*.ptx")).read_text()
        found, read_from, width = r"\.entry (\w+)\((.*?)^}", "PTX", _ptx_bytes
        patterns = {"loads": r"\bld\.global\S*", "stores": r"\bst\.global\S*", "shared_loads": r"\bld\.shared\S*"}
    return {
        name: {key: dict(Counter(map(width, re.findall(pattern, body)))) for key, pattern in patterns.items()}
        | {"read_from": read_from}
        for name, body in re.findall(found, code, flags=re.DOTALL | re.MULTILINE)
    }


def _sass_bytes(instruction: str) -> int:
    match = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", instruction)
    return int(match[1]) // 8 if match else 4


def _ptx_bytes(instruction: str) -> int:
    vector, bits = re.search(r"\.v([24])\.", instruction), re.search(r"\.[busf](\d+)$", instruction)
    assert bits is not None
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"error: {error}")
