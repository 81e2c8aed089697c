"""Images a second of the sampler on a CUDA device, and a cached step of k = 4 against one of k = 1; JSON lines.

`python benchmarks/gpu/bench_sampling.py`: random weights, T 256, 16,384 codes, guidance 2, drafts coupled, bfloat16;
wall-clock seconds of whole batches, the second of two.
"""

import argparse
import json
import time
from typing import Any

import torch

from training.config import ModelConfig, SamplerConfig
from training.sampling import sample_codes
from training.tensorar import TensorAR


def measure(size: str, *, window_size: int, batch_size: int, sampler: SamplerConfig) -> dict[str, Any]:
    """One model and batch."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"size": size, "window_size": window_size})
    with torch.device("cuda"):
        model = TensorAR(config).bfloat16().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        labels = torch.randint(config.num_classes, (batch_size,))
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        sample_codes(model, labels, config=sampler, seed=0)
        torch.cuda.synchronize()
        spent_s = time.perf_counter() - began
    return {
        "device": torch.cuda.get_device_name(),
        "size": size,
        "window_size": window_size,
        "batch_size": batch_size,
        "images_per_s": round(batch_size / spent_s, 2),
        "step_ms": round(1000 * spent_s / config.num_positions, 3),
    }


def main() -> None:
    """Print one JSON line a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["B", "XL"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 128])
    options = parser.parse_args()
    sampler = SamplerConfig(guidance=2.0, draft_policy="coupled")
    for size in options.sizes:
        for batch_size in options.batch_sizes:
            for window_size in (1, 4):
                line = measure(size, window_size=window_size, batch_size=batch_size, sampler=sampler)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
