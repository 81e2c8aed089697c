"""noise_windows on a CUDA device: the native op, plain torch, and a copy of the same bytes, in one run; JSON lines.

`make bench-gpu`. Codes of 16,384 entries, exponential schedule. Medians of 100 timings by CUDA events.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from timing import median_us

from training import noise, ops
from training.config import NoiseConfig

SHAPES = [(64, 256, 4), (8, 1024, 8), (1024, 1024, 8)]


def main() -> None:
    """Print one JSON line per shape and coupling."""
    for batch, positions, window_size in SHAPES:
        codes = torch.randint(0, 16384, (batch, positions), device="cuda")
        out = torch.empty(batch, positions, window_size, dtype=torch.int64, device="cuda")
        for coupling in ("independent", "shared"):
            arguments: dict[str, Any] = {
                "betas": noise.beta_of_offset(NoiseConfig(), window_size=window_size),
                "codebook_size": 16384,
                "coupling": coupling,
                "seed": 1,
                "step": 7,
                "sample_counters_B": torch.arange(batch, device="cuda"),
            }
            native = median_us(lambda arguments=arguments, codes=codes: ops.noise_windows(codes, **arguments))
            reference = median_us(lambda arguments=arguments, codes=codes: noise.noise_windows(codes, **arguments))
            filled = median_us(lambda out=out: out.fill_(1))
            line = {
                "device": torch.cuda.get_device_name(),
                "shape": [batch, positions, window_size],
                "coupling": coupling,
                "native_us": round(native, 1),
                "reference_us": round(reference, 1),
                "fill_us": round(filled, 1),
                "reference_over_native": round(reference / native, 2),
                "native_over_fill": round(native / filled, 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
