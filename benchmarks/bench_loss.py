"""The output side of a training step three ways: full logits, chunks of them, and chunks of a sample of the offsets.

`full` is the reference in plain torch (logits, float32 cross-entropy, autograd), `chunked` the op that training uses,
`stride 4` the same with every fourth position scored at offsets >= 1. Part `head`: normed states -> loss and both
gradients. Part `output`: backbone states -> output decoder, norm, head, loss and all gradients. Ways alternate in one
process, medians are given; peak memory is that of a process of its own for each, over what it held before. JSON lines.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import ModelConfig
from training.cross_entropy import HeadLoss, wide_dtype
from training.loss import reference_window_loss, window_loss
from training.scored import Scored, draw_phases, score_predictions
from training.tensorar import TensorAR

WINDOW_SIZE = 4
STRIDES = {"chunked": 1, "stride 4": 4}
WAYS = ("full", *STRIDES)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a step's output side works on."""

    name: str
    dim: int
    heads: int
    codebook_size: int
    codes_per_side: int
    batch: int
    rounds: int


SHAPES = (
    Shape(name="LlamaGen-B", dim=768, heads=12, codebook_size=16384, codes_per_side=16, batch=4, rounds=3),
    Shape(name="demo", dim=192, heads=6, codebook_size=512, codes_per_side=8, batch=24, rounds=15),
    Shape(name="tiny T 64", dim=256, heads=8, codebook_size=64, codes_per_side=8, batch=16, rounds=25),
    Shape(name="tiny T 256", dim=256, heads=8, codebook_size=64, codes_per_side=16, batch=8, rounds=25),
)
MEMORY_BATCH = 16


class Output:
    """Backbone states, true codes and a model to score them with; only its output side is used."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype, batch: int) -> None:
        torch.manual_seed(0)
        config = ModelConfig(
            num_layers=1,
            num_heads=shape.heads,
            model_dim=shape.dim,
            codebook_size=shape.codebook_size,
            codes_per_side=shape.codes_per_side,
            window_size=WINDOW_SIZE,
        )
        self.model = TensorAR(config).to(dtype)
        torch.nn.init.normal_(self.model.base.output.weight, std=0.02)
        self.h_BTD = torch.randn(batch, config.num_positions, shape.dim).to(dtype).requires_grad_()
        self.codes_BT = torch.randint(shape.codebook_size, self.h_BTD.shape[:2])
        self.states_BRD = self.h_BTD

        self.scored = {way: self._score(stride) for way, stride in STRIDES.items()}

    def prepare(self, part: str, way: str) -> None:
        """Make the states that the way reads in the part."""
        if part == "head":
            batch, num_positions, dim = self.h_BTD.shape
            num_states = WINDOW_SIZE * num_positions if way == "full" else len(self.scored[way].offsets_R)
            states = torch.randn(batch, num_states, dim)
            self.states_BRD = states.to(self.h_BTD.dtype).requires_grad_()

    def take(self, part: str, way: str) -> None:
        """One forward and backward."""
        if way == "full":
            h, predict = self._logits(part)
            reference_window_loss(predict(h), self.codes_BT).loss.backward()
        else:
            scored = self.scored[way]
            window_loss(partial(self._read, part), self.codes_BT, self.codes_BT, scored=scored).loss.backward()
        for leaf in (self.h_BTD, self.states_BRD, *self.model.parameters()):
            leaf.grad = None

    def _logits(self, part: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if part == "output":
            return self.h_BTD, self.model.predict
        logits_shape = (*self.codes_BT.shape, WINDOW_SIZE, -1)
        return self.states_BRD, lambda states: F.linear(states, self.model.base.output.weight).view(logits_shape)

    def _read(self, part: str, _: Tensor, __: Tensor, *, scored: Scored, readout: Any) -> HeadLoss:
        if part == "output":
            result: HeadLoss = self.model.predict(self.h_BTD, scored=scored, readout=readout)
        else:
            result = readout(self.states_BRD, self.model.base.output.weight)
        return result

    def _score(self, stride: int) -> Scored:
        samples = torch.arange(len(self.codes_BT))
        phases = draw_phases(window_size=WINDOW_SIZE, stride=stride, seed=0, step=1, sample_counters_B=samples)
        return score_predictions(self.codes_BT, window_size=WINDOW_SIZE, stride=stride, phases_BK=phases)


def time_ways(output: Output, part: str, *, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way, taken in turn."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way in WAYS:
            output.prepare(part, way)
            began = time.perf_counter()
            output.take(part, way)
            times[way].append(time.perf_counter() - began)
    return {way: 1000 * statistics.median(values[1:]) for way, values in times.items()}


def peak_bytes(shape: Shape, part: str, way: str, dtype: torch.dtype) -> int:
    """Most resident memory of one forward and backward over that before it; for a fresh process."""
    small = Output(SHAPES[-1], dtype=dtype, batch=1)
    small.prepare(part, way)
    small.take(part, way)  # what torch sets up once
    output = Output(shape, dtype=dtype, batch=MEMORY_BATCH)
    output.prepare(part, way)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status_bytes("VmRSS")
    output.take(part, way)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_times(shape: Shape, part: str, dtype: torch.dtype) -> None:
    """Print times and their ratios."""
    times = time_ways(Output(shape, dtype=dtype, batch=shape.batch), part, rounds=shape.rounds)
    line = {"shape": shape.name, "part": part, "dtype": str(dtype).removeprefix("torch."), "batch": shape.batch}
    line |= {f"{way}_ms": round(value, 2) for way, value in times.items()}
    line |= {f"{way} over full": round(times[way] / times["full"], 3) for way in STRIDES}
    print(json.dumps(line), flush=True)


def measure_memory(shape: Shape, part: str, dtype: torch.dtype) -> None:
    """Print the peak of each way beside the bytes of the logits alone."""
    num_logits = MEMORY_BATCH * shape.codes_per_side**2 * WINDOW_SIZE * shape.codebook_size
    line = {"shape": shape.name, "part": part, "dtype": str(dtype).removeprefix("torch."), "batch": MEMORY_BATCH}
    line |= {"logits_mb": num_logits * dtype.itemsize // 10**6}
    line |= {"float32_logits_mb": num_logits * wide_dtype(dtype).itemsize // 10**6}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # freed memory goes back at once
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for way in WAYS:
        with context.Pool(1) as pool:
            peaks[way] = pool.apply(peak_bytes, (shape, part, way, dtype))
    line |= {f"{way}_peak_mb": peak // 10**6 for way, peak in peaks.items()}
    line |= {f"full over {way}": round(peaks["full"] / peaks[way], 1) for way in STRIDES}
    print(json.dumps(line), flush=True)


def main() -> None:
    """Print a line for every shape, part and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("times", "memory"), default=("times", "memory"))
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    options = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        for part in ("head", "output"):
            for shape in SHAPES:
                if "times" in options.what and shape.name in options.shapes:
                    measure_times(shape, part, dtype)
            if "memory" in options.what and SHAPES[0].name in options.shapes:
                measure_memory(SHAPES[0], part, dtype)


if __name__ == "__main__":
    main()
