"""SIGKILL of training ranks at any moment, a save's too: the rerun ends in the same losses and the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_shards import train_config, write_shard_set

from pipeline.config import S3Config
from pipeline.local_storage import LocalStorage
from training.checkpoint import list_checkpoints, read_record, verify_checkpoint
from training.config import TrainConfig
from training.metrics import read_metrics
from training.run_weights import find_run_checkpoint

SCRIPT = Path(__file__).parents[1] / "run_training.py"
PURE_FIELDS = ("step", "split", "loss", "loss_of_offset", "accuracy_of_offset", "grad_norm")
NUM_STEPS = 60
NUM_KILLS = 5
EVERY_N_STEPS = 4


def start(config: TrainConfig, *, num_ranks: int = 2) -> subprocess.Popen[bytes]:
    spec = Path(config.run_dir).with_suffix(".json")
    spec.write_text(config.model_dump_json())
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    with spec.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *ranks, str(SCRIPT), str(spec)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )


def finish(config: TrainConfig, *, num_ranks: int = 2) -> None:
    log = Path(config.run_dir).with_suffix(".log")
    assert start(config, num_ranks=num_ranks).wait(timeout=280) == 0, log.read_text()[-3000:]


def ranks_of(torchrun: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [int(child) for child in children]


def kill_when(process: subprocess.Popen[bytes], is_time: Callable[[], bool], *, victim: str) -> None:
    """SIGKILL rank "0" or "1", or torchrun and "all" ranks, as soon as `is_time`."""
    deadline = time.monotonic() + 250
    while not is_time():
        assert process.poll() is None, "the run ended before its kill"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    ranks = ranks_of(process)
    for pid in [process.pid, *ranks] if victim == "all" else [ranks[int(victim)]]:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=90) != 0


def measured(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in PURE_FIELDS} for line in read_metrics(run_dir) if line["split"] == "train"]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in measured(run_dir)]


def is_saving(run_dir: Path, after_step: int) -> Callable[[], bool]:
    """Whether a checkpoint of a step from `after_step` on is being written; or has been, where that was too quick."""

    def is_time() -> bool:
        names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
        steps = [int(name.removeprefix("step_").partition(".")[0]) for name in names]
        saving = [step for step, name in zip(steps, names, strict=True) if name.endswith(".partial")]
        return any(step >= after_step for step in saving) or any(step >= after_step + 4 for step in steps)

    return is_time


def has_taken(run_dir: Path, step: int, *, pause_s: float) -> Callable[[], bool]:
    def is_time() -> bool:
        if not any(line["step"] >= step for line in read_metrics(run_dir)):
            return False
        time.sleep(pause_s)
        return True

    return is_time


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [
        pytest.param(2, "bfloat16", marks=pytest.mark.soak),
        (3, "float32"),
        pytest.param(1, "bfloat16", marks=pytest.mark.soak),
        pytest.param(1, "float32", marks=pytest.mark.soak),
        pytest.param(2, "float32", marks=pytest.mark.soak),
        pytest.param(3, "bfloat16", marks=pytest.mark.soak),
    ],
)
def test_training_killed_five_times_ends_like_an_uninterrupted_one(tmp_path: Path, zero_stage: int, dtype: str) -> None:
    shards = write_shard_set(tmp_path / "set")
    changes = {
        "num_steps": NUM_STEPS,
        "checkpoint__every_n_steps": EVERY_N_STEPS,
        "cluster__launcher": "torchrun",
        "engine__zero_stage": zero_stage,
        "engine__dtype": dtype,
        "optimizer__ema_decay": 0.9,
        "model__dropout": 0.1,
    }
    uninterrupted = train_config(tmp_path / "uninterrupted", shards=shards, **changes)
    finish(uninterrupted)

    run_dir = tmp_path / "killed"
    config = train_config(run_dir, shards=shards, **changes)
    draw = random.Random(f"{zero_stage} {dtype}")
    for kill in range(NUM_KILLS):
        step = 10 * kill + draw.randrange(2, 10)
        is_during_save = kill % 2 == 1
        moment = is_saving(run_dir, step) if is_during_save else has_taken(run_dir, step, pause_s=0.03 * draw.random())
        kill_when(start(config), moment, victim=draw.choice(["0", "1", "all"]))
        storage = LocalStorage(run_dir)
        assert all(verify_checkpoint(storage, step) == [] for step in list_checkpoints(storage))
    finish(config)

    assert [line["step"] for line in measured(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert measured(run_dir) == measured(tmp_path / "uninterrupted")
    ends = [read_record(LocalStorage(path), NUM_STEPS) for path in (run_dir, tmp_path / "uninterrupted")]
    assert ends[0].kinds == ("weights", "exp_avg", "exp_avg_sq", "ema")
    assert ends[0].files == ends[1].files  # their hashes: weights, moments and averages are the same bytes
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step_00000056", "step_00000060"]


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_other_world_sizes_and_stages_go_on_with_the_same_losses(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set")
    changes = {
        "engine__dtype": "float32",
        "model__dropout": 0.0,
        "optimizer__ema_decay": 0.9,
        "optimizer__schedule": "constant",  # of num_steps, which grows here
        "optimizer__learning_rate": 1e-3,  # Adam turns the rounding of a vanishing gradient into a share of it
        "cluster__launcher": "torchrun",
    }

    def train(name: str, num_steps: int, *, num_ranks: int, zero_stage: int) -> Path:
        run_dir = tmp_path / name
        finish(
            train_config(run_dir, shards=shards, num_steps=num_steps, engine__zero_stage=zero_stage, **changes),
            num_ranks=num_ranks,
        )
        return run_dir

    expected = train("whole", 12, num_ranks=2, zero_stage=2)
    chains = {
        "stage 2, ranks 2 1 2": [(2, 2), (1, 2), (2, 2)],
        "stage 3, ranks 2 1 2": [(2, 3), (1, 3), (2, 3)],
        "stage 2 3 1, ranks 1 2 2": [(1, 2), (2, 3), (2, 1)],
        "stage 3, ranks 1 2": [(1, 3), (2, 3), (2, 3)],
    }
    for name, parts in chains.items():
        for num_steps, (num_ranks, zero_stage) in zip((4, 8, 12), parts, strict=True):
            run_dir = train(name, num_steps, num_ranks=num_ranks, zero_stage=zero_stage)
        assert losses(run_dir) == pytest.approx(losses(expected), abs=1e-5), name
        found, wanted = averages(run_dir), averages(expected)
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-6, name


def averages(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_run_checkpoint(str(run_dir), s3=S3Config())
    assert checkpoint is not None
    return checkpoint.read_weights(use_ema=True)
