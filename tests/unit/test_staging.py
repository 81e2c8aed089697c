"""Local directories of files on their way to S3: what killed processes of a machine left is removed, nothing else."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.s3.staging import PREFIX

HOLDS_ONE = """
import os, sys, time
from pipeline.s3.staging import staging_directory
with staging_directory() as directory:
    (directory / "00000.tar").write_bytes(b"codes")
    os.utime(directory, (1, 1))
    print(directory, flush=True)
    time.sleep(600)
"""


def test_the_first_file_that_a_process_stages_removes_what_killed_ones_left(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    holders = []
    try:
        for _ in range(2):
            command = [sys.executable, "-c", HOLDS_ONE]
            holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        held = [Path((holder.stdout.readline()).strip()) for holder in holders]  # type: ignore[union-attr]
        holders[0].kill()
        holders[0].wait()
        (tmp_path / "other").mkdir()
        (tmp_path / f"{PREFIX}young").mkdir()
        code = "from pipeline.s3.staging import staging_directory\nwith staging_directory(): pass"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert sorted(tmp_path.iterdir()) == sorted([held[1], tmp_path / "other", tmp_path / f"{PREFIX}young"])
        assert (held[1] / "00000.tar").read_bytes() == b"codes"
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
