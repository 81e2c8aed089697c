"""What is decided about a failed run: whether to start again, with how many ranks, and when to give up."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError
from synthetic_checkpoints import write_checkpoint
from synthetic_shards import train_config

from jobs.ray_ranks import Outcome, RanksFailedError, describe_failure, is_worth_retrying
from jobs.restart import RestartCount, config_of_ranks, newest_step, possible_ranks
from pipeline.storage import ArtifactError, StorageUnavailableError, open_storage
from training.config import TrainConfig
from training.loop import TrainResult
from training.ops import NativeOpError

DEATH = RanksFailedError("its process died", rank=1, is_worth_retrying=True, is_preemption=False)


def job(run_dir: Path, **changes: Any) -> TrainConfig:
    return train_config(run_dir, shards=run_dir / "set", **changes)


def commit_step(run_dir: Path, step: int) -> None:
    write_checkpoint(open_storage(str(run_dir)), step)


@pytest.mark.parametrize(
    ("global_batch_size", "micro_batch_size", "cluster", "expected"),
    [
        (24, None, {"num_workers": 8, "min_workers": 1}, (8, 6, 4, 3, 2, 1)),
        (24, 3, {"num_workers": 8, "min_workers": 2}, (8, 4, 2)),
        (24, 3, {"num_workers": 8}, (8,)),
        (24, None, {"num_workers": 2, "min_workers": 5}, (2,)),
    ],
)
def test_only_numbers_of_ranks_that_divide_the_batch_are_possible(
    tmp_path: Path, global_batch_size: int, micro_batch_size: int | None, cluster: Any, expected: tuple[int, ...]
) -> None:
    engine = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    assert possible_ranks(job(tmp_path, engine=engine, cluster=cluster)) == expected


@pytest.mark.parametrize(("num_ranks", "micro_batch_size", "grad_accumulation"), [(4, 6, 1), (3, 4, 2), (2, 6, 2)])
def test_fewer_ranks_keep_the_batch_in_more_micro_steps_of_no_more_memory(
    tmp_path: Path, num_ranks: int, micro_batch_size: int, grad_accumulation: int
) -> None:
    config = job(tmp_path, engine={"global_batch_size": 24}, cluster={"num_workers": 4, "min_workers": 1})
    fewer = config_of_ranks(config, num_ranks)
    assert fewer.cluster.num_workers == num_ranks
    assert fewer.engine.global_batch_size == 24
    assert fewer.engine.grad_accumulation(num_ranks) == grad_accumulation
    assert 24 // (num_ranks * grad_accumulation) == micro_batch_size


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ArtifactError("a shard is damaged"), False),
        (StorageUnavailableError("503"), True),
        (NativeOpError("not built"), False),
        (ValueError("labels must be below 4"), False),
        (FloatingPointError("too many skipped steps"), False),
        (KeyError("name"), False),
        (RuntimeError("Connection closed by peer"), True),
        (ConnectionResetError("reset"), True),
    ],
)
def test_what_spec_artifacts_or_code_cause_is_not_tried_again(error: Exception, expected: bool) -> None:
    assert is_worth_retrying(error) is expected


def test_the_cause_is_told_from_what_it_causes_in_other_ranks() -> None:
    lost_peer = RuntimeError("[pair.cc:537] Connection closed by peer")
    told = describe_failure(WorkerGroupError("", {0: lost_peer, 1: ValueError("labels must be below 4"), 2: lost_peer}))
    assert str(told) == "rank 1 failed: ValueError: labels must be below 4"
    assert not told.is_worth_retrying


def test_a_rank_that_only_saw_another_one_go_is_not_blamed() -> None:
    told = describe_failure(WorkerGroupError("", {1: RuntimeError("Read error: Connection reset by peer")}))
    expected = "another rank, or its node, was lost: rank 1 saw RuntimeError: Read error: Connection reset by peer"
    assert (str(told), told.rank, told.is_worth_retrying) == (expected, None, True)


def test_failures_in_a_row_are_counted_until_a_new_checkpoint(tmp_path: Path) -> None:
    count = RestartCount(job(tmp_path, cluster={"max_failures": 2}))
    for step in (None, None, 4, None):  # a checkpoint in the third run
        count.note_start(2)
        if step is not None:
            commit_step(tmp_path, step)
        count.note_failure(DEATH)
    count.note_start(2)
    with pytest.raises(RanksFailedError, match="2 restarts in a row made no new checkpoint") as caught:
        count.note_failure(DEATH)
    assert caught.value.rank == 1
    assert not caught.value.is_worth_retrying
    lines = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert [(line["failures_in_a_row"], line["from_step"]) for line in lines] == [(1, 0), (2, 0), (1, 4), (2, 4)]


def test_a_storage_that_answers_only_between_starts_makes_no_old_checkpoint_new(tmp_path: Path) -> None:
    commit_step(tmp_path, 8)
    count = RestartCount(job(tmp_path, cluster={"max_failures": 1}))
    count.note_start(2)
    count.note_failure(DEATH)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.rename(tmp_path / "away")
    count.note_start(2)
    (tmp_path / "away").rename(checkpoints)
    with pytest.raises(RanksFailedError, match="1 restarts in a row made no new checkpoint"):
        count.note_failure(DEATH)


def test_a_preemption_is_not_counted(tmp_path: Path) -> None:
    count = RestartCount(job(tmp_path, cluster={"max_failures": 0}))
    count.note_start(2)
    count.note_failure(RanksFailedError("preempted", rank=0, is_worth_retrying=True, is_preemption=True))
    with pytest.raises(RanksFailedError, match=r"^rank 1 failed: its process died$"):  # no restart to speak of
        count.note_failure(DEATH)


def test_a_stop_in_good_order_ends_a_row_of_failures(tmp_path: Path) -> None:
    count = RestartCount(job(tmp_path, cluster={"max_failures": 1}))
    count.note_start(2)
    count.note_failure(DEATH)
    count.note_start(2)
    stopped = TrainResult(step=4, is_finished=False, checkpoint="step_00000004")
    count.note_preemption(Outcome(result=stopped, preempted_nodes=("a", "b")))
    count.note_start(1)
    count.note_failure(DEATH)  # would be the second in a row
    lines = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert [(line["cause"], line["failures_in_a_row"], line["num_ranks"]) for line in lines] == [
        ("rank 1 failed: its process died", 1, 2),
        ("nodes a, b are taken away, all was saved", 0, 1),
    ]


def test_a_restart_that_could_not_be_recorded_is_recorded_with_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = RestartCount(job(tmp_path, cluster={"max_failures": 9}))
    for in_the_way in (False, True, False, False):
        count.note_start(2)
        count.note_failure(DEATH)
        if in_the_way:
            (tmp_path / "restarts.jsonl").rename(tmp_path / "kept")
            (tmp_path / "restarts.jsonl" / "directory").mkdir(parents=True)
        elif (tmp_path / "kept").exists():
            assert "restarts.jsonl lacks this restart" in caplog.text
            shutil.rmtree(tmp_path / "restarts.jsonl")
            (tmp_path / "kept").rename(tmp_path / "restarts.jsonl")
    count.note_start(2)
    lines = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert [line["failures_in_a_row"] for line in lines] == [1, 2, 3, 4]


def test_a_run_whose_records_are_all_damaged_is_at_step_0_for_the_count(tmp_path: Path) -> None:
    commit_step(tmp_path, 8)
    assert newest_step(job(tmp_path)) == 8
    (tmp_path / "checkpoints" / "step_00000008" / "record.json").write_bytes(b"{")
    assert newest_step(job(tmp_path)) == 0  # the ranks tell what is wrong


def test_an_error_that_would_come_again_ends_the_run_at_once(tmp_path: Path) -> None:
    count = RestartCount(job(tmp_path, cluster={"max_failures": 3}))
    count.note_start(2)
    error = RanksFailedError("ValueError: x", rank=0, is_worth_retrying=False, is_preemption=False)
    with pytest.raises(RanksFailedError, match=r"^rank 0 failed: ValueError: x$"):
        count.note_failure(error)
