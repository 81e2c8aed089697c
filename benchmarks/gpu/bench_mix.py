"""mix_windows on a CUDA device: our kernels, torch's own part by part, and a copy, in one run; JSON lines.

`make bench-gpu`. 32 samples of 255 windows, k = 4, 16,384 codes, bfloat16, at the sizes of the models; windows in the
parts that `attend_windows` takes. Medians of 100 timings by CUDA events (20 of torch's). Bytes as in
benchmarks/count_step.py: rows read, N D numbers a window written, in backward read, and the table's gradient.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from training.config import SIZES, ModelConfig
from training.mixing import CACHE_BYTES, mix_backward_by_torch, mix_by_torch
from training.ops import check_ops

NUM_WINDOWS, SIZE, CODEBOOK_SIZE, WIDTH = 32 * 255, 4, 16384, 2


def median_us(function: Callable[[], Any], *, num_turns: int) -> float:
    """Median time of a call on the device."""
    times = []
    for turn in range(num_turns + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        function()
        ended.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(1000 * began.elapsed_time(ended))
    return statistics.median(times)


def measure(name: str) -> dict[str, Any]:
    """Times of one size of model."""
    config = ModelConfig(size=name, window_size=SIZE)  # type: ignore[arg-type]
    heads, dim = config.heads, config.dim
    of_a_part = max(1, CACHE_BYTES // (heads * dim * WIDTH))
    parts = torch.randint(CODEBOOK_SIZE, (NUM_WINDOWS, SIZE), device="cuda").split(of_a_part)
    table = torch.randn(CODEBOOK_SIZE, dim, device="cuda", dtype=torch.bfloat16)
    weights = (table, torch.randn(SIZE, dim, device="cuda"), torch.randn(heads, dim, device="cuda") / dim**0.5)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    grads = torch.randn(of_a_part, heads, dim, device="cuda", dtype=torch.bfloat16)
    shares = [torch.ops.tensorar.mix_windows(part, *weights)[1] for part in parts]

    def forward(mix: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: [mix(part, *weights) for part in parts][-1]

    def backward(mix_backward: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: [
            mix_backward(grads[: len(part)], kept, part, *weights, *sums)
            for part, kept in zip(parts, shares, strict=True)
        ]

    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = {
        "forward": median_us(forward(torch.ops.tensorar.mix_windows), num_turns=100),
        "backward": median_us(backward(torch.ops.tensorar.mix_windows_backward), num_turns=100),
        "torch_forward": median_us(forward(mix_by_torch), num_turns=20),
        "torch_backward": median_us(backward(mix_backward_by_torch), num_turns=20),
        "copy": median_us(lambda: target.copy_(source), num_turns=100),
    }
    rows, mixed = NUM_WINDOWS * SIZE * dim * WIDTH, NUM_WINDOWS * heads * dim * WIDTH
    of_copy = 2 * source.nbytes / us["copy"]
    return {
        "device": torch.cuda.get_device_name(),
        "size": name,
        "parts": len(parts),
        **{f"{step}_us": round(value, 1) for step, value in us.items()},
        "forward_of_copy_bandwidth": round((rows + mixed) / us["forward"] / of_copy, 3),
        "backward_of_copy_bandwidth": round((rows + mixed + CODEBOOK_SIZE * dim * WIDTH) / us["backward"] / of_copy, 3),
        "torch_over_native": round((us["torch_forward"] + us["torch_backward"]) / (us["forward"] + us["backward"]), 2),
    }


def main() -> None:
    """Print one JSON line per size of model."""
    check_ops(with_cuda=True)
    for name in SIZES:
        print(json.dumps(measure(name)), flush=True)


if __name__ == "__main__":
    main()
