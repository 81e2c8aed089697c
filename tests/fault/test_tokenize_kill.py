"""SIGKILL to the driver and to a worker of a tokenize job: the rerun ends in the bytes of an uninterrupted run."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from toy_corpus import files_of, tokenize_config, tokenize_here, write_tars, write_tiny_tokenizer

from pipeline.config import TokenizeConfig
from pipeline.local_storage import find_staged
from pipeline.storage import open_storage
from pipeline.tokenize import run_tokenize
from pipeline.verify import verify_shard_set

SCRIPT = Path(__file__).parents[1] / "run_tokenize_job.py"
NUM_UNITS = 6
pytestmark = pytest.mark.timeout(900)  # about a minute on two idle cores; each start of Ray suffers on busy ones


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its tokenizer, and in `whole/` the set of an uninterrupted run."""
    root = tmp_path_factory.mktemp("corpus")
    write_tiny_tokenizer(root / "tiny.safetensors")
    write_tars(root / "tars", num_tars=NUM_UNITS, samples_per_tar=40)
    tokenize_here(job(root, root / "whole"))
    return root


def job(corpus: Path, run_dir: Path) -> TokenizeConfig:
    source = {"kind": "webdataset", "urls": [f"{corpus}/tars/*.tar"]}
    # Ten views a sample make a unit last about a second.
    return tokenize_config(run_dir, source=source, weights=corpus / "tiny.safetensors", views={"kind": "ten_crop"})


def start(config: TokenizeConfig, directory: Path) -> subprocess.Popen[bytes]:
    (directory / "config.json").write_text(config.model_dump_json())
    with (directory / "log.txt").open("ab") as log:
        return subprocess.Popen([sys.executable, str(SCRIPT), str(directory / "config.json")], stdout=log, stderr=log)


def wait_until(condition: Callable[[], bool], *, driver: subprocess.Popen[bytes], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)


def kill(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Kill the driver alone and return the Ray processes that it leaves behind."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    return children


def is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return True  # it ended in between


def num_records(run_dir: Path) -> int:
    return len(list(run_dir.glob("ledger/[0-9]*.json")))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "ray is starting": lambda run_dir: (run_dir / "plan.json").exists(),
    "workers are writing": lambda run_dir: any(run_dir.glob("shards/.staged-*.tar-*")),
    "units are done": lambda run_dir: num_records(run_dir) >= 2,
}


@pytest.mark.parametrize("names", [["units are done"], pytest.param(list(MOMENTS), marks=pytest.mark.slow)])
def test_a_killed_driver_leaves_nothing_half_done(corpus: Path, tmp_path: Path, names: list[str]) -> None:
    run_dir = tmp_path / "set"
    config = job(corpus, run_dir)
    left_behind: list[psutil.Process] = []
    for name in names:
        driver = start(config, tmp_path)
        wait_until(lambda name=name: MOMENTS[name](run_dir), driver=driver)  # type: ignore[misc]
        left_behind += kill(driver)
        for path in run_dir.glob("ledger/[0-9]*.json"):
            assert files_of(run_dir)[f"shards/{path.stem}.tar"] == files_of(corpus / "whole")[f"shards/{path.stem}.tar"]
    assert 0 < num_records(run_dir) < NUM_UNITS
    driver = start(config, tmp_path)
    assert driver.wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()
    assert files_of(run_dir) == files_of(corpus / "whole")
    assert find_staged(run_dir) == []
    assert verify_shard_set(open_storage(str(run_dir))) == []
    # Ray's two agents notice late that their node is gone; whatever could still write must be.
    _, alive = psutil.wait_procs(left_behind, timeout=30)
    assert [process for process in alive if not is_agent(process)] == []


def test_a_killed_worker_is_replaced_and_its_unit_done_again(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "set"
    killed: list[int] = []
    start_s = time.time()

    def kill_a_busy_worker() -> None:
        while not killed:
            time.sleep(0.02)
            if num_records(run_dir) < 1:
                continue
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    is_ours = "UnitTokenizer" in " ".join(process.cmdline()) and process.create_time() > start_s
                    if is_ours and not killed:
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)

    killer = threading.Thread(target=kill_a_busy_worker, daemon=True)
    killer.start()
    run_tokenize(job(corpus, run_dir), progress=False)
    killer.join(timeout=10)
    assert len(killed) == 1
    assert files_of(run_dir) == files_of(corpus / "whole")
    assert verify_shard_set(open_storage(str(run_dir))) == []
