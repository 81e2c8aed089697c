"""A study of training runs whose directory is on a real S3 server: states, table, report and claims."""

import json
from pathlib import Path

import pytest
from synthetic_checkpoints import write_checkpoint

from jobs.grid import Study, StudyRun, load_job
from jobs.study import run_study
from jobs.study_results import claim_of, read_study, write_outcome
from pipeline.config import S3Config
from pipeline.storage import open_storage

SPEC = """\
kind: train
data: {shards: runs/codes}
model: {size: B, window_size: 2}
num_steps: 20
grid:
  recipe: {paper: {}, full: {noise.schedule: full}}
  seed: [0, 1]
"""


def write_run(run: StudyRun, *, own_draft_loss_0: float) -> None:
    """What a finished training run leaves behind, as far as the study reads it."""
    storage = open_storage(run.spec.run_dir)
    storage.write_json("spec.json", run.spec.model_dump(mode="json"))
    line = {"step": 20, "split": "validation", "loss": 3.0, "loss_of_offset": [2.0, 4.0], "elapsed_s": 5.0}
    storage.write_bytes("metrics.jsonl", json.dumps(line | {"own_draft_loss_0": own_draft_loss_0}).encode() + b"\n")
    write_checkpoint(storage, 20)


@pytest.fixture
def study(tmp_path: Path, s3_url: str) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(SPEC)
    made = load_job(path, [f"run_dir={s3_url}/study"])
    assert isinstance(made, Study)
    return made


def test_a_finished_study_on_s3_is_told_there_and_leaves_no_lock(study: Study, s3_url: str) -> None:
    for run, loss in zip(study.runs, (2.5, 3.5, 4.0, 4.0), strict=True):
        write_run(run, own_draft_loss_0=loss)
    result = run_study(study)
    assert [run.state for run in result.runs] == ["done"] * 4
    storage = open_storage(f"{s3_url}/study")
    assert storage.read_bytes("table.md").decode().splitlines()[4:6] == [
        "| paper | 2 of 2 | 3.000 +- 0.71 (2.500..3.500) | 2 | 3 | 20 | 5 |",
        "| full | 2 of 2 | 4 | 2 | 3 | 20 | 5 |",
    ]
    assert storage.read_bytes("report.html").decode().count("<svg") == 2  # no training line, no curve of it
    assert json.loads(storage.read_bytes("recipe=full,seed=1/spec.json"))["noise"]["schedule"] == "full"
    assert not storage.is_held()
    assert read_study(f"{s3_url}/study", s3=S3Config()) == result


def test_a_run_at_work_on_s3_is_running_while_its_claim_is_held(study: Study, s3_url: str) -> None:
    for run in study.runs[:3]:
        write_run(run, own_draft_loss_0=2.5)
    run_study(study, selections=["recipe=paper", "recipe=full,seed=0"])
    claim = claim_of(open_storage(f"{s3_url}/study"), study.runs[3].name, s3=S3Config())
    with claim.exclusive():
        write_outcome(claim, state="running", seconds_s=0.0)
        assert [run.state for run in read_study(f"{s3_url}/study", s3=S3Config()).runs] == ["done"] * 3 + ["running"]
    assert [run.state for run in read_study(f"{s3_url}/study", s3=S3Config()).runs] == ["done"] * 3 + ["stopped"]
