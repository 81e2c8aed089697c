"""Sampling: a cached step of k = 4 against one of k = 1, the cache against none, batches, speculation and stride.

`python benchmarks/bench_sampling.py`: JSON lines. What is compared takes its steps in turn in one process; `step` is
LlamaGen-B (d 768, 12 blocks, 16,384 codes) with random weights, and says where the time goes: medians in ms of one
step, and of its parts alone. Times are seconds of the process's own CPU time over one thread, so that neighbours
on the machine count less. `batch`, `speculation` and `stride` sample a small model; with `--weights` (a run
or a file of ours) that one, and only then do their calls an image mean anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.config import ModelConfig, SamplerConfig
from training.drawing import Draws, draw_cells, gumbel_draws, predicted_cells
from training.frozen import FrozenModel
from training.gpt import KeyValueCache, evaluation_mode
from training.sampling import SampledCodes, sample_codes
from training.steps import Stepping
from training.tensorar import TensorAR, build_model
from training.weights import load_model

FULL = {"size": "B", "codebook_size": 16384, "codes_per_side": 16}
SMALL = {"num_layers": 6, "num_heads": 6, "model_dim": 192, "codebook_size": 512, "codes_per_side": 8}
STD = 0.05
CLOCK = time.process_time


def random_model(shape: dict[str, Any], *, window_size: int, dtype: torch.dtype) -> TensorAR:
    """A model with random weights in all its parts."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**shape, window_size=window_size)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=STD)
    model.use_native_ops()
    return model


