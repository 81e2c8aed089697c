"""noise_windows on the CPU: the native op, the reference, the obvious torch noising, and what bounds it; JSON lines.

`python benchmarks/bench_noise.py`. The obvious noising draws with torch's generator: `rand`, `randint` and `where` over
unfolded codes. The bound is the time of the op's draws alone (independent: one an element at offsets >= 1; shared: one
a position) plus that of writing as many bytes, both by loops of their own in the same instruction set. All take turns
in one process, with the memory settings of training ranks; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import noise, ops
from training.build_ops import build_library
from training.config import NoiseConfig

CODEBOOK_SIZE = 16384
MEMORY_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
SHAPES = [(64, 256, 4), (8, 1024, 8)]


def obvious(codes_BT: Tensor, betas_K: Tensor) -> Tensor:
    """Noised windows without counters."""
    windows_BTK = torch.nn.functional.pad(codes_BT, (0, len(betas_K) - 1)).unfold(1, len(betas_K), 1)
    is_replaced = torch.rand(windows_BTK.shape) < betas_K
    return torch.where(is_replaced, torch.randint(0, CODEBOOK_SIZE, windows_BTK.shape), windows_BTK)


def medians_us(functions: dict[str, Callable[[], Any]], *, num_turns: int) -> dict[str, float]:
    """Median time of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(num_turns + 5):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn >= 5:
                times[name].append(time.perf_counter() - began)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def measure(batch: int, positions: int, window_size: int, *, coupling: Any, num_turns: int) -> dict[str, Any]:
    """Times and ratios of one shape."""
    codes = torch.randint(0, CODEBOOK_SIZE, (batch, positions))
    betas = noise.beta_of_offset(NoiseConfig(), window_size=window_size)
    betas_K = torch.tensor(betas)
    arguments: dict[str, Any] = {
        "betas": betas,
        "codebook_size": CODEBOOK_SIZE,
        "coupling": coupling,
        "seed": 1,
        "step": 7,
        "sample_counters_B": torch.arange(batch),
    }
    windows = ops.noise_windows(codes, **arguments)
    num_draws = batch * (positions * (window_size - 1) if coupling == "independent" else positions + window_size - 1)
    us = medians_us(
        {
            "native": lambda: ops.noise_windows(codes, **arguments),
            "reference": lambda: noise.noise_windows(codes, **arguments),
            "obvious": lambda: obvious(codes, betas_K),
            "philox": lambda: torch.ops.tensorar_ceilings.philox(num_draws),
            "write": lambda: torch.ops.tensorar_ceilings.write(windows),
        },
        num_turns=num_turns,
    )
    bound = us["philox"] + us["write"]
    return {
        "shape": [batch, positions, window_size],
        "coupling": coupling,
        "threads": torch.get_num_threads(),
        **{f"{name}_us": round(value, 1) for name, value in us.items()},
        "obvious_over_native": round(us["obvious"] / us["native"], 2),
        "reference_over_native": round(us["reference"] / us["native"], 2),
        "native_over_bound": round(us["native"] / bound, 2),
        "draws_per_ns": round(num_draws / us["philox"] / 1000, 2),
        "written_gb_per_s": round(windows.nbytes / us["write"] / 1000, 1),
    }


def main() -> None:
    """Print one JSON line per number of threads, shape and coupling."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-turns", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None:  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MEMORY_SETTINGS)
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "ceilings.so"
        build_library([Path(__file__).parent / "native" / "ceilings.cpp"], library)
        torch.ops.load_library(library)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for coupling in ("independent", "shared"):
                print(json.dumps(measure(*shape, coupling=coupling, num_turns=options.num_turns)), flush=True)


if __name__ == "__main__":
    main()
