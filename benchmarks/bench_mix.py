"""The input encoder's attention, forward and backward: native op, reference, and plain torch as written first.

`python benchmarks/bench_mix.py`: d 768, 12 heads, k = 4, 16,384 codes, float32 and bfloat16, 2,048 and 8,192 windows,
one and two threads, in turn in one process. JSON lines: medians in ms; `mix_windows` alone, in the parts that it is
called with, against its least bytes at the copy bandwidth measured beside it; peak bytes of all tensors beyond the
inputs, over the bytes of the outputs (for forward and backward: values and all gradients).

Least bytes of `mix_windows`: K rows of the table read in forward and in backward, N D numbers a window written and
their gradient read, the table's gradient written once in float32.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_encoder import PlainEncoder
from torch.profiler import ProfilerActivity, profile

from training.mixing import WINDOWS_AT_A_TIME, attend_windows, reference_attend_windows
from training.ops import load_ops

DIM, HEADS, SIZE, CODEBOOK_SIZE = 768, 12, 4, 16384


def peak_bytes(take: Callable[[], object]) -> int:
    """The most that CPU tensors held at once beyond what there was before, by torch's own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = take()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most


def medians_ms(steps: dict[str, Callable[[], object]], *, num_repeats: int) -> dict[str, float]:
    """Of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(num_repeats + 1):
        for name, take in steps.items():
            began = time.perf_counter()
            take()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def measure(*, num_windows: int, dtype: torch.dtype, num_threads: int, num_repeats: int) -> dict[str, Any]:
    """Times and memory of one case."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    plain = PlainEncoder(DIM, heads=HEADS, window_size=SIZE, codebook_size=CODEBOOK_SIZE).to(dtype)
    codes = torch.randint(CODEBOOK_SIZE, (num_windows, SIZE))
    leaves = [
        plain.embedding.weight.detach().clone().requires_grad_(),
        plain.offsets.detach().clone().requires_grad_(),
        (torch.randn(HEADS, DIM) * 0.02).to(dtype).requires_grad_(),
        plain.wv.weight.detach().view(HEADS, -1, DIM).clone().requires_grad_(),
    ]
    grad = torch.randn(num_windows, DIM).to(dtype)

    def native() -> object:
        return torch.autograd.grad(attend_windows(codes, *leaves), leaves, grad)

    def reference() -> object:
        return torch.autograd.grad(reference_attend_windows(codes, *leaves), leaves, grad)

    def as_written_first() -> object:
        return torch.autograd.grad(plain(codes), list(plain.parameters()), grad)

    small = [leaves[0].detach(), *(leaf.detach().float() for leaf in leaves[1:3])]
    parts = codes.split(WINDOWS_AT_A_TIME)
    mixed, shares = torch.ops.tensorar.mix_windows(parts[0], *small)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in small]

    def mix_forward() -> None:
        for part in parts:
            torch.ops.tensorar.mix_windows(part, *small)

    def mix_backward() -> None:
        for part in parts:
            torch.ops.tensorar.mix_windows_backward(mixed, shares, part, *small, *sums)

    source = torch.randn(2**25)
    target = torch.empty_like(source)
    steps = {
        "native": native,
        "reference": reference,
        "plain": as_written_first,
        "mix_forward": mix_forward,
        "mix_backward": mix_backward,
        "copy": lambda: target.copy_(source),
    }
    ms = medians_ms(steps, num_repeats=num_repeats)
    copied_per_ms = 2 * source.nbytes / ms["copy"]
    width = leaves[0].element_size()
    keys, mixes = num_windows * SIZE * DIM * width, num_windows * HEADS * DIM * width
    forward_bytes, backward_bytes = keys + mixes, keys + mixes + 4 * CODEBOOK_SIZE * DIM
    attended_bytes = num_windows * DIM * width + sum(leaf.nbytes for leaf in leaves)
    return {
        "windows": num_windows,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": num_threads,
        **{f"{name}_ms": round(value, 2) for name, value in ms.items()},
        "plain_over_native": round(ms["plain"] / ms["native"], 2),
        "reference_over_native": round(ms["reference"] / ms["native"], 2),
        "copy_gb_per_s": round(copied_per_ms / 1e6, 1),
        "mix_of_copy_bandwidth": round(
            (forward_bytes + backward_bytes) / (ms["mix_forward"] + ms["mix_backward"]) / copied_per_ms, 3
        ),
        "native_peak_over_outputs": round(peak_bytes(native) / attended_bytes, 2),
        "plain_peak_over_outputs": round(peak_bytes(as_written_first) / attended_bytes, 2),
        "mix_peak_over_outputs": round(peak_bytes(mix_forward) / (mixed.nbytes + shares.nbytes), 3),
    }


def main() -> None:
    """Print one JSON line a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--num-repeats", type=int, default=7)
    options = parser.parse_args()
    load_ops()
    for num_threads in options.threads:
        for dtype in options.dtypes:
            for num_windows in options.windows:
                case = {"num_windows": num_windows, "dtype": getattr(torch, dtype), "num_threads": num_threads}
                print(json.dumps(measure(**case, num_repeats=options.num_repeats)), flush=True)


if __name__ == "__main__":
    main()
