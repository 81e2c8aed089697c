"""SIGKILL of an export at seeded moments: only whole files are left, and the rerun ends in the bytes of a clean one."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic_shards import write_shard_set
from toy_corpus import files_of

from jobs.cli import main

EXPORT = "from jobs.cli import main; main()"


def export_words(run_dir: Path, output: Path) -> list[str]:
    return ["export", str(run_dir), "--to", "llamagen", "--output", str(output)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_killed_export_leaves_whole_files_and_its_rerun_the_bytes_of_a_clean_one(tmp_path: Path, seed: int) -> None:
    run_dir = write_shard_set(tmp_path / "set", samples_per_shard=(200, 300, 1500))  # the last one takes long to export
    wait_for = random.Random(seed).randrange(100, 700)
    process = subprocess.Popen([sys.executable, "-c", EXPORT, *export_words(run_dir, tmp_path / "out")])
    codes_dir = tmp_path / "out" / "code_c2i" / "imagenet8_codes"
    deadline = time.monotonic() + 60
    while len(list(codes_dir.glob("[0-9]*.npy"))) < wait_for and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    half_done = list(codes_dir.glob("[0-9]*.npy"))
    assert wait_for <= len(half_done) < 2000
    assert {np.load(path).shape for path in half_done} == {(1, 1, 16)}
    for output in ("out", "clean"):
        result = CliRunner().invoke(main, export_words(run_dir, tmp_path / output))
        assert result.exit_code == 0, result.output
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")
