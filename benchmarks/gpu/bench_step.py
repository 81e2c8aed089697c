"""A training step of TensorAR against one of its base model on a CUDA device: time beside the FLOPs that are counted.

`python benchmarks/gpu/bench_step.py`: all blocks of a model, T 256, 16,384 codes, k = 4, bfloat16, 32 samples: forward,
loss, backward and torch's fused AdamW, no DeepSpeed, dropout off. JSON lines a size and way: medians of a base step and
of a TensorAR step that take turns in one process, the ratio of their times and of their FLOPs, model FLOP/s over
`--peak-tflops`, and the peak memory of either. Ways: `native` and `reference` ops, blocks compiled or not, `stride 4`.
"""

import argparse
import json
import statistics
from typing import Any, Literal

import torch

from training.config import ModelConfig
from training.flops import model_flops_per_sample
from training.loss import window_loss
from training.ops import check_ops
from training.scored import score_predictions
from training.tensorar import TensorAR

H100_TFLOPS = 989.0
WINDOW_SIZE = 4
WAYS: dict[str, dict[str, Any]] = {
    "native": {"ops": "native"},
    "reference": {"ops": "reference"},
    "native, compiled": {"ops": "native", "is_compiled": True},
    "native, compiled, stride 4": {"ops": "native", "is_compiled": True, "stride": 4},
}


class Steps:
    """A model and its optimiser, all in bfloat16."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        ops: Literal["native", "reference"],
        is_compiled: bool = False,
        stride: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.ops = ops
        with torch.device("cuda"):
            self.model = TensorAR(config).bfloat16()
            codes = torch.randint(config.codebook_size, (batch_size, config.num_positions))
            self.windows = torch.randint(config.codebook_size, (*codes.shape, config.window_size))
            self.labels = torch.randint(config.num_classes, (batch_size,))
        if ops == "native":
            self.model.use_native_ops()
        if is_compiled:
            for block in self.model.base.layers:
                block.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.scored = score_predictions(codes, window_size=config.window_size, stride=stride)

    def take(self) -> float:
        """Take one step and return its milliseconds on the device."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        window_loss(self.model, self.windows, self.labels, scored=self.scored, ops=self.ops).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended)

    def peak_bytes(self) -> int:
        """The most memory of a step, beyond weights and states."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.take()
        return torch.cuda.max_memory_allocated() - before


def measure(size: str, way: str, *, options: argparse.Namespace) -> dict[str, Any]:
    """Both models' steps in one way."""
    stride = WAYS[way].get("stride", 1)
    configs = {
        k: ModelConfig.model_validate({"size": size, "window_size": k, "dropout": 0.0}) for k in (1, WINDOW_SIZE)
    }
    steps = {k: Steps(config, batch_size=options.batch_size, **WAYS[way]) for k, config in configs.items()}
    times = [{k: step.take() for k, step in steps.items()} for _ in range(options.num_steps + 3)][3:]
    ms = {k: statistics.median(time[k] for time in times) for k in steps}
    flops = {
        k: options.batch_size
        * model_flops_per_sample(config, micro_batch_size=options.batch_size, scored_stride=stride if k > 1 else 1)
        for k, config in configs.items()
    }
    of_time, of_flops = (each[WINDOW_SIZE] / each[1] for each in (ms, flops))
    return {
        "device": torch.cuda.get_device_name(),
        "size": size,
        "way": way,
        "batch_size": options.batch_size,
        "base_ms": round(ms[1], 2),
        "tensorar_ms": round(ms[WINDOW_SIZE], 2),
        "time_ratio": round(of_time, 3),
        "flops_ratio": round(of_flops, 3),
        "time_over_flops": round(of_time / of_flops, 3),
        **{f"mfu_k{k}": round(flops[k] / ms[k] / 1e9 / options.peak_tflops, 3) for k in ms},
        **{f"peak_gb_k{k}": round(step.peak_bytes() / 1e9, 2) for k, step in steps.items()},
    }


def show_kernels(size: str, *, options: argparse.Namespace) -> None:
    """Print where the time of a native step goes."""
    steps = Steps(ModelConfig.model_validate({"size": size, "window_size": WINDOW_SIZE}), batch_size=32, ops="native")
    for _ in range(3):
        steps.take()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        steps.take()
    print(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))


def main() -> None:
    """Print one JSON line a size and way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["B", "L", "XL"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, default=H100_TFLOPS)
    parser.add_argument("--kernels", action="store_true", help="print the kernels of a native step instead")
    options = parser.parse_args()
    check_ops(with_cuda=True)
    for size in options.sizes:
        if options.kernels:
            show_kernels(size, options=options)
            continue
        for way in options.ways:
            print(json.dumps(measure(size, way, options=options)), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
