"""The input encoder's attention on a CUDA device: its kernels, torch's own part by part, and a copy, in one run.

`python benchmarks/gpu/bench_mix.py`: 32 samples of 255 windows, k = 4, 16,384 codes, at the sizes of the models. JSON
lines. `mix`: our kernels in the parts that `attend_windows` takes (`--part-mib` tries other sizes of these, and
`--common-share` makes that share of the codes one and the same, as an empty background does), torch's kernels, and
least bytes over the copy bandwidth measured beside them: rows read, N D numbers a window written, in backward read, and
the table's gradient, as in benchmarks/count_step.py. `attend`: all of it forward and backward, by the native op, by the
reference, and as written first; peak memory over that of values and gradients. Medians of CUDA events. `--kernels`
prints where the time of the native op goes instead, and its time on a device that is busy before, so that it waits for
no launch.
"""

import argparse
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import copy_bytes_per_us, median_us, peak_bytes

from training import mixing
from training.config import SIZES, ModelConfig
from training.mixing import attend_windows, mix_backward_by_torch, mix_by_torch, reference_attend_windows
from training.ops import check_ops

sys.path.append(str(Path(__file__).parents[1]))
from plain_encoder import PlainEncoder

NUM_WINDOWS, SIZE, CODEBOOK_SIZE = 32 * 255, 4, 16384
BUSY_CYCLES = 10_000_000
"""Some 5 ms: longer than the host takes to launch all kernels of the op."""


def measure_mix(config: ModelConfig, *, part_bytes: int, has_torch: bool, common_share: float = 0.0) -> dict[str, Any]:
    """Times of the kernels, bfloat16."""
    heads, dim, width = config.heads, config.dim, 2
    of_a_part = max(1, part_bytes // (heads * dim * width))
    codes = torch.randint(CODEBOOK_SIZE, (NUM_WINDOWS, SIZE), device="cuda")
    codes[torch.rand(codes.shape, device="cuda") < common_share] = 7
    parts = codes.split(of_a_part)
    table = torch.randn(CODEBOOK_SIZE, dim, device="cuda", dtype=torch.bfloat16)
    weights = (table, torch.randn(SIZE, dim, device="cuda"), torch.randn(heads, dim, device="cuda") / dim**0.5)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    grads = torch.randn(len(parts[0]), heads, dim, device="cuda", dtype=torch.bfloat16)
    shares = [torch.ops.tensorar.mix_windows(part, *weights)[1] for part in parts]

    def forward(mix: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: [mix(part, *weights) for part in parts][-1]

    def backward(mix_backward: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: [
            mix_backward(grads[: len(part)], kept, part, *weights, *sums)
            for part, kept in zip(parts, shares, strict=True)
        ]

    us = {
        "forward": median_us(forward(torch.ops.tensorar.mix_windows), num_turns=40),
        "backward": median_us(backward(torch.ops.tensorar.mix_windows_backward), num_turns=40),
    }
    if has_torch:
        us["torch_forward"] = median_us(forward(mix_by_torch), num_turns=10)
        us["torch_backward"] = median_us(backward(mix_backward_by_torch), num_turns=10)
    rows, mixed = NUM_WINDOWS * SIZE * dim * width, NUM_WINDOWS * heads * dim * width
    of_copy = copy_bytes_per_us()
    return {
        "bench": "mix",
        "part_mib": part_bytes / 2**20,
        "parts": len(parts),
        "common_share": common_share,
        **{f"{step}_us": round(value, 1) for step, value in us.items()},
        "copy_bytes_per_s": round(1e6 * of_copy),
        "forward_of_copy_bandwidth": round((rows + mixed) / us["forward"] / of_copy, 3),
        "backward_of_copy_bandwidth": round((rows + mixed + CODEBOOK_SIZE * dim * width) / us["backward"] / of_copy, 3),
    }


def ways_to_attend(config: ModelConfig, *, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Any]], int]:
    """Forward and backward three ways, and the bytes of values and gradients."""
    heads, dim = config.heads, config.dim
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain = PlainEncoder(dim, heads=heads, window_size=SIZE, codebook_size=CODEBOOK_SIZE).to(dtype)
        codes = torch.randint(CODEBOOK_SIZE, (NUM_WINDOWS, SIZE))
        grad = torch.randn(NUM_WINDOWS, dim).to(dtype)
        score_weight = (torch.randn(heads, dim) * 0.02).to(dtype)
    value_weight = plain.wv.weight.detach().view(heads, -1, dim)
    leaves = [plain.embedding.weight, plain.offsets, score_weight, value_weight]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    ways: dict[str, Callable[[], Any]] = {
        "native": lambda: torch.autograd.grad(attend_windows(codes, *leaves), leaves, grad),
        "reference": lambda: torch.autograd.grad(reference_attend_windows(codes, *leaves), leaves, grad),
        "plain": lambda: torch.autograd.grad(plain(codes), list(plain.parameters()), grad),
    }
    return ways, grad.nbytes + sum(leaf.nbytes for leaf in leaves)


def measure_attend(config: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """Times and peaks of the three ways."""
    ways, outputs = ways_to_attend(config, dtype=dtype)
    us = {name: median_us(take, num_turns=20) for name, take in ways.items()}
    return {
        "bench": "attend",
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_us": round(value, 1) for name, value in us.items()},
        "plain_over_native": round(us["plain"] / us["native"], 2),
        **{f"{name}_peak_over_outputs": round(peak_bytes(take) / outputs, 2) for name, take in ways.items()},
    }


def show_kernels(config: ModelConfig) -> None:
    """Print the kernels of the native op in bfloat16."""
    take = ways_to_attend(config, dtype=torch.bfloat16)[0]["native"]
    waiting_us, busy_us = (median_us(take, num_turns=20, busy_cycles=cycles) for cycles in (0, BUSY_CYCLES))
    print(f"{torch.cuda.get_device_name()}: {waiting_us:.0f} us, {busy_us:.0f} us where it waits for no launch")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        take()
        torch.cuda.synchronize()
    print(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))


def main() -> None:
    """Print JSON lines for each size of model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--part-mib", type=float, nargs="+", default=[mixing.ACCELERATOR_BYTES / 2**20])
    parser.add_argument("--common-share", type=float, nargs="+", default=[0.0])
    parser.add_argument("--kernels", action="store_true", help="print the kernels of the native op instead")
    options = parser.parse_args()
    check_ops(with_cuda=True)
    for name in options.sizes:
        config = ModelConfig(size=name, window_size=SIZE)
        if options.kernels:
            show_kernels(config)
            continue
        of_device = {"device": torch.cuda.get_device_name(), "size": name}
        for index, (mib, share) in enumerate(product(options.part_mib, options.common_share)):
            part_bytes = mixing.ACCELERATOR_BYTES = int(mib * 2**20)
            line = measure_mix(config, part_bytes=part_bytes, has_torch=index == 0, common_share=share)
            line["attend_us"] = measure_attend(config, dtype=torch.bfloat16)["native_us"] if index else None
            print(json.dumps(of_device | line), flush=True)
        mixing.ACCELERATOR_BYTES = int(options.part_mib[0] * 2**20)
        for dtype in (torch.bfloat16, torch.float32):
            print(json.dumps(of_device | measure_attend(config, dtype=dtype)), flush=True)


if __name__ == "__main__":
    main()
