"""Times on a CUDA device, for the benchmarks beside it."""

import statistics
from collections.abc import Callable

import torch


def median_us(function: Callable[[], object], *, num_turns: int = 100, busy_cycles: int = 0) -> float:
    """Median time of a call on the device, by CUDA events, after three calls that do not count.

    Args:
        function: what is timed.
        num_turns: calls that count.
        busy_cycles: for how long the device is kept busy before, so that it does not wait for the host's launches.
    """
    times = []
    for turn in range(num_turns + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if busy_cycles:
            torch.cuda._sleep(busy_cycles)
        began.record()
        function()
        ended.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(1000 * began.elapsed_time(ended))
    return statistics.median(times)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that torch held during a call, beyond what it held before; what the call returns counts."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    del kept
    return most - before


def copy_bytes_per_us() -> float:
    """Bytes read and written in a microsecond by a copy of 256 MiB."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_us(lambda: target.copy_(source))
