"""Metrics and logs of a run on S3: they get there, and come back to a machine that has none of them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from s3_faults import FaultPlan, fault_proxy
from synthetic_shards import train_config

from pipeline.config import S3Config
from pipeline.storage import StorageUnavailableError, open_storage
from training.config import TrainConfig
from training.metrics import MetricsLog, read_metrics
from training.run_dir import local_run_dir
from training.run_files import RunFiles


@pytest.fixture
def config(s3_url: str, tmp_path: Path) -> Iterator[TrainConfig]:
    config = train_config(tmp_path, shards=tmp_path).model_copy(update={"run_dir": s3_url})
    yield config
    shutil.rmtree(local_run_dir(s3_url))


def write_metrics(directory: Path, *, after: int, steps: list[int]) -> None:
    log = MetricsLog(directory, step=after)
    for step in steps:
        log.write({"step": step, "split": "train", "loss": 0.5, "elapsed_s": 1.0})
    log.close()


def steps_of(directory: Path) -> list[int]:
    return [line["step"] for line in read_metrics(directory)]


def test_everything_is_in_the_storage_when_a_run_has_ended(config: TrainConfig) -> None:
    storage = open_storage(config.run_dir, s3=config.s3)
    for rank in range(2):
        with closing(RunFiles(config, rank=rank)) as files:
            files.log.parent.mkdir(exist_ok=True)
            files.log.write_text(f"of rank {rank}\n")
            if rank == 0:
                files.bring_records(step=0)
                write_metrics(files.directory, after=0, steps=[1, 2])
                files.publish_records()
                assert storage.read_bytes("metrics.jsonl").count(b"\n") == 2
    names = list(storage.list())
    assert names[:3] == ["logs/rank_00000.log", "logs/rank_00001.log", "metrics.jsonl"]
    assert names[3].startswith("tensorboard/events.")
    assert storage.read_bytes("logs/rank_00001.log") == b"of rank 1\n"


def test_a_machine_without_them_goes_on_where_the_other_left_off(config: TrainConfig) -> None:
    with closing(RunFiles(config, rank=0)) as files:
        files.log.parent.mkdir(exist_ok=True)
        files.log.write_text("first machine\n")
        files.bring_records(step=0)
        write_metrics(files.directory, after=0, steps=[1, 2, 3, 4, 5])
    shutil.rmtree(local_run_dir(config.run_dir))
    with closing(RunFiles(config, rank=0)) as files:
        assert files.log.read_text() == "first machine\n"
        files.bring_records(step=4)
        write_metrics(files.directory, after=4, steps=[5, 6])
        assert steps_of(files.directory) == [1, 2, 3, 4, 5, 6]


def test_a_machine_that_has_more_of_them_keeps_its_own(config: TrainConfig) -> None:
    with closing(RunFiles(config, rank=0)) as files:
        files.bring_records(step=0)
        write_metrics(files.directory, after=0, steps=[1, 2])
        files.publish_records()
        write_metrics(files.directory, after=2, steps=[3, 4])
        files.bring_records(step=3)
        assert steps_of(files.directory) == [1, 2, 3, 4]


def test_a_machine_that_has_nothing_to_do_leaves_the_stored_ones_alone(config: TrainConfig) -> None:
    with closing(RunFiles(config, rank=0)) as files:
        files.bring_records(step=0)
        write_metrics(files.directory, after=0, steps=[1, 2])
    write_metrics(files.directory, after=0, steps=[1])  # as an older machine has them
    with closing(RunFiles(config, rank=0)):
        pass
    assert open_storage(config.run_dir, s3=config.s3).read_bytes("metrics.jsonl").count(b"\n") == 2


@contextmanager
def failing(config: TrainConfig, *operations: str, max_faults: int | None = None) -> Iterator[TrainConfig]:
    """Yield the config of the same run whose storage answers these operations with 503, so many times."""
    plan = FaultPlan(rate=1, faults=("slow_down",), operations=frozenset(operations), max_faults=max_faults)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], plan) as proxy:
        yield config.model_copy(update={"s3": S3Config(endpoint_url=proxy.endpoint_url, max_attempts=2)})


@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped_steps.jsonl", "logs/rank_00000.log"])
def test_what_cannot_be_read_ends_the_start_and_stays_as_it_is(config: TrainConfig, name: str) -> None:
    stored = b"".join(b'{"step": %d}\n' % step for step in range(1, 101))
    storage = open_storage(config.run_dir, s3=config.s3)
    storage.write_bytes(name, stored)

    def run(config: TrainConfig) -> None:
        with closing(RunFiles(config, rank=0)) as files:
            files.bring_records(step=100)
            raise AssertionError("went on without them")

    directory = local_run_dir(config.run_dir)
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(b'{"step": 1}\n')  # of an older part of the run
    with (
        failing(config, "get_object", max_faults=2) as broken,
        pytest.raises(StorageUnavailableError, match=f"read {config.run_dir}/{name}: must succeed within"),
    ):
        run(broken)
    assert storage.read_bytes(name) == stored


def test_a_storage_that_cannot_be_written_is_a_warning(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    with failing(config, "put_object") as broken, closing(RunFiles(broken, rank=0)) as files:
        files.bring_records(step=0)
        write_metrics(files.directory, after=0, steps=[1])
    assert f"metrics and logs of {config.run_dir}: write {config.run_dir}/metrics.jsonl" in caplog.text
    assert "training goes on" in caplog.text


def test_a_file_that_cannot_be_copied_is_a_warning_also_in_the_background(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(RunFiles(config, rank=0)) as files:
        files.log.mkdir(parents=True)  # not to be read as a file, as root may read any
        files.publish()
    told = [entry.threadName for entry in caplog.records if "Is a directory" in entry.message]
    assert told == ["run-files_0", "MainThread"]
