"""Ray Train in front of the same loop: it trains and resumes, tells the error of a rank, leaves nothing behind."""

from pathlib import Path

import pytest
from synthetic_shards import train_config, write_shard_set

from jobs.launch import LaunchError, check_gpus, launch_training
from jobs.ray_ranks import worker_variables
from pipeline.config import ClusterConfig
from pipeline.storage import open_storage
from training.checkpoint import verify_checkpoint
from training.metrics import read_metrics


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that relative paths of specs start from."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_ranks_train_resume_and_then_have_nothing_to_do(work_dir: Path) -> None:
    write_shard_set(work_dir / "set")
    config = train_config(Path("runs/base"), shards=Path("set"), num_steps=4)
    result = launch_training(config)
    assert (result.step, result.is_finished) == (4, True)
    assert verify_checkpoint(open_storage("runs/base"), 4) == []
    longer = config.model_copy(update={"num_steps": 6, "optimizer": config.optimizer})
    assert launch_training(longer).step == 6
    assert [line["step"] for line in read_metrics(work_dir / "runs" / "base")] == [1, 2, 3, 4, 5, 6]
    lines = read_metrics(work_dir / "runs" / "base")
    assert launch_training(longer).checkpoint.endswith("runs/base/checkpoints/step_00000006")
    assert read_metrics(work_dir / "runs" / "base") == lines
    assert not (work_dir / "runs" / "base" / "ray").exists()


def test_error_of_a_rank_is_the_error_of_the_launch(work_dir: Path) -> None:
    write_shard_set(work_dir / "set", label=4)
    config = train_config(work_dir / "run", shards=work_dir / "set")
    with pytest.raises(
        LaunchError, match=r"rank \d failed: .*labels must be below model\.num_classes = 4, got 4"
    ) as failed:
        launch_training(config)
    # Ray may end the other rank before it has said anything; the log that the error names has the story.
    log = Path(str(failed.value).rpartition("; see ")[2])
    assert log.parent == work_dir / "run" / "logs"
    assert "labels must be below" in log.read_text()


def test_ranks_without_a_gpu_compute_on_their_own_cores_only() -> None:
    variables = worker_variables(ClusterConfig(cpus_per_worker=2.5))
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in worker_variables(ClusterConfig(gpus_per_worker=1.0))


def test_ranks_that_would_wait_for_gpus_for_ever_are_refused() -> None:
    cluster = ClusterConfig(num_workers=2, gpus_per_worker=0.5)
    check_gpus(cluster, num_gpus=1.0)
    with pytest.raises(LaunchError) as caught:
        check_gpus(cluster, num_gpus=0.0)
    assert str(caught.value) == (
        "start 2 ranks: cluster.num_workers * cluster.gpus_per_worker must be at most this machine's 0 GPUs, got 1; "
        "lower one of them, or join a cluster with cluster.address"
    )
