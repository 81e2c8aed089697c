"""metrics.jsonl: each (step, split) once, also after a kill and a resume."""

import json
from pathlib import Path

from training.metrics import MetricsLog, describe_line, read_metrics


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


def test_described_line_says_what_is_watched() -> None:
    entry = line(40) | {"learning_rate": 3e-4, "samples_per_s": 98.76, "step_s": 0.5}
    expected = "step=40/100 train loss=1.5000 loss_0=1.5000 learning_rate=0.0003 samples_per_s=98.8 eta_s=30"
    assert describe_line(entry, num_steps=100) == expected
