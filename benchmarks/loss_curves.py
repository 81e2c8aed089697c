"""Losses of 200 steps of one small model, by full logits and not; JSON lines, and a figure of the curves over another.

`full`: the reference on full logits in plain torch; `chunked`: what training does, in eight chunks; `stride 4`: offsets
>= 1 scored at every fourth position. Two yardsticks, both of full logits: `other order`, the samples of each batch
backwards, is the same but for rounding; `other noise` has another seed of the noise. Same first weights, same samples,
float32 or float64, AdamW; a noisy ramp of 64 codes, most of which can be predicted. One process; minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from training import cross_entropy
from training.config import TrainConfig
from training.engine import parameter_groups
from training.inputs import Inputs, make_inputs
from training.loss import WindowLoss, reference_window_loss, window_loss
from training.scored import draw_phases, score_predictions
from training.tensorar import TensorAR, build_model

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from synthetic_shards import NUM_CLASSES, codes_of

NUM_STEPS, BATCH, CODEBOOK_SIZE, CODES_PER_SIDE, WINDOW_SIZE = 200, 16, 64, 8, 4
WAYS: dict[str, dict[str, int]] = {
    "full": {"stride": 0},
    "chunked": {"stride": 1},
    "stride 4": {"stride": 4},
    "other order": {"stride": 0, "order": -1},
    "other noise": {"stride": 0, "seed": 1},
}
"""Stride 0 is the reference."""
NUM_LAST = 20
VALIDATION_STEP = 10**6


def config_of(seed: int) -> TrainConfig:
    """The run; nothing of it is read or written."""
    return TrainConfig(
        kind="train",
        run_dir="unused",
        data={"shards": "unused"},
        num_steps=NUM_STEPS,
        seed=seed,
        model={
            "num_layers": 3,
            "num_heads": 4,
            "model_dim": 128,
            "codebook_size": CODEBOOK_SIZE,
            "codes_per_side": CODES_PER_SIDE,
            "num_classes": NUM_CLASSES,
            "window_size": WINDOW_SIZE,
            "dropout": 0.0,
        },
    )


def inputs_of(config: TrainConfig, *, step: int, order: int = 1) -> Inputs:
    """The batch of a step: samples that no other step reads."""
    counters_B = (np.arange(BATCH, dtype=np.int64) + step * BATCH)[::order].copy()
    num_codes = CODES_PER_SIDE**2
    codes = [
        codes_of(int(index), num_views=1, codebook_size=CODEBOOK_SIZE, num_codes=num_codes)[0] for index in counters_B
    ]
    return make_inputs(
        np.stack(codes).astype(np.int64),
        counters_B % NUM_CLASSES,
        counters_B,
        config=config,
        step=step,
        label_dropout=0.1,
        device=torch.device("cpu"),
    )


def loss_of(model: TensorAR, inputs: Inputs, *, stride: int, seed: int, step: int) -> WindowLoss:
    """The loss of a step, by full logits or scored at a stride."""
    if stride == 0:
        return reference_window_loss(model(inputs.windows_BTK, inputs.labels_B), inputs.codes_BT)
    phases = draw_phases(
        window_size=WINDOW_SIZE, stride=stride, seed=seed, step=step, sample_counters_B=inputs.counters_B
    )
    scored = score_predictions(inputs.codes_BT, window_size=WINDOW_SIZE, stride=stride, phases_BK=phases)
    return window_loss(model, inputs.windows_BTK, inputs.labels_B, scored=scored)


def train(*, dtype: torch.dtype, stride: int, seed: int = 0, order: int = 1) -> tuple[list[float], dict[str, Any]]:
    """Loss of every step, and what it came to: the end of training, held-out samples scored exactly, time."""
    config = config_of(seed)
    torch.manual_seed(0)
    model = build_model(config.model).to(dtype)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.05), lr=1e-3, betas=(0.9, 0.95))
    losses, began = [], time.perf_counter()
    for step in range(1, NUM_STEPS + 1):
        result = loss_of(model, inputs_of(config, step=step, order=order), stride=stride, seed=seed, step=step)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.loss.detach()))
    seconds = time.perf_counter() - began
    return losses, {
        "mean_of_last_steps": sum(losses[-NUM_LAST:]) / NUM_LAST,
        "held_out_loss_of_offset": held_out(model).tolist(),
        "s": round(seconds, 1),
    }


def held_out(model: TensorAR) -> Tensor:
    """Exact losses of the offsets over 16 batches that no step read, the same for every way."""
    config = config_of(0)
    model.eval()
    with torch.no_grad():
        losses = [
            loss_of(model, inputs_of(config, step=VALIDATION_STEP + index), stride=1, seed=0, step=0).loss_of_offset_K
            for index in range(16)
        ]
    return torch.stack(losses).mean(0)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Write the curves as a PNG."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    styles = {"full": ("C0", "-", 3.0), "chunked": ("C1", "--", 1.2), "stride 4": ("C2", "-", 0.9)}
    for way, (colour, line, width) in styles.items():
        axes.plot(range(1, NUM_STEPS + 1), curves[way], color=colour, linestyle=line, linewidth=width, label=way)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Train each way, print a line for each, compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="`full` comes first.")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="float64 tells rounding.")
    parser.add_argument("--figure", type=Path, help="PNG to write.")
    options = parser.parse_args()
    num_rows = BATCH * CODES_PER_SIDE**2 * WINDOW_SIZE
    cross_entropy.CPU_CHUNK_BYTES = num_rows * CODEBOOK_SIZE * cross_entropy.bytes_per_logit(torch.float32) // 8
    curves: dict[str, list[float]] = {}
    for way in options.ways:
        curves[way], result = train(dtype=getattr(torch, options.dtype), **WAYS[way])
        differences = [abs(a - b) for a, b in zip(curves[way], curves["full"], strict=True)]
        offset_0, *others = result["held_out_loss_of_offset"]
        line = {"way": way, "held_out_loss_of_offset_0": offset_0}
        line["largest_difference_to_step"] = {step: max(differences[:step]) for step in (1, 10, 50, 100, NUM_STEPS)}
        line |= {"held_out_mean_loss": (offset_0 + sum(others)) / WINDOW_SIZE}
        print(json.dumps(line | result), flush=True)
    if options.figure:
        draw(curves, options.figure)


if __name__ == "__main__":
    main()