def medians_ms(actions: dict[str, Callable[[], object]], *, num_repeats: int) -> dict[str, float]:
    """Median time of each action, the actions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(num_repeats + 1):
        for name, act in actions.items():
            began = CLOCK()
            act()
            times[name].append(CLOCK() - began)
    return {name: round(1000 * statistics.median(values[1:]), 3) for name, values in times.items()}


def parts_of(model: TensorAR, *, batch_size: int, guidance: float) -> dict[str, Callable[[], object]]:
    """The parts of a step at position 128."""
    frozen = FrozenModel(model, num_windows=batch_size * model.config.num_positions)
    window_size, codebook_size = model.config.window_size, model.config.codebook_size
    rows = batch_size * (1 + (guidance != 1.0))
    cache = KeyValueCache(model.config, batch_size=rows, dtype=frozen.dtype, device=frozen.device)
    windows = torch.randint(codebook_size, (batch_size, 1, window_size))
    x = torch.randn(rows, 1, model.config.dim).to(frozen.dtype)
    decoder = model.output_decoder
    states = x[:, :, None] if decoder is None else decoder(x)
    logits = model.base.head(states[:batch_size])[:, 0].float()
    config, counters = SamplerConfig(guidance=guidance), torch.arange(batch_size)
    cells = predicted_cells(config, window_size=window_size)
    positions, streams = torch.arange(window_size) + 128, torch.arange(window_size)
    draw = {"seed": 0, "sample_counters_B": counters}
    tabled = FrozenModel(model, num_windows=10**6)
    parts: dict[str, Callable[[], object]] = {
        "embed_by_tables": lambda: tabled.embed_windows(windows, start=128),
        "make_frozen": lambda: FrozenModel(model, num_windows=1),
        "embed": lambda: frozen.embed_windows(windows, start=128),
        "backbone": lambda: frozen.read(x, start=128, cache=cache),
        "head": lambda: model.base.head(states),
        "gumbels": lambda: gumbel_draws(
            **draw, positions_J=positions, streams_J=streams, codebook_size=codebook_size, ops="native"
        ),
        "draw": lambda: draw_cells(logits, cells, Draws(0, counters, torch.full_like(counters, 128), "native")),
    }
    if decoder is not None:
        parts["make_tables"] = lambda: FrozenModel(model, num_windows=10**6)
        parts["decoder"] = lambda: decoder(x, constants=frozen._constants)
    return parts


def measure_step(*, dtype: torch.dtype, batch_size: int, guidance: float, num_repeats: int) -> dict[str, Any]:
    """A step of k = 4 and one of k = 1, and their parts."""
    models = {k: random_model(FULL, window_size=k, dtype=dtype) for k in (1, 4)}
    labels, counters = torch.arange(batch_size), torch.arange(batch_size)
    config = SamplerConfig(guidance=guidance, draft_policy="coupled")
    with evaluation_mode(models[1]), evaluation_mode(models[4]):
        samplers = {
            f"k{k}": Stepping(FrozenModel(model, num_windows=2**13), labels, counters, config=config, seed=0)
            for k, model in models.items()
        }
        steps = medians_ms({name: made.advance for name, made in samplers.items()}, num_repeats=num_repeats)
        parts = {
            f"k{k}_parts_ms": medians_ms(parts_of(model, batch_size=batch_size, guidance=guidance), num_repeats=21)
            for k, model in models.items()
        }
    return {
        "bench": "step",
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "guidance": guidance,
        "num_steps": num_repeats,
        **{f"{name}_ms": value for name, value in steps.items()},
        "k4_over_k1": round(steps["k4"] / steps["k1"], 3),
        **parts,
    }


def sample_uncached(model: TensorAR, labels: Tensor, *, config: SamplerConfig) -> Tensor:
    """Codes (N, T) as a sampler without a cache makes them: the whole sequence again at every step; unguided."""
    num_positions, window_size = model.config.num_positions, model.config.window_size
    windows = labels.new_zeros(len(labels), num_positions + window_size, window_size)
    with evaluation_mode(model):
        for step in range(num_positions):
            x = torch.cat([model.base.embed_labels(labels), model.embed_windows(windows[:, :step])], dim=1)
            logits = model.predict(model.base.backbone(x)[:, -1:])[:, 0].float()
            inside = min(window_size, num_positions - step)
            draws = Draws(0, torch.arange(len(labels)), torch.full_like(labels, step))
            cells = predicted_cells(config, window_size=inside)
            windows[:, step, :inside] = draw_cells(logits[:, :inside], cells, draws)
    return windows[:, :num_positions, 0]


def seconds(act: Callable[[], object], *, num_repeats: int = 1) -> float:
    """Median seconds."""
    return medians_ms({"it": act}, num_repeats=num_repeats)["it"] / 1000


def measure_cache(*, window_size: int, batch_size: int) -> dict[str, Any]:
    """The small model at T 256: our sampler, and the same model without a cache."""
    shape = SMALL | {"codes_per_side": 16}
    model = random_model(shape, window_size=window_size, dtype=torch.float32)
    config, labels = SamplerConfig(guidance=1.0), torch.arange(batch_size)
    made = {
        "cached": lambda: sample_codes(model, labels, config=config, seed=0).codes_NT,
        "uncached": lambda: sample_uncached(model, labels, config=config),
    }
    same = bool(torch.equal(made["cached"](), made["uncached"]()))
    ms = medians_ms(made, num_repeats=1)
    return {
        "bench": "cache",
        "window_size": window_size,
        "batch_size": batch_size,
        "same_codes": same,
        **{f"{name}_s": round(value / 1000, 2) for name, value in ms.items()},
        "uncached_over_cached": round(ms["uncached"] / ms["cached"], 1),
    }


def measure_dial(
    model: TensorAR, *, num_samples: int, batch_size: int, policy: str, guidance: float, dial: str, values: list[int]
) -> list[dict[str, Any]]:
    """Calls and seconds an image for values of `windows_per_call` or `stride`, the first value being the baseline."""
    labels = torch.arange(num_samples) % model.config.num_classes

    def sample(value: int) -> SampledCodes:
        config = SamplerConfig(guidance=guidance, **{"draft_policy": policy, dial: value})  # type: ignore[arg-type]
        return sample_codes(model, labels, config=config, seed=0, batch_size=batch_size)

    made = {value: sample(value) for value in values}
    ms = medians_ms({str(value): lambda value=value: sample(value) for value in values}, num_repeats=3)  # type: ignore[misc]
    lines = []
    for value in values:
        calls = made[value].calls_per_sample_N.double().mean().item()
        differing = made[value].codes_NT != made[values[0]].codes_NT
        lines.append(
            {
                "bench": dial,
                dial: value,
                "window_size": model.config.window_size,
                "draft_policy": policy,
                "guidance": guidance,
                "batch_size": batch_size,
                "num_samples": num_samples,
                "calls_per_image": round(calls, 2),
                "calls_over_plain": round(calls / model.config.num_positions, 3),
                "s_per_image": round(ms[str(value)] / 1000 / num_samples, 4),
                "time_over_first": round(ms[str(value)] / ms[str(values[0])], 3),
                "codes_differ": round(differing.double().mean().item(), 4),
                "flip_rate": made[value].flip_rate,
            }
        )
    return lines


def measure_batches(model: TensorAR, *, batch_sizes: list[int]) -> list[dict[str, Any]]:
    """Images a second over batch sizes, the first being the baseline."""
    lines: list[dict[str, Any]] = []
    for size in batch_sizes:
        labels = torch.arange(size) % model.config.num_classes
        spent_s = seconds(lambda: sample_codes(model, labels, config=SamplerConfig(), seed=0))  # noqa: B023
        images_per_s = size / spent_s
        first = lines[0]["images_per_s"] if lines else images_per_s
        lines.append(
            {
                "bench": "batch",
                "window_size": model.config.window_size,
                "batch_size": size,
                "images_per_s": round(images_per_s, 3),
                "over_first": round(images_per_s / first, 2),
            }
        )
    return lines


def main() -> None:
    """Print one JSON line a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=["step", "cache", "batch", "windows_per_call", "stride"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--weights")
    parser.add_argument("--policies", nargs="+", default=["coupled", "sampled", "argmax"])
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    small = random_model(SMALL, window_size=4, dtype=torch.float32)
    model = small if options.weights is None else load_model(options.weights)[0]
    model.use_native_ops()

    def show(line: dict[str, Any]) -> None:
        print(json.dumps(line | {"threads": options.threads, "weights": options.weights}), flush=True)

    for dtype in options.dtypes if "step" in options.only else ():
        for guidance in options.guidances:
            case = {"dtype": getattr(torch, dtype), "batch_size": 8, "guidance": guidance}
            show(measure_step(**case, num_repeats=options.num_steps))
    for window_size in (1, 4) if "cache" in options.only else ():
        show(measure_cache(window_size=window_size, batch_size=4))
    for line in measure_batches(model, batch_sizes=[1, 2, 4, 8, 16, 32, 64]) if "batch" in options.only else ():
        show(line)
    for dial, values in (("windows_per_call", [1, 2, 4, 8]), ("stride", [1, 2, 4])):
        for policy in options.policies if dial in options.only else ():
            usable = [value for value in values if dial != "stride" or value <= model.config.window_size]
            case = {"num_samples": options.num_samples, "batch_size": options.batch_size, "guidance": 2.0}
            for line in measure_dial(model, **case, policy=policy, dial=dial, values=usable):
                show(line)


if __name__ == "__main__":
    main()
