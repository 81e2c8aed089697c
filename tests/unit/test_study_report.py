"""The page of a study of training runs: its curves, and what becomes of it where a run's metrics are damaged."""

import json
from pathlib import Path

import pytest

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
