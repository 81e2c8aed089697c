"""SIGKILL of training ranks at any moment, a save's too: the rerun ends in the same losses, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_shards import train_config, write_shard_set

from training.checkpoint import list_checkpoints, verify_checkpoint
from training.config import TrainConfig
from training.metrics import read_metrics

SCRIPT = Path(__file__).parents[1] / "run_training.py"
PURE_FIELDS = ("step", "split", "loss", "loss_of_offset", "accuracy_of_offset", "grad_norm")
NUM_STEPS = 24


def start(config: TrainConfig) -> subprocess.Popen[bytes]:
    spec = Path(config.run_dir).with_suffix(".json")
    spec.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, spec]
    log = spec.with_suffix(".log").open("ab")
    return subprocess.Popen(
        [str(part) for part in command], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
    )


def ranks_of(torchrun: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [int(child) for child in children]


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool], *, whole_job: bool, rank: int = 1) -> None:
    """SIGKILL one rank, or torchrun and all ranks, as soon as `is_time`."""
    deadline = time.monotonic() + 250
    while not is_time():
        assert process.poll() is None, "the run ended before its kill"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    ranks = ranks_of(process)
    for victim in [process.pid, *ranks] if whole_job else [ranks[rank]]:
        os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=90) != 0


def measured(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in PURE_FIELDS} for line in read_metrics(run_dir)]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_training_ends_in_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set")
    changes = {"num_steps": NUM_STEPS, "checkpoint__every_n_steps": 6, "cluster__launcher": "torchrun"}
    uninterrupted = train_config(tmp_path / "uninterrupted", shards=shards, **changes)
    assert start(uninterrupted).wait(timeout=280) == 0

    run_dir = tmp_path / "killed"
    config = train_config(run_dir, shards=shards, **changes)
    partial = run_dir / "checkpoints"

    def has_taken(step: int) -> Callable[[], bool]:
        return lambda: any(line["step"] >= step for line in read_metrics(run_dir))

    def is_saving(step: int) -> Callable[[], bool]:
        return lambda: (partial / f"step_{step:08d}.partial" / "engine").exists()

    kill_when(start(config), has_taken(3), whole_job=False, rank=1)  # before the first checkpoint
    kill_when(start(config), is_saving(6), whole_job=True)
    kill_when(start(config), has_taken(9), whole_job=False, rank=0)
    kill_when(start(config), is_saving(18), whole_job=False, rank=1)
    assert all(verify_checkpoint(path) == [] for path in list_checkpoints(run_dir))
    assert start(config).wait(timeout=280) == 0

    assert [line["step"] for line in measured(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert measured(run_dir) == measured(tmp_path / "uninterrupted")
    assert sorted(path.name for path in partial.iterdir()) == ["step_00000018", "step_00000024"]
