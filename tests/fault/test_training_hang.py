"""A rank that hangs (SIGSTOP): the other one names it, and both end so that the run can go on."""

import os
import signal
import time
from pathlib import Path

import pytest
from synthetic_shards import train_config, write_shard_set
from training_processes import ranks_of, run, start

from pipeline.storage import open_storage
from training.checkpoint import list_checkpoints
from training.metrics import read_metrics

TIMEOUT_S = 6.0


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_rerun_goes_on(tmp_path: Path) -> None:
    write_shard_set(tmp_path / "train")
    changes = {"engine__step_timeout_s": TIMEOUT_S, "cluster__launcher": "torchrun", "num_steps": 5000}
    config = train_config(tmp_path / "run", shards=tmp_path / "train", checkpoint__every_n_steps=5, **changes)
    process = start(config)
    while len(read_metrics(tmp_path / "run")) < 12:
        assert process.poll() is None
        time.sleep(0.05)
    stopped = ranks_of(process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    log = tmp_path / "run" / "logs" / "rank_00000.log"
    deadline = time.monotonic() + 10 * TIMEOUT_S
    while "rank 0 ends: rank 1 is hung in step" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2.0)  # rank 0 stays a little, so that others can read its heartbeats
    os.kill(stopped, signal.SIGKILL)  # torchrun would, in half a minute
    output, _ = process.communicate(timeout=60)
    assert "rank 0 ends: rank 1 is hung in step" in output
    assert "stopped, dead or cut off, no heartbeat for more than 6 s" in output
    assert "exitcode  : 76" in output
    assert "in take\n" in log.read_text()  # the stack of the rank that waited, in a micro step or in the step's own sum
    step = list_checkpoints(open_storage(str(tmp_path / "run")))[-1]
    code, output = run(config.model_copy(update={"num_steps": step + 1}))
    assert code == 0, output
