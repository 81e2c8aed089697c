"""A training step of TensorAR against one of its base model: time beside the FLOPs that are counted.

`python benchmarks/bench_tensorar_step.py`: LlamaGen-B's width with 2 and 4 blocks, T 256, 16,384 codes, batch 2, k = 4;
forward, loss, backward and torch's fused AdamW, no DeepSpeed; the models take their steps in turn in one process. One
JSON line a dtype: medians of seconds, both ratios, and both at B's 12 blocks, where time is read off the line through
the two depths. `--ops reference` computes in plain torch; dropout is off.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from training.config import ModelConfig
from training.flops import model_flops_per_sample
from training.loss import window_loss
from training.scored import score_predictions
from training.tensorar import TensorAR, build_model

DEPTHS = (2, 4)
FULL_DEPTH = 12
BASE, WINDOWED = 1, 4
"""Window sizes."""


def config_of(*, num_layers: int, window_size: int) -> ModelConfig:
    """B with fewer blocks."""
    shape = {"num_layers": num_layers, "num_heads": 12, "model_dim": 768}
    return ModelConfig(**shape, window_size=window_size, dropout=0.0)


class Steps:
    """A model and its optimiser, in bfloat16 with AdamW's states in bfloat16 too: the same for both models."""

    def __init__(self, config: ModelConfig, *, batch_size: int, dtype: torch.dtype, ops: str) -> None:
        torch.manual_seed(0)
        self.model: TensorAR = build_model(config).to(dtype)
        if ops == "native":
            self.model.use_native_ops()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.codes = torch.randint(config.codebook_size, (batch_size, config.num_positions))
        self.windows = torch.randint(config.codebook_size, (*self.codes.shape, config.window_size))
        self.labels = torch.randint(config.num_classes, (batch_size,))
        self.scored = score_predictions(self.codes, window_size=config.window_size)

    def take(self) -> float:
        """Take one step and return its seconds."""
        began = time.perf_counter()
        window_loss(self.model, self.windows, self.labels, scored=self.scored).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def measure(options: argparse.Namespace, *, dtype: str) -> dict[str, Any]:
    """Seconds of a step for both models at both depths, and what is counted."""
    seconds: dict[tuple[int, int], float] = {}
    for depth in DEPTHS:
        steps = {
            size: Steps(
                config_of(num_layers=depth, window_size=size),
                batch_size=options.batch_size,
                dtype=getattr(torch, dtype),
                ops=options.ops,
            )
            for size in (BASE, WINDOWED)
        }
        times = [{size: step.take() for size, step in steps.items()} for _ in range(options.num_steps + 1)][1:]
        seconds |= {(depth, size): statistics.median(time[size] for time in times) for size in steps}
    low, high = DEPTHS
    for size in (BASE, WINDOWED):
        of_a_block = (seconds[high, size] - seconds[low, size]) / (high - low)
        seconds[FULL_DEPTH, size] = seconds[high, size] + (FULL_DEPTH - high) * of_a_block
    flops = {
        (depth, size): model_flops_per_sample(
            config_of(num_layers=depth, window_size=size), micro_batch_size=options.batch_size
        )
        for depth, size in seconds
    }
    result: dict[str, Any] = {"dtype": dtype, "ops": options.ops, "batch_size": options.batch_size}
    for depth in (*DEPTHS, FULL_DEPTH):
        of_time, of_flops = (each[depth, WINDOWED] / each[depth, BASE] for each in (seconds, flops))
        result[f"blocks_{depth}"] = {
            "base_s": round(seconds[depth, BASE], 3),
            "tensorar_s": round(seconds[depth, WINDOWED], 3),
            "time_ratio": round(of_time, 3),
            "flops_ratio": round(of_flops, 3),
            "time_over_flops": round(of_time / of_flops, 3),
        }
    return result


def main() -> None:
    """Print one JSON line a dtype."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ops", choices=["native", "reference"], default="native")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in options.dtypes:
        print(json.dumps(measure(options, dtype=dtype)), flush=True)


if __name__ == "__main__":
    main()
