"""What a rank's device can do and what the run takes of it: the peak rate of matrix products, memory, repeatable sums.

The peak is measured, not looked up: the best of a few square products in the dtype of the run, under a second in all
(but for the start of a CUDA device, which a run needs anyway).
Vendors' peaks are higher; give `engine.peak_tflops` to compare runs with published MFU.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_BUDGET_S = 0.4
_LEAST_S = 0.02
"""A product that takes less than this is repeated until it does not: its start costs too much of it."""


def measured_peak_flops(device: torch.device, *, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest square matrix product, of those that `_BUDGET_S` is enough to try."""
    best, left_s = 0.0, _BUDGET_S
    for size in _SIZES:
        left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        _seconds_of_products(left, right, count=1)  # the first on a CUDA device loads its library, for a second or so
        one_s = _seconds_of_products(left, right, count=1)
        count = max(1, round(_LEAST_S / one_s))
        all_s = _seconds_of_products(left, right, count=count)
        best = max(best, count * 2.0 * size**3 / all_s)
        left_s -= 2 * one_s + all_s
        if 3 * 8 * one_s > left_s:  # each size takes eight times as long as the one before
            break
    return best


@contextmanager
def repeatable_kernels(device: torch.device) -> Iterator[None]:
    """Have a step take kernels that give the same bits each time, where torch has others that are faster.

    On CUDA attention's backward adds up in any order otherwise, and a run that resumes would not be the run that was
    not stopped. It holds forward and backward: attention chooses its kernel in forward, and what is computed again or
    was compiled there must find the same choice. An operation without such a kernel is an error. On a CPU there is
    nothing to choose.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    was_repeatable, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # every element is written anyway
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_repeatable)
        settings.fill_uninitialized_memory = fills


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: allocated by torch on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024  # macOS counts in bytes


def _seconds_of_products(left: torch.Tensor, right: torch.Tensor, *, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        product = left @ right
    product[0, 0].item()  # waits for the device
    return time.perf_counter() - began
