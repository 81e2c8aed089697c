"""A training run under torchrun with the peak resident memory of every rank, for the benchmarks of this directory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from synthetic_shards import fingerprint_of, write_shard_set

from training.config import TrainConfig
from training.metrics import read_metrics

POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """What a run took."""

    step_bytes: list[int]
    """Peak resident memory of each rank before its first save."""
    peak_bytes: list[int]
    """Peak resident memory of each rank to its end."""
    wall_s: float
    step_s: list[float]
    """Of each step in the metrics of this call."""


def write_codes(directory: Path, *, codebook_size: int, codes_per_side: int, num_samples: int = 64) -> Path:
    """Write a shard set of synthetic codes and return its directory."""
    fingerprint = fingerprint_of(codebook_size=codebook_size, codes_per_side=codes_per_side)
    return write_shard_set(directory, samples_per_shard=(num_samples // 2,) * 2, fingerprint=fingerprint)


def run_ranks(config: TrainConfig, *, num_ranks: int, threads: int = 1) -> MeasuredRun:
    """Train with torchrun and return what it took.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    run_dir = Path(config.run_dir)
    known = len(read_metrics(run_dir))
    with tempfile.TemporaryDirectory() as scratch:
        spec, log = Path(scratch) / "train.yaml", Path(scratch) / "log.txt"
        spec.write_text(config.model_dump_json())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
        began = time.perf_counter()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "-m", "jobs.cli", "run", str(spec)], env=os.environ | variables, stdout=file, stderr=file
            )
            step_peaks, peaks = _watch(process, run_dir / "checkpoints")
        if process.returncode != 0:
            raise RuntimeError(f"run {run_dir}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
    lines = [line for line in read_metrics(run_dir)[known:] if line["split"] == "train"]
    return MeasuredRun(
        step_bytes=step_peaks,
        peak_bytes=peaks,
        wall_s=time.perf_counter() - began,
        step_s=[line["step_s"] for line in lines],
    )


def _watch(process: subprocess.Popen[bytes], checkpoints: Path) -> tuple[list[int], list[int]]:
    """Peak bytes of the ranks before the first change below `checkpoints`, and in all."""
    before: dict[int, int] = {}
    peaks: dict[int, int] = {}
    found = _names(checkpoints)
    while process.poll() is None:
        is_saving = _names(checkpoints) != found
        for pid in _children(process.pid):
            peak = _peak_bytes(pid)
            peaks[pid] = max(peak, peaks.get(pid, 0))
            if not is_saving:
                before[pid] = peaks[pid]
        time.sleep(POLL_S)
    return [before[pid] for pid in sorted(peaks)], [peaks[pid] for pid in sorted(peaks)]


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def train_config(run_dir: Path, *, shards: Path, **sections: Any) -> TrainConfig:
    """Return a spec of a few steps under torchrun; `sections` are laid over it."""
    spec: dict[str, Any] = {
        "kind": "train",
        "run_dir": str(run_dir),
        "data": {"shards": str(shards)},
        "num_steps": 3,
        "log_every_n_steps": 1,
        "checkpoint": {"every_n_steps": 1000, "background": False},
        "cluster": {"launcher": "torchrun"},
    }
    return TrainConfig.model_validate(spec | sections)
