"""Tokenize jobs in processes of their own, and what tests do to them: wait for a moment, kill, count commits."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster
from ray_cluster import lose_second_node, second_raylet

from pipeline.config import TokenizeConfig
from pipeline.storage import Storage, open_storage

SCRIPT = Path(__file__).parent / "run_tokenize_job.py"
Driver = subprocess.Popen[bytes]


def start(config: TokenizeConfig, directory: Path, **variables: str) -> Driver:
    """Start the job; what it says is added to `directory/log.txt`."""
    (directory / "config.json").write_text(config.model_dump_json())
    with (directory / "log.txt").open("ab") as log:
        command = [sys.executable, str(SCRIPT), str(directory / "config.json")]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | variables)


def finish(driver: Driver, directory: Path, *, timeout_s: float = 240) -> None:
    """Wait until the job has ended well."""
    assert driver.wait(timeout=timeout_s) == 0, (directory / "log.txt").read_text()[-5000:]


def wait_until(condition: Callable[[], bool], *, driver: Driver, timeout_s: float = 240) -> None:
    """Wait for a moment in the life of a running job."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, "the job ended before the moment came"
        assert time.monotonic() < end
        time.sleep(0.005)


def kill(driver: Driver) -> list[psutil.Process]:
    """Kill the driver alone and return the Ray processes that it leaves behind."""
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    return children


def workers_of(pid: int) -> list[psutil.Process]:
    """The job's Ray workers among the processes below `pid`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "UnitTokenizer" in " ".join(process.cmdline()):
                found.append(process)
    return found


def num_records(storage: Storage) -> int:
    """Units that have a ledger record."""
    return sum(name.endswith(".json") for name in storage.list("ledger/"))


def run_with_kills(
    config: TokenizeConfig, directory: Path, *, cluster: Cluster, kills: dict[str, int], seed: int
) -> None:
    """Run a job to its end through SIGKILLs in a seeded order, each at a seeded moment after a further commit.

    Args:
        config: the job; it joins `cluster`, on whose second node all of its workers are.
        directory: where the job's log is added to `log.txt`.
        cluster: loses its second node and gets another, which no unit is done without.
        kills: how many of each: `driver` (started again each time), `worker`, `node`.
        seed: of order and moments.
    """
    choices = random.Random(seed)
    victims = [victim for victim, number in kills.items() for _ in range(number)]
    choices.shuffle(victims)
    storage = open_storage(config.run_dir, s3=config.s3)
    driver = start(config, directory)
    for victim in victims:
        before = num_records(storage)
        wait_until(lambda before=before: num_records(storage) > before, driver=driver)  # type: ignore[misc]
        time.sleep(choices.uniform(0.0, 0.4))
        wait_until(lambda: bool(workers_of(second_raylet(cluster))), driver=driver)
        if victim == "driver":
            kill(driver)
            driver = start(config, directory)
        elif victim == "node":
            lose_second_node(cluster)
            cluster.add_node(num_cpus=config.cluster.num_workers)
        else:
            choices.choice(workers_of(second_raylet(cluster))).kill()
    finish(driver, directory)
