"""Rates and MFU of a run's step times, and the peak that a device is measured to have."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from synthetic_shards import train_config
from torch.utils._python_dispatch import TorchDispatchMode

from training import hardware
from training.hardware import measured_peak_flops, peak_memory_bytes
from training.progress import Speed, StepCosts
from training.ranks import Ranks

CPU = torch.device("cpu")


def test_rates_are_means_over_the_steps_of_a_line(tmp_path: Path) -> None:
    config = train_config(tmp_path, shards=tmp_path, model__window_size=1, noise={}, engine__peak_tflops=0.002)
    speed = Speed(config, ranks=Ranks(rank=0, world_size=2, device=CPU))
    rates = speed.rates([StepCosts(step_s=step_s, data_wait_s=wait_s) for step_s, wait_s in [(0.3, 0.0), (0.1, 0.02)]])
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


class _Device(TorchDispatchMode):
    """A device with its own clock: 10^11 FLOP/s in products of 512, half of it in others, the first a second late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.products: list[tuple[int, torch.dtype]] = []
        self.now_s = 0.0
        monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.mm.default:
            return func(*args, **(kwargs or {}))
        size = len(args[0])
        self.now_s += 2.0 * size**3 / (1e11 if size == 512 else 0.5e11) + (0.0 if self.products else 1.0)
        self.products.append((size, args[0].dtype))
        return torch.empty_like(args[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_the_fastest_product_and_found_in_a_second(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    with _Device(monkeypatch) as device:
        assert measured_peak_flops(CPU, dtype=dtype) == pytest.approx(1e11)
    assert {dtype_of_product for _, dtype_of_product in device.products} == {dtype}
    assert device.now_s < 1.0 + 1.0  # a slow start is not in it, and does not end the search at the smallest product


def test_memory_counts_what_the_process_has_held() -> None:
    before = peak_memory_bytes(CPU)
    held = torch.ones(before // 4 + 50_000_000)
    assert peak_memory_bytes(CPU) >= held.numel() * 4
