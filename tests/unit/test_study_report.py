"""The page of a study of training runs: its curves, and what becomes of it where a run's metrics are damaged."""

import json
from pathlib import Path

import pytest

from jobs.results import Measure
from jobs.study_report import report_page
from jobs.study_results import RunResult, StudyResult
from pipeline.config import S3Config

LINE = {"step": 20, "split": "validation", "loss": 3.0, "loss_of_offset": [2.0, 4.0], "own_draft_loss_0": 2.5}


def write_metrics(study: Path, run: str, text: str) -> RunResult:
    (study / run).mkdir()
    (study / run / "metrics.jsonl").write_text(text)
    return RunResult(
        name=run,
        cases={"recipe": run.partition("=")[2]},
        state="stopped",
        progress=None,
        measures={},
        seconds_s=None,
        error=None,
    )


@pytest.mark.parametrize(
    "damaged",
    ['{"step": 20, "spl\n{}\n', json.dumps({"step": 20, "split": "validation", "loss": 3.0}) + "\n"],
    ids=["not JSON", "without its measures"],
)
def test_damaged_metrics_of_one_run_cost_its_curves_and_not_the_page(
    tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs = (
        write_metrics(tmp_path, "recipe=whole", json.dumps(LINE) + "\n"),
        write_metrics(tmp_path, "recipe=torn", damaged),
    )
    page = report_page(StudyResult(kind="train", run_dir=str(tmp_path), runs=runs), s3=S3Config())
    assert page.count("<svg") == 2  # the two held-out curves of the whole run
    assert f"run={tmp_path}/recipe=torn has no curve" in caplog.text
    assert "recipe=whole has no curve" not in caplog.text


def done(recipe: str, seed: int, loss: float) -> RunResult:
    return RunResult(
        name=f"recipe={recipe},seed={seed}",
        cases={"recipe": recipe, "seed": str(seed)},
        state="done",
        progress=None,
        measures={"loss": Measure(value=loss)},
        seconds_s=None,
        error=None,
    )


def test_a_page_with_a_baseline_shows_the_differences_and_marks_the_clear_ones() -> None:
    runs = (done("control", 0, 3.0), done("control", 1, 4.0), done("a", 0, 2.0), done("a", 1, 2.9), done("b", 0, 3.5))
    result = StudyResult(kind="evaluate", run_dir="runs/s", runs=runs, baseline={"recipe": "control"})
    page = report_page(result, s3=S3Config())
    assert "<h2>Minus recipe=control</h2>" in page
    assert '<td>a</td><td class="number"><strong>-1.05 \u00b1 0.64</strong></td>' in page
    assert '<td>b</td><td class="number">+0.5000</td>' in page
    alone = result.model_copy(update={"baseline": {}})
    assert "Minus" not in report_page(alone, s3=S3Config())
