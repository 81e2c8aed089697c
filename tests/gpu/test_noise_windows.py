"""noise_windows on a CUDA device against the reference on the CPU, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training import noise, ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("coupling", ["independent", "shared"])
@pytest.mark.parametrize(
    ("batch", "positions", "window_size"),
    [(64, 256, 4), (8, 1024, 8), (3, 7, 5), (683, 1, 3), (2, 300, 256), (1, 2**15, 2), (0, 16, 4)],
)
def test_the_device_writes_the_windows_of_the_reference(
    batch: int, positions: int, window_size: int, coupling: Any
) -> None:
    codes = torch.randint(0, 16384, (batch, positions))
    arguments: dict[str, Any] = {
        "betas": (0.0, *(j / window_size for j in range(1, window_size))),
        "codebook_size": 16384,
        "coupling": coupling,
        "seed": 2**55 + 3,
        "step": 2**31 + 7,
        "sample_counters_B": torch.randint(0, 2**62, (batch,)),
    }
    want = noise.noise_windows(codes, **arguments)
    assert torch.equal(ops.noise_windows(codes.cuda(), **arguments).cpu(), want)
    unaligned = torch.cat([torch.zeros(1, dtype=torch.int64), codes.flatten()]).cuda()[1:].view(batch, positions)
    assert torch.equal(ops.noise_windows(unaligned, **arguments).cpu(), want)


def test_the_kernel_runs_on_the_current_stream() -> None:
    codes = torch.randint(0, 50, (64, 256), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        codes.fill_(7)
        windows = ops.noise_windows(
            codes,
            betas=(0.0, 0.0),
            codebook_size=50,
            coupling="shared",
            seed=0,
            step=1,
            sample_counters_B=torch.arange(64, device="cuda"),
        )
    stream.synchronize()
    assert bool((windows[:, :-1] == 7).all())
