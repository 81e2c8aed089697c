"""Skipped steps: counted over resumptions, written with their samples, and an error when they are too many."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_shards import train_config

from training.json_lines import read_json_lines
from training.ranks import Ranks
from training.skipped import SkippedSteps
from training.step import StepOutcome, _suspects


def skipped_of(directory: Path, *, step: int = 0, count: int = 0, most: int = 3, rank: int = 0) -> SkippedSteps:
    config = train_config(directory / "run", shards=directory / "set", max_skipped_steps=most)
    ranks = Ranks(rank=rank, world_size=1, device=torch.device("cpu"))
    return SkippedSteps(config, ranks=ranks, directory=directory, step=step, count=count)


def test_each_skipped_step_is_a_line_that_names_its_samples(tmp_path: Path) -> None:
    skipped = skipped_of(tmp_path)
    skipped.add(4, loss=float("nan"), grad_norm=float("inf"), sample_names=lambda: ["a", "b"])
    skipped.add(9, loss=2.5, grad_norm=float("-inf"), sample_names=lambda: [])
    skipped.close()
    assert skipped.count == 2
    assert read_json_lines(tmp_path / "skipped_steps.jsonl") == [
        {"step": 4, "loss": "nan", "grad_norm": "inf", "samples": ["a", "b"]},
        {"step": 9, "loss": 2.5, "grad_norm": "-inf", "samples": []},
    ]


def test_the_last_that_may_be_is_taken_and_the_next_ends_the_run_recorded(tmp_path: Path) -> None:
    skipped = skipped_of(tmp_path, count=1, most=2)
    skipped.add(4, loss=float("nan"), grad_norm=1.0, sample_names=lambda: [])
    with pytest.raises(
        FloatingPointError, match=r"train step 5: at most max_skipped_steps = 2 .*, got 3 \(loss nan, norm 1\.0\)"
    ):
        skipped.add(5, loss=float("nan"), grad_norm=1.0, sample_names=lambda: ["c"])
    assert [line["step"] for line in read_json_lines(tmp_path / "skipped_steps.jsonl")] == [4, 5]


def test_a_resumed_run_goes_on_with_the_count_and_the_lines_of_its_step(tmp_path: Path) -> None:
    before = skipped_of(tmp_path)
    for step in (2, 4, 6):
        before.add(step, loss=float("nan"), grad_norm=1.0, sample_names=lambda: [])
    before.close()
    after = skipped_of(tmp_path, step=4, count=2)  # the checkpoint of step 4
    after.add(5, loss=float("nan"), grad_norm=1.0, sample_names=lambda: [])
    after.close()
    assert after.count == 3
    assert [line["step"] for line in read_json_lines(tmp_path / "skipped_steps.jsonl")] == [2, 4, 5]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    skipped = skipped_of(tmp_path, rank=1)
    skipped.add(4, loss=float("nan"), grad_norm=1.0, sample_names=lambda: ["a"])
    skipped.close()
    assert skipped.count == 1
    assert list(tmp_path.iterdir()) == []


def test_the_samples_of_every_micro_batch_without_a_finite_loss_are_suspects() -> None:
    nan, inf = float("nan"), float("inf")
    measures = torch.tensor([[1.0, nan], [nan, 1.0], [2.0, 1.0], [-inf, 1.0]])  # the loss is first
    assert _suspects(measures, batch_size=12).tolist() == [3, 4, 5, 9, 10, 11]
    assert _suspects(measures, batch_size=0).tolist() == []


@pytest.mark.parametrize(
    ("loss", "grad_norm", "expected"),
    [(1.0, 1.0, False), (float("nan"), 1.0, True), (1.0, float("inf"), True), (float("inf"), float("nan"), True)],
)
def test_a_step_is_skipped_where_loss_or_norm_is_not_finite(loss: float, grad_norm: float, expected: bool) -> None:
    others: dict[str, Any] = {"loss_of_offset": [], "accuracy_of_offset": [], "data_wait_s": 0.0, "num_replaced": 0}
    outcome = StepOutcome(
        loss=loss, grad_norm=grad_norm, is_stopped=False, suspects_B=np.empty(0, dtype=np.int64), **others
    )
    assert outcome.is_skipped is expected
