"""`tensorar plan`'s estimate of a rank's memory beside the measured one, over models, stages and ranks; JSON lines.

Each line is a run of three steps under torchrun: the peak resident memory of its ranks before the first save, and the
estimate over the largest of them. The first line is a run of next to no model, the estimate's `process`. Two cores and
4 GB of memory; three minutes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from measured_run import run_ranks, train_config, write_codes

from training.config import TrainConfig
from training.plan import PROCESS_BYTES, estimate_memory

TINY = {"model_dim": 32, "num_layers": 1, "codebook_size": 64, "codes_per_side": 4, "num_heads": 2}
WIDE = {"model_dim": 1024, "num_layers": 8, "codebook_size": 1024, "codes_per_side": 4}
DEEP = {"model_dim": 512, "num_layers": 12, "codebook_size": 4096}
CASES: tuple[tuple[int, dict[str, Any], dict[str, Any]], ...] = (
    (1, TINY, {"zero_stage": 2, "micro_batch_size": 1}),
    (1, WIDE, {"zero_stage": 1, "micro_batch_size": 1}),
    (2, WIDE, {"zero_stage": 2, "micro_batch_size": 1}),
    (2, WIDE, {"zero_stage": 3, "micro_batch_size": 1}),
    (2, DEEP, {"zero_stage": 2, "micro_batch_size": 4}),
    (1, DEEP, {"zero_stage": 1, "micro_batch_size": 8, "dtype": "float32"}),
    (2, DEEP | {"model_dim": 768, "num_layers": 6}, {"zero_stage": 3, "micro_batch_size": 2}),
    (1, WIDE | {"codes_per_side": 16}, {"zero_stage": 3, "micro_batch_size": 4, "activation_checkpointing": True}),
)
"""Ranks, model and engine of each run."""


def main() -> None:
    """Run every case and print its line."""
    with tempfile.TemporaryDirectory() as scratch:
        for number, (num_ranks, model, engine) in enumerate(CASES):
            _run(_config(Path(scratch) / str(number), model, engine, num_ranks=num_ranks), num_ranks=num_ranks)


def _config(directory: Path, model: dict[str, Any], engine: dict[str, Any], *, num_ranks: int) -> TrainConfig:
    model = {"num_heads": 8, "codes_per_side": 16, "num_classes": 100, "window_size": 4} | model
    shards = write_codes(
        directory / "set", codebook_size=model["codebook_size"], codes_per_side=model["codes_per_side"]
    )
    engine = engine | {"global_batch_size": num_ranks * engine["micro_batch_size"]}
    return train_config(directory / "run", shards=shards, model=model, engine=engine)


def _run(config: TrainConfig, *, num_ranks: int) -> None:
    engine = config.engine
    estimate = estimate_memory(config, world_size=num_ranks, zero_stage=engine.zero_stage, device="cpu")
    run = run_ranks(config, num_ranks=num_ranks)
    line = {
        "model_dim": config.model.dim,
        "num_layers": config.model.layers,
        "codebook_size": config.model.codebook_size,
        "codes": config.model.num_positions,
        "ranks": num_ranks,
        "zero_stage": engine.zero_stage,
        "dtype": engine.dtype,
        "micro_batch_size": engine.micro_batch_size,
        "activation_checkpointing": engine.activation_checkpointing,
        "measured_bytes": run.step_bytes,
        "estimated_bytes": estimate.peak,
        "process_bytes": PROCESS_BYTES["cpu"],
        "estimate_over_measured": estimate.peak / max(run.step_bytes),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
