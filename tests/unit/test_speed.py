"""Rates and MFU of a run's step times, and the peak that a device is measured to have."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_shards import train_config
from torch.utils._python_dispatch import TorchDispatchMode

from training.hardware import measured_peak_flops, peak_memory_bytes
from training.progress import Speed, StepCosts
from training.ranks import Ranks

CPU = torch.device("cpu")


def test_rates_are_means_over_the_steps_of_a_line(tmp_path: Path) -> None:
    config = train_config(tmp_path, shards=tmp_path, model__window_size=1, noise={}, engine__peak_tflops=0.002)
    speed = Speed(config, ranks=Ranks(rank=0, world_size=2, device=CPU))
    rates = speed.rates(
        [StepCosts(step_s=step_s, data_wait_s=wait_s, num_replaced=0) for step_s, wait_s in [(0.3, 0.0), (0.1, 0.02)]]
    )
    # 2 blocks of D 32 and 256 hidden, 16 positions, 16 codes: multiply-adds of a sample's forward.
    flops_of_sample = 6 * (2 * 16 * (4 * 32 * 32 + 3 * 32 * 256 + 2 * 16 * 32) + 16 * 32 * 16)
    assert rates == {
        "step_s": pytest.approx(0.2),
        "samples_per_s": pytest.approx(80.0),
        "tokens_per_s": pytest.approx(80.0 * 16),
        "model_flops_per_s": pytest.approx(80.0 * flops_of_sample),
        "mfu": pytest.approx(80.0 * flops_of_sample / (2 * 0.002e12)),
        "data_wait_s": pytest.approx(0.01),
        "data_wait_share": pytest.approx(0.05),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_measured_in_a_second_and_no_product_beats_it_by_far(dtype: torch.dtype) -> None:
    began = time.perf_counter()
    peak = measured_peak_flops(CPU, dtype=dtype)
    assert time.perf_counter() - began < 5.0  # a second on an idle machine
    left = torch.ones(512, 512, dtype=dtype)
    began = time.perf_counter()
    for _ in range(4):
        left @ left
    assert peak > 0.2 * 4 * 2 * 512**3 / (time.perf_counter() - began)


class _SlowStart(TorchDispatchMode):
    """Products whose first takes a second, as a CUDA device's does, which loads the library first."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            if not self.sizes:
                time.sleep(1.0)
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_a_slow_start_does_not_end_the_search_for_the_peak_at_the_smallest_product() -> None:
    with _SlowStart() as products:
        measured_peak_flops(CPU, dtype=torch.float32)
    assert len(set(products.sizes)) > 1


def test_memory_counts_what_the_process_has_held() -> None:
    before = peak_memory_bytes(CPU)
    held = torch.ones(before // 4 + 50_000_000)
    assert peak_memory_bytes(CPU) >= held.numel() * 4
