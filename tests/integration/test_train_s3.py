"""A training run whose run_dir is on S3: the spec is kept there, and the launched run trains, resumes and is done."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from s3_faults import FaultPlan, fault_proxy
from synthetic_shards import train_config, write_shard_set
from training_processes import TORCHRUN

from jobs.launch import launch_training
from jobs.ray_ranks import RanksFailedError
from jobs.restart import RestartCount
from jobs.run import remember_spec
from pipeline.config import S3Config
from pipeline.storage import ArtifactError, open_storage
from training.checkpoint import list_checkpoints, verify_checkpoint
from training.metrics import read_metrics
from training.run_dir import local_run_dir

ROOT = Path(__file__).parents[2]


def test_the_directory_remembers_its_spec_and_refuses_another_once_it_has_begun(s3_url: str) -> None:
    config = train_config(Path("run"), shards=Path("set")).model_copy(update={"run_dir": s3_url})
    storage = open_storage(s3_url)
    remember_spec(config)
    other = config.model_copy(update={"seed": 6})
    remember_spec(other)  # nothing has begun: a mended spec takes its place
    storage.write_json("checkpoints/step_00000004/record.json", {})
    remember_spec(other)
    with pytest.raises(ArtifactError, match=r"these fields differ: seed \(there 6, in the spec 5\)"):
        remember_spec(config)


def restart(count: RestartCount, *, rank: int) -> None:
    count.note_failure(RanksFailedError("its process died", rank=rank, is_worth_retrying=True, is_preemption=False))
    count.note_start(2)


def restarted_ranks(url: str) -> list[int]:
    return [json.loads(line)["rank"] for line in open_storage(url).read_bytes("restarts.jsonl").splitlines()]


def test_restarts_on_all_machines_are_recorded_where_the_run_is(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(Path("run"), shards=Path("set")).model_copy(update={"run_dir": s3_url})
    for machine in range(2):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / f"machine_{machine}"))
        restart(RestartCount(config), rank=machine)
    assert restarted_ranks(s3_url) == [0, 1]


def test_a_restart_that_cannot_be_recorded_is_with_the_next_one(s3_url: str, caplog: pytest.LogCaptureFixture) -> None:
    config = train_config(Path("run"), shards=Path("set"))
    outage = FaultPlan(rate=1, faults=("slow_down",), operations=frozenset({"put_object"}), max_faults=1)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], outage) as proxy:
        s3 = S3Config(endpoint_url=proxy.endpoint_url, max_attempts=1)
        count = RestartCount(config.model_copy(update={"run_dir": s3_url, "s3": s3}))
        restart(count, rank=0)
        assert f"write {s3_url}/restarts.jsonl: must succeed" in caplog.text
        restart(count, rank=1)
    assert restarted_ranks(s3_url) == [0, 1]


@pytest.mark.slow
def test_a_launched_run_trains_resumes_and_is_done(s3_url: str, tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set")
    config = train_config(tmp_path / "run", shards=shards, num_steps=4).model_copy(update={"run_dir": s3_url})
    assert launch_training(config, progress=False).checkpoint == f"{s3_url}/checkpoints/step_00000004"
    longer = config.model_copy(update={"num_steps": 6})
    assert launch_training(longer, progress=False).step == 6
    storage = open_storage(s3_url)
    assert list_checkpoints(storage) == [4, 6]
    assert verify_checkpoint(storage, 6) == []
    assert [line["step"] for line in read_metrics(local_run_dir(s3_url))] == [1, 2, 3, 4, 5, 6]
    assert launch_training(longer, progress=False).step == 6


LAUNCH = """
import logging
import sys
from pathlib import Path

from jobs.launch import launch_training
from pipeline.s3 import lock
from training.config import TrainConfig

lock.RENEW_S = 0.1
if __name__ == "__main__":
    logging.basicConfig()
    launch_training(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()), progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_run_that_another_job_has_taken_over_ends_and_saves_nothing(
    s3_url: str, tmp_path: Path, launcher: str
) -> None:
    (tmp_path / "launch.py").write_text(LAUNCH)
    endless: dict[str, Any] = {"num_steps": 100_000, "checkpoint__every_n_steps": 100_000, "log_every_n_steps": 1}
    config = train_config(tmp_path / "run", shards=write_shard_set(tmp_path / "set"), **endless)
    cluster = config.cluster.model_copy(update={"launcher": launcher})
    config = config.model_copy(update={"run_dir": s3_url, "cluster": cluster})
    (tmp_path / "spec.json").write_text(config.model_dump_json())
    python = [sys.executable] if launcher == "ray" else [*TORCHRUN, "--nproc-per-node=2"]
    command = [*python, str(tmp_path / "launch.py"), str(tmp_path / "spec.json")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 200
        while len(read_metrics(local_run_dir(s3_url))) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        storage = open_storage(s3_url)
        storage.write_json(".lock", {"host": "far", "machine": "other", "pid": 1, "started": "1", "token": "x"})
        output = process.communicate(timeout=120)[0].decode()
    finally:
        process.kill()
        shutil.rmtree(local_run_dir(s3_url))
    assert process.returncode == 1
    assert f"another job has taken over {s3_url}" in output
    assert "SIGTERM handler is not set" not in output  # as Ray says where a thread starts it again
    assert list_checkpoints(storage) == []
    assert json.loads(storage.read_bytes(".lock"))["host"] == "far"
