"""An evaluation whose run_dir is on S3: its stages, results and report are written there, and a rerun does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_evaluation import result_of, write_inputs

from jobs.run import run_spec
from pipeline.storage import open_storage


@pytest.mark.slow
def test_an_evaluation_on_s3_ends_in_the_local_ones_result(s3_url: str, tmp_path: Path) -> None:
    here = write_inputs(tmp_path)
    there = here.model_copy(update={"run_dir": s3_url})
    run_spec(here)
    assert run_spec(there) == f"{s3_url}/report.html"
    assert result_of(there) == result_of(here)
    storage = open_storage(s3_url)
    files = storage.list()
    assert {"evaluation.json", "report.html", "samples.npz", "pictures.npz", "spec.json"} <= set(files)
    run_spec(there)
    assert storage.list() == files
    for name in ("evaluation.json", "stages/samples/00000.npz"):
        storage.remove(name)
    run_spec(there)
    assert result_of(there) == result_of(here)
