"""Ranks and nodes that die under a launched run: it starts them again by itself and ends in the same losses."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from synthetic_shards import train_config, write_shard_set
from train_process import finish, has_taken, measured, processes_below, ranks_below, start, wait_until

from jobs.launch import launch_training
from training.config import TrainConfig

NUM_STEPS = 24
ENDLESS = 1_000_000
"""Steps of a run that only a stop ends."""
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
    fields = {
        "num_steps": NUM_STEPS,
        "checkpoint__every_n_steps": 4,
        "model__dropout": 0.0,
        "engine__dtype": "float32",
    } | changes
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
    assert {line["from_step"] % 4 for line in noted} == {0}
    assert f"goes on from step {noted[0]['from_step']} with 2 of 2 ranks" in log


def test_sigterm_to_the_launcher_saves_and_exits_with_75_and_the_rerun_goes_on(
    shards: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = job(shards, tmp_path / "run", checkpoint__every_n_steps=1000)
    launcher = start(config, tmp_path)
    wait_until(has_taken(config, 5), launcher=launcher)
    launcher.terminate()
    log = finish(launcher, tmp_path, exit_code=75)
    stopped_at = measured(config)[-1]["step"]
    assert 5 <= stopped_at < NUM_STEPS
    assert f"stopped at step {stopped_at} of {NUM_STEPS}; run it again to go on" in log
    finish(start(config, tmp_path), tmp_path)
    assert measured(config) == uninterrupted


def test_ctrl_c_before_the_ranks_are_up_ends_the_launch_with_75_too(shards: Path, tmp_path: Path) -> None:
    config = job(shards, tmp_path / "run")
    launcher = start(config, tmp_path)
    wait_until(lambda: "ray session" in (tmp_path / "launch.log").read_text(), launcher=launcher)
    launcher.send_signal(signal.SIGINT)
    log = finish(launcher, tmp_path, exit_code=75)
    assert "run it again to go on" in log
    assert "Traceback" not in log


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for ranks and two nodes with room for one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def announce_preemption(cluster: Cluster, node: Any) -> None:
    """Tell the cluster that a node will be taken away in two minutes, as a cloud's notice does."""
    reason, deadline_ms = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, (time.time() + 120) * 1000
    is_accepted, _ = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot", int(deadline_ms))
    assert is_accepted


def test_a_preempted_run_saves_exits_with_75_and_goes_on_when_there_is_a_node_again(
    shards: Path, tmp_path: Path, cluster: Cluster
) -> None:
    section = {"address": cluster.address, "num_workers": 2, "node_wait_s": 2}
    config = job(shards, tmp_path / "run", cluster=section, num_steps=ENDLESS, checkpoint__every_n_steps=ENDLESS)
    launcher = start(config, tmp_path)
    wait_until(has_taken(config, 2), launcher=launcher)
    announce_preemption(cluster, cluster.worker_nodes.copy().pop())
    log = finish(launcher, tmp_path, exit_code=75)
    stopped_at = measured(config)[-1]["step"]
    assert 2 <= stopped_at < ENDLESS
    assert f"stopped at step {stopped_at} of {ENDLESS} because nodes" in log
    cluster.add_node(num_cpus=1)
    launcher = start(config, tmp_path)
    wait_until(has_taken(config, stopped_at + 2), launcher=launcher)
    launcher.terminate()
    finish(launcher, tmp_path, exit_code=75)
    steps = [line["step"] for line in measured(config)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.soak
def test_a_killed_controller_of_the_ranks_is_replaced(shards: Path, tmp_path: Path) -> None:
    config = job(shards, tmp_path / "run", num_steps=ENDLESS, checkpoint__every_n_steps=4)
    launcher = start(config, tmp_path)
    wait_until(has_taken(config, 6), launcher=launcher)
    (controller,) = processes_below(launcher.pid, "TrainController")
    controller.kill()
    wait_until(lambda: (tmp_path / "run" / "restarts.jsonl").exists(), launcher=launcher)
    from_step = restarts(tmp_path / "run")[0]["from_step"]
    wait_until(has_taken(config, from_step + 20), launcher=launcher)
    launcher.terminate()
    finish(launcher, tmp_path, exit_code=75)
    assert from_step >= 4
    assert [line["num_ranks"] for line in restarts(tmp_path / "run")] == [2]


@pytest.mark.soak
def test_another_ray_on_the_machine_does_not_end_the_ranks(shards: Path, tmp_path: Path) -> None:
    config = job(shards, tmp_path / "run", num_steps=ENDLESS, checkpoint__every_n_steps=ENDLESS)
    launcher = start(config, tmp_path)
    wait_until(has_taken(config, 2), launcher=launcher)
    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        time.sleep(8)  # Ray Train looks every second, and needs one or two to be answered
        launcher.terminate()
        finish(launcher, tmp_path, exit_code=75)
    finally:
        launcher.kill()
        other.shutdown()
    assert not (tmp_path / "run" / "restarts.jsonl").exists()


def test_a_run_that_loses_a_node_goes_on_with_the_ranks_that_are_left(
    shards: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path, cluster: Cluster
) -> None:
    section = {"address": cluster.address, "num_workers": 2, "min_workers": 1, "node_wait_s": 2}
    config = job(shards, tmp_path / "run", cluster=section)
    launcher = start(config, tmp_path)
    wait_until(has_taken(config, 6), launcher=launcher)
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    log = finish(launcher, tmp_path)
    assert "with 1 of 2 ranks" in log
    assert [(line["num_ranks"], line["failures_in_a_row"]) for line in restarts(tmp_path / "run")] == [(1, 1)]
    assert [line["step"] for line in measured(config)] == list(range(1, NUM_STEPS + 1))
    for line, expected in zip(measured(config), uninterrupted, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
