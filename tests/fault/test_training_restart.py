"""Ranks and nodes that die under a launched run: it starts them again by itself and ends in the same losses."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from synthetic_shards import train_config, write_shard_set
from train_process import finish, has_taken, measured, ranks_below, start, wait_until

from jobs.launch import launch_training
from training.config import TrainConfig

NUM_STEPS = 24
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("corpus") / "set")


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    config = job(shards, tmp_path_factory.mktemp("uninterrupted") / "run")
    launch_training(config, progress=False)
    return measured(config)


def job(shards: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    fields = {"num_steps": NUM_STEPS, "checkpoint__every_n_steps": 4, "model__dropout": 0.0} | changes
    return train_config(run_dir, shards=shards, **fields)


def restarts(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "restarts.jsonl").read_text().splitlines()]


def test_a_run_whose_ranks_are_killed_goes_on_by_itself_to_the_same_losses(
    shards: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = job(shards, tmp_path / "run", cluster__max_failures=1)
    launcher = start(config, tmp_path)
    for step, rank in ((6, 0), (14, 1)):  # each after a new checkpoint, so that one failure at a time is counted
        wait_until(has_taken(config, step), launcher=launcher)
        ranks_below(launcher.pid)[rank].send_signal(signal.SIGKILL)
    log = finish(launcher, tmp_path)
    assert measured(config) == uninterrupted
    noted = restarts(tmp_path / "run")
    assert [(line["num_ranks"], line["failures_in_a_row"]) for line in noted] == [(2, 1), (2, 1)]
    assert [line["from_step"] for line in noted][0] in (4, 8)
    assert "goes on from step" in log
