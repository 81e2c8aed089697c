"""The largest model that this machine trains: LlamaGen-XL with TensorAR, ZeRO-3 on two ranks, then one; JSON lines.

    python benchmarks/scale_xl.py --dir /tmp/xl          # XL: 19 GB of memory, 30 GB of disk, about an hour on 2 cores
    python benchmarks/scale_xl.py --dir /tmp/b --size B  # the same road in minutes

Five real steps on synthetic shards, saved; resumed on one rank for one more; exported. Memory per rank is the peak
resident set beside `tensorar plan`'s estimate. MALLOC_MMAP_THRESHOLD_ is fixed, so that freed memory goes back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measured_run import MeasuredRun, run_ranks, train_config, write_codes

from training.config import TrainConfig
from training.metrics import read_metrics
from training.plan import checkpoint_bytes, estimate_memory, num_parameters

MMAP_THRESHOLD_BYTES = 256 * 1024
NUM_STEPS = 5
TINY = {"num_layers": 2, "num_heads": 2, "model_dim": 64}


def main() -> None:
    """Run all parts and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="Where shards and run go; must not exist.")
    parser.add_argument("--size", default="XL", help="LlamaGen's name of a size, or tiny.")
    parser.add_argument("--ranks", type=int, default=2, help="Of the first part; the second has one.")
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_THRESHOLD_BYTES)
    arguments.dir.mkdir(parents=True)
    codebook_size, side = (64, 4) if arguments.size == "tiny" else (16384, 16)
    shards = write_codes(arguments.dir / "set", codebook_size=codebook_size, codes_per_side=side)
    model = TINY if arguments.size == "tiny" else {"size": arguments.size}
    model |= {"codebook_size": codebook_size, "codes_per_side": side, "num_classes": 1000, "window_size": 4}
    run_dir = arguments.dir / "run"
    _train(_config(run_dir, shards, model, num_steps=NUM_STEPS), what="train", num_ranks=arguments.ranks)
    _train(_config(run_dir, shards, model, num_steps=NUM_STEPS + 1), what="resume on one rank", num_ranks=1)
    _export(run_dir, arguments.dir / "model.safetensors")


def _config(run_dir: Path, shards: Path, model: dict[str, Any], *, num_steps: int) -> TrainConfig:
    engine = {"zero_stage": 3, "dtype": "bfloat16", "global_batch_size": 2, "micro_batch_size": 1}
    return train_config(
        run_dir, shards=shards, model=model, engine=engine | {"activation_checkpointing": True}, num_steps=num_steps
    )


def _train(config: TrainConfig, *, what: str, num_ranks: int) -> None:
    estimate = estimate_memory(config, world_size=num_ranks, zero_stage=3, device="cpu", has_heap=False)
    _say(
        what=f"plan: {what}",
        ranks=num_ranks,
        parameters=num_parameters(config.model),
        estimated_peak_bytes=estimate.peak,
        checkpoint_bytes=checkpoint_bytes(config),
    )
    run: MeasuredRun = run_ranks(config, num_ranks=num_ranks, threads=max(1, (os.cpu_count() or 1) // num_ranks))
    lines = [line for line in read_metrics(Path(config.run_dir)) if line["split"] == "train"]
    _say(
        what=what,
        ranks=num_ranks,
        step=lines[-1]["step"],
        losses=[line["loss"] for line in lines],
        peak_bytes_before_saving=run.step_bytes,
        peak_bytes=run.peak_bytes,
        estimate_over_measured=estimate.peak / max(run.step_bytes),
        step_s=run.step_s,
        wall_s=run.wall_s,
    )


def _export(run_dir: Path, output: Path) -> None:
    began = time.perf_counter()
    command = [sys.executable, "-m", "jobs.cli", "export", str(run_dir), "--to", "safetensors", "--output", str(output)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    _say(what="export", wall_s=time.perf_counter() - began, file_bytes=output.stat().st_size)


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
