"""An evaluation that is killed and run again ends in the result of an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_evaluation import result_of, write_inputs

from training.evaluation.config import EvaluateConfig

RUN = """
import sys
from jobs.run import run_spec
from training.evaluation.config import EvaluateConfig
run_spec(EvaluateConfig.model_validate_json(sys.argv[1]))
"""
MOMENTS = ("stages/held_out/model/00001.npz", "stages/samples/00001.npz", "samples.npz")
"""What a run has just committed when it is killed, once each."""


def start(config: EvaluateConfig) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, config.model_dump_json()], env=environment)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the evaluation ended before it could be killed"
        assert time.monotonic() < deadline_s, f"{path} never appeared"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_evaluation_killed_again_and_again_ends_in_the_same_result(tmp_path: Path) -> None:
    whole = write_inputs(tmp_path).model_copy(update={"batch_size": 8, "run_dir": str(tmp_path / "whole")})
    killed = whole.model_copy(update={"run_dir": str(tmp_path / "killed")})
    for moment in MOMENTS:
        with start(killed) as process:
            wait_for(Path(killed.run_dir) / moment, process)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (Path(killed.run_dir) / "evaluation.json").exists()
    for config in (killed, whole):
        with start(config) as process:
            assert process.wait() == 0
    assert result_of(killed) == result_of(whole)
    for name in ("samples.npz", "pictures.npz"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "killed").rglob(".staged-*"))
