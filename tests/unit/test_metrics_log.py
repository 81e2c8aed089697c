"""metrics.jsonl: each (step, split) once, also after a kill and a resume; what people read of a line."""

import json
import re
import sys
from pathlib import Path

import pytest
from synthetic_shards import train_config

from pipeline.storage import ArtifactError, open_storage
from training.metrics import MetricsLog, describe_line, read_metrics
from training.wandb_board import check_wandb, run_id


def line(step: int, loss: float = 1.5, split: str = "train") -> dict[str, object]:
    return {"step": step, "split": split, "loss": loss, "loss_of_offset": [loss], "elapsed_s": float(step)}


def write(run_dir: Path, *, after: int, steps: list[int], loss: float = 1.5) -> None:
    log = MetricsLog(run_dir, step=after)
    for step in steps:
        log.write(line(step, loss))
    log.close()


def test_resume_cuts_what_is_beyond_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, after=0, steps=[1, 2, 3, 4], loss=1.5)
    write(tmp_path, after=2, steps=[3, 4], loss=0.25)
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)] == [
        (1, 1.5),
        (2, 1.5),
        (3, 0.25),
        (4, 0.25),
    ]


def test_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, after=0, steps=[1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, after=2, steps=[3])
    assert [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_elapsed_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    write(tmp_path, after=0, steps=[1, 2, 3])
    log = MetricsLog(tmp_path, step=2)
    assert log.elapsed_s == 2.0
    log.close()


def test_new_run_starts_empty(tmp_path: Path) -> None:
    write(tmp_path, after=0, steps=[1, 2])
    write(tmp_path, after=0, steps=[1])
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_a_loss_that_is_not_finite_is_null_and_said_so(tmp_path: Path) -> None:
    write(tmp_path, after=0, steps=[1], loss=float("nan"))
    (entry,) = read_metrics(tmp_path)
    assert (entry["loss"], entry["loss_of_offset"]) == (None, [None])
    told = describe_line(entry | {"split": "validation", "own_draft_loss_0": 2.0}, num_steps=9)
    assert told == "step=1/9 validation loss=not finite loss_0=not finite own_draft_loss_0=2.0000"


def test_boards_are_shown_every_number_by_its_tag(tmp_path: Path) -> None:
    shown: list[tuple[int, dict[str, float]]] = []

    class Shown:
        def show(self, step: int, numbers: dict[str, float]) -> None:
            shown.append((step, numbers))

        def close(self) -> None:
            shown.append((0, {}))

    log = MetricsLog(tmp_path, step=0, boards=[Shown()])
    log.write({"step": 3, "split": "train", "loss": 2.0, "loss_of_offset": [1.0, float("inf")], "grad_norm": None})
    log.close()
    assert shown == [(3, {"train/loss": 2.0, "train/loss_of_offset/0": 1.0}), (0, {})]


def test_described_line_says_what_is_watched() -> None:
    entry = line(40) | {"learning_rate": 3e-4, "samples_per_s": 98.76, "step_s": 0.5}
    expected = "step=40/100 train loss=1.5000 loss_0=1.5000 learning_rate=0.0003 samples_per_s=98.8 eta_s=30"
    assert describe_line(entry, num_steps=100) == expected
    quiet = entry | {"mfu": 0.4321, "data_wait_share": 0.004, "num_skipped_steps": 0, "num_replaced_samples": 0}
    assert "samples_per_s=98.8 mfu=43.2% eta_s=30" in describe_line(quiet, num_steps=100)
    troubled = entry | {"mfu": 0.4321, "data_wait_share": 0.2, "num_skipped_steps": 3, "num_replaced_samples": 2}
    assert "mfu=43.2% data_wait=20% replaced_samples=2 skipped_steps=3 eta_s=30" in describe_line(
        troubled, num_steps=100
    )


def test_a_missing_wandb_is_an_error_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself takes for "not there"
    check_wandb(train_config(tmp_path, shards=tmp_path))
    with pytest.raises(ValueError, match=r"needs the package wandb, got 'nights' .*pip install wandb on every node"):
        check_wandb(train_config(tmp_path, shards=tmp_path, wandb_project="nights"))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    write(tmp_path, after=0, steps=[1, 2, 3])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[1] = "garbage" + lines[1]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ArtifactError, match=r"read .*/metrics\.jsonl: line 2 must be JSON, got 'garbage.*; remove it"):
        MetricsLog(tmp_path, step=3)


def test_a_run_keeps_its_wandb_id_where_it_is_moved_and_shares_it_with_no_other(tmp_path: Path) -> None:
    first = run_id(open_storage(str(tmp_path / "mine" / "run")))
    assert re.fullmatch(r"[0-9a-f]{16}", first)
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert run_id(open_storage(str(tmp_path / "moved" / "run"))) == first
    assert run_id(open_storage(str(tmp_path / "mine" / "run"))) != first
