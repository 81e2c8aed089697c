"""What an embedded Ray session leaves as it was: the code that a job runs, and who listens to SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic_shards import train_config, write_shard_set
from toy_corpus import tokenize_config, write_folder, write_tars, write_tiny_tokenizer

from pipeline.ledger import read_manifest
from pipeline.storage import open_storage

COMMAND = str(Path(sys.executable).with_name("tensorar"))
PACKAGES = ("tokenization", "pipeline", "training", "jobs")


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """A user's directory with packages of our names, none of which may be imported."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the package of the user is imported')\n")
    return tmp_path


def run_in(directory: Path, spec: str) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, "run", "spec.json"]
    (directory / "spec.json").write_text(spec)
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=250)


def test_workers_tokenize_with_the_code_of_the_job_whatever_lies_in_its_directory(work_dir: Path) -> None:
    write_tiny_tokenizer(work_dir / "tiny.safetensors")
    write_folder(work_dir / "tree", classes=("apple", "bear"), images_per_class=1)
    source = {"kind": "image_folder", "root": "tree"}
    spec = tokenize_config("set", source=source, weights=Path("tiny.safetensors"), cluster={"num_workers": 1})
    done = run_in(work_dir, spec.model_dump_json())
    assert done.returncode == 0, done.stderr
    assert read_manifest(open_storage(str(work_dir / "set"))).num_samples == 2


def test_ranks_train_with_the_code_of_the_job_whatever_lies_in_its_directory(work_dir: Path) -> None:
    write_shard_set(work_dir / "set")
    done = run_in(work_dir, train_config(Path("run"), shards=Path("set"), num_steps=1).model_dump_json())
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (work_dir / "run" / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("grid", [{}, {"grid": {"views.kind": ["ten_crop", "center"]}}], ids=["job", "study"])
def test_sigterm_ends_a_tokenize_job_by_the_exit_code_of_one_that_goes_on(tmp_path: Path, grid: dict[str, str]) -> None:
    write_tiny_tokenizer(tmp_path / "tiny.safetensors")
    urls = [write_tars(tmp_path / "tars", num_tars=2, samples_per_tar=4000)]
    spec = tokenize_config(
        tmp_path / "set",
        source={"kind": "webdataset", "urls": urls},
        weights=tmp_path / "tiny.safetensors",
        views={"kind": "ten_crop"},
        cluster={"num_workers": 1},
    ).model_dump(mode="json")
    (tmp_path / "spec.json").write_text(json.dumps(spec | grid))
    with (tmp_path / "stderr").open("w") as stderr:
        driver = subprocess.Popen([COMMAND, "run", "spec.json"], cwd=tmp_path, stderr=stderr)
    end = time.monotonic() + 200
    while "tokenizing:" not in (tmp_path / "stderr").read_text():
        assert driver.poll() is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGTERM)
    code, told = driver.wait(timeout=60), (tmp_path / "stderr").read_text()
    assert (code, "***" in told) == (75, False), told
    assert "stopped" in told.splitlines()[-1]
