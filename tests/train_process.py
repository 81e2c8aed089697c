"""`tensorar run` of a training spec in a process of its own, and what tests do to it: wait, find its ranks."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from training.config import TrainConfig
from training.metrics import read_metrics
from training.run_dir import local_run_dir

PURE_FIELDS = ("step", "split", "loss", "loss_of_offset", "accuracy_of_offset")
Launcher = subprocess.Popen[bytes]


def start(config: TrainConfig, directory: Path, **variables: str) -> Launcher:
    """Start `tensorar run`; what it says is added to `directory/launch.log`."""
    spec = directory / "train.yaml"
    spec.write_text(config.model_dump_json())  # JSON is YAML
    with (directory / "launch.log").open("ab") as log:
        command = [sys.executable, "-m", "jobs.cli", "run", str(spec)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | variables)


def finish(launcher: Launcher, directory: Path, *, exit_code: int = 0, timeout_s: float = 240) -> str:
    """Wait until the launcher has ended with this code and return all it said."""
    try:
        ended_with = launcher.wait(timeout=timeout_s)
    finally:
        launcher.kill()
    log = (directory / "launch.log").read_text()
    assert ended_with == exit_code, log[-5000:]
    return log


def wait_until(condition: Callable[[], bool], *, launcher: Launcher, timeout_s: float = 240) -> None:
    """Wait for a moment in the life of a run."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert launcher.poll() is None, "the run ended before the moment came"
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.005)


def has_taken(config: TrainConfig, step: int) -> Callable[[], bool]:
    """Return whether the run has taken a step, as a question to ask again and again."""
    return lambda: any(line["step"] >= step for line in read_metrics(local_run_dir(config.run_dir)))


def ranks_below(pid: int) -> list[psutil.Process]:
    """Return the rank processes among those below `pid`, the oldest first."""
    return processes_below(pid, "RayTrainWorker")


def processes_below(pid: int, name: str) -> list[psutil.Process]:
    """Return the processes below `pid` whose command line has `name`, the oldest first."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def measured(config: TrainConfig) -> list[dict[str, Any]]:
    """Return what the run measured, without its times."""
    return [{name: line[name] for name in PURE_FIELDS} for line in read_metrics(local_run_dir(config.run_dir))]
