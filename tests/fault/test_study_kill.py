"""SIGKILL of a study amid a run: what was done stays as it is, the rest is done when it is run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sample_study import NAMES, results_of, write_sample_study, write_tiny_weights

from jobs.study_results import read_study
from pipeline.config import S3Config


def start(spec: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", str(spec)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    spec, study = write_sample_study(tmp_path, weights=write_tiny_weights(tmp_path)), tmp_path / "study"
    process, second = start(spec), study / "outcomes" / NAMES[1] / "outcome.json"
    end = time.monotonic() + 120
    while not second.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    states = [run.state for run in read_study(str(study), s3=S3Config()).runs]
    assert (states[0], states[2:]) == ("done", ["to do", "to do"])
    assert states[1] in ("stopped", "done")
    before = results_of(study)
    assert start(spec).wait(timeout=120) == 0
    after = results_of(study)
    assert len(after) == 4
    assert before.items() <= after.items()
    kept = json.loads((study / "study.json").read_text())
    assert [(run["name"], run["state"]) for run in kept["runs"]] == [(name, "done") for name in NAMES]
