"""A step of the whole engine against the bare model's forward, backward and torch AdamW on the same batch.

`python benchmarks/bench_step.py`: one rank, d 512, 8 blocks, T 64, batch 16, float32 and bfloat16; the two steps
alternate in one process. Under `torchrun --nproc-per-node 2` the ranks take both steps together, each its own batch,
the bare one without any exchange. JSON lines: medians, the median of the ratios, and the parts of the engine's step.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from training.config import DType, TrainConfig
from training.engine import Engine, build_engine, parameter_groups, take_step
from training.inputs import Inputs, make_inputs
from training.loss import window_loss
from training.ranks import Ranks, join_ranks, leave_ranks
from training.scored import score_predictions
from training.tensorar import TensorAR, build_model

LOCAL_BATCH_SIZE = 16
NUM_WARMUP = 2


def config_of(options: argparse.Namespace, *, dtype: DType, world_size: int) -> TrainConfig:
    """The run that both steps belong to; nothing of it is read or written."""
    return TrainConfig(
        kind="train",
        run_dir="unused",
        data={"shards": "unused"},
        num_steps=1000,
        model={
            "num_layers": options.num_layers,
            "num_heads": 8,
            "model_dim": 512,
            "codebook_size": 4096,
            "codes_per_side": options.codes_per_side,
            "window_size": 4,
        },
        engine={
            "zero_stage": options.zero_stage,
            "dtype": dtype,
            "global_batch_size": LOCAL_BATCH_SIZE * world_size,
        },
    )


class Batches:
    """The batch of each step, the same for both."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        random = np.random.default_rng(ranks.rank)
        shape = (LOCAL_BATCH_SIZE, config.model.num_positions)
        self.codes = random.integers(0, config.model.codebook_size, shape)
        self.labels = random.integers(0, config.model.num_classes, LOCAL_BATCH_SIZE)
        self.counters = np.arange(LOCAL_BATCH_SIZE, dtype=np.int64) + ranks.rank * LOCAL_BATCH_SIZE

    def inputs(self, step: int) -> Inputs:
        """Windows, labels and codes of a step."""
        return make_inputs(
            self.codes,
            self.labels,
            self.counters,
            config=self.config,
            step=step,
            label_dropout=self.config.model.label_dropout,
            device=self.ranks.device,
        )


def loss_of(model: Engine | TensorAR, inputs: Inputs) -> torch.Tensor:
    """The training loss, every prediction scored."""
    scored = score_predictions(inputs.codes_BT, window_size=inputs.windows_BTK.shape[2])
    return window_loss(model, inputs.windows_BTK, inputs.labels_B, scored=scored).loss


def engine_step(engine: Engine, batches: Batches, parts: dict[str, list[float]]) -> Callable[[int], None]:
    """The step of the loop: inputs, forward, loss, backward with its reduction, update."""

    @contextmanager
    def timed(name: str) -> Any:
        began = time.perf_counter()
        yield
        parts.setdefault(name, []).append(time.perf_counter() - began)

    def take(step: int) -> None:
        with timed("inputs"):
            inputs = batches.inputs(step)
        with timed("forward"):
            loss = loss_of(engine, inputs)
        with timed("backward"):
            engine.backward(loss)
        with timed("update"):
            take_step(engine, may_update=True)

    return take


def bare_step(model: TensorAR, config: TrainConfig, batches: Batches) -> Callable[[int], None]:
    """Forward and backward of the model and torch's fused AdamW; in bfloat16 with float32 master weights."""
    inputs = batches.inputs(1)
    masters = [parameter.detach().float().clone() for parameter in model.parameters()]
    is_low = config.engine.dtype == "bfloat16"
    model.to(getattr(torch, config.engine.dtype))
    rates = {"lr": config.optimizer.learning_rate, "betas": config.optimizer.betas, "fused": True}
    groups = parameter_groups(model, weight_decay=config.optimizer.weight_decay)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if is_low:
        of_parameter = dict(zip(model.parameters(), masters, strict=True))
        groups = [group | {"params": [of_parameter[p] for p in group["params"]]} for group in groups]
    optimized = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, **rates)

    def take(_: int) -> None:
        loss_of(model, inputs).backward()
        if is_low:
            for master, parameter in zip(optimized, parameters, strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
        optimizer.step()
        if is_low:
            with torch.no_grad():
                torch._foreach_copy_(parameters, optimized)
        model.zero_grad()

    return take


def measure(options: argparse.Namespace, ranks: Ranks, *, dtype: DType) -> dict[str, Any]:
    """Medians in ms of both steps, taken in turn, and of the parts of the engine's."""
    config = config_of(options, dtype=dtype, world_size=ranks.world_size)
    batches = Batches(config, ranks)
    parts: dict[str, list[float]] = {}
    torch.manual_seed(0)
    bare = bare_step(build_model(config.model), config, batches)
    engine = engine_step(build_engine(build_model(config.model), config=config, ranks=ranks), batches, parts)
    times: dict[str, list[float]] = {"bare": [], "engine": []}
    for step in range(1, NUM_WARMUP + options.num_steps + 1):
        for name, take in (("bare", bare), ("engine", engine)):
            ranks.barrier()
            began = time.perf_counter()
            take(step)
            times[name].append(time.perf_counter() - began)
    medians = {name: 1000 * statistics.median(values[NUM_WARMUP:]) for name, values in (times | parts).items()}
    ratios = [engine / bare for bare, engine in zip(times["bare"], times["engine"], strict=True)]
    return {
        "dtype": dtype,
        "zero_stage": options.zero_stage,
        "world_size": ranks.world_size,
        "num_positions": config.model.num_positions,
        **{f"{name}_ms": round(value, 1) for name, value in medians.items()},
        "engine_over_bare": round(statistics.median(ratios[NUM_WARMUP:]), 3),
    }


def main() -> None:
    """Print one JSON line per dtype."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--codes-per-side", type=int, default=8)
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    ranks = join_ranks()
    for dtype in options.dtypes:
        result = measure(options, ranks, dtype=dtype)
        if ranks.is_first:
            print(json.dumps(result), flush=True)
    leave_ranks(ranks)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
