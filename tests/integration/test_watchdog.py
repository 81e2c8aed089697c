"""Two real processes and their watchdogs: the one that hangs is named, and both end with a code of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.watchdog import EXIT_HUNG

RANK = """
import sys, time
from contextlib import closing
from pathlib import Path
import torch
import torch.distributed
from training.ranks import Ranks
from training.watchdog import Watchdog

rank, log, hanging = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=rank, world_size=2)
ranks = Ranks(rank=rank, world_size=2, device=torch.device("cpu"))
watchdog = Watchdog(ranks, timeout_s=1.0, log=log)


def wait_for_ever():
    print("hangs", flush=True)
    time.sleep(1000)


with closing(watchdog):
    for step in range(1, 4):
        watchdog.enter("data", step=step)
        if step == 3 and rank == hanging:
            wait_for_ever()
        watchdog.enter("backward", step=step)
        ranks.barrier()
"""


def start(tmp_path: Path, *, hanging: int) -> list[subprocess.Popen[str]]:
    rendezvous = tmp_path / "rendezvous"
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / f"{rank}.log"), str(hanging), str(rendezvous)],
            env=os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_a_rank_stuck_in_its_data_is_named_by_both_and_shows_its_stack(tmp_path: Path) -> None:
    processes = start(tmp_path, hanging=1)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_HUNG, EXIT_HUNG]
    places = "rank 1 in step 3 (data); rank 0 in step 3 (backward)"
    verdict = f"rank 1 is hung in step 3 (data) for more than 1 s; where all are: {places}"
    assert all(f"rank {rank} ends: {verdict}" in errors[rank] for rank in range(2))
    assert verdict in (tmp_path / "0.log").read_text()
    assert "wait_for_ever" in (tmp_path / "1.log").read_text()


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_stopped_is_named_by_the_other(tmp_path: Path, stopped: int) -> None:
    processes = start(tmp_path, hanging=stopped)
    stdout = processes[stopped].stdout
    assert stdout is not None
    assert stdout.readline() == "hangs\n"
    time.sleep(0.2)
    os.kill(processes[stopped].pid, signal.SIGSTOP)
    try:
        other = processes[1 - stopped]
        _, error = other.communicate(timeout=60)
        assert other.returncode == EXIT_HUNG
        expected = {0: "rank 0 is hung or has ended", 1: "rank 1 is hung in step 3 (data): stopped, dead or cut off"}
        assert expected[stopped] in error
    finally:
        processes[stopped].kill()
        processes[stopped].communicate()
