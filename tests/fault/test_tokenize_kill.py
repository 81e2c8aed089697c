"""SIGKILL to driver, workers and nodes of a tokenize job: the rerun ends in the bytes of an uninterrupted run."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ray_cluster import running_cluster
from tokenize_process import finish, kill, num_records, run_with_kills, start, wait_until, workers_of
from toy_corpus import files_of, ten_crop_job, write_ten_crop_corpus

from pipeline.ledger import read_manifest, read_poison
from pipeline.local_storage import find_staged
from pipeline.status import read_status
from pipeline.storage import Storage, open_storage
from pipeline.verify import verify_shard_set

POISON_SITE = Path(__file__).parent / "poison_site"
NUM_UNITS = 6
LONG_NUM_UNITS = 240
pytestmark = pytest.mark.timeout(900)  # about a minute on two idle cores; each start of Ray suffers on busy ones


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its tokenizer, and in `whole/` the set of an uninterrupted run."""
    return write_ten_crop_corpus(tmp_path_factory.mktemp("corpus"), num_tars=NUM_UNITS, samples_per_tar=40)


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `corpus`, of many small units."""
    return write_ten_crop_corpus(tmp_path_factory.mktemp("long"), num_tars=LONG_NUM_UNITS, samples_per_tar=12)


def contents_of(storage: Storage) -> dict[str, bytes]:
    """The shards, indices, rejects and manifest of a set."""
    names = [*storage.list("shards/"), *storage.list("rejects/"), "manifest.json"]
    return {name: storage.read_bytes(name) for name in names}


def is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return True  # it ended in between


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "ray is starting": lambda run_dir: (run_dir / "plan.json").exists(),
    "workers are writing": lambda run_dir: any(run_dir.glob("shards/.staged-*.tar-*")),
    "units are done": lambda run_dir: num_records(open_storage(str(run_dir))) >= 2,
}


@pytest.mark.parametrize("names", [["units are done"], pytest.param(list(MOMENTS), marks=pytest.mark.slow)])
def test_a_killed_driver_leaves_nothing_half_done(corpus: Path, tmp_path: Path, names: list[str]) -> None:
    run_dir = tmp_path / "set"
    config = ten_crop_job(corpus, run_dir)
    left_behind: list[psutil.Process] = []
    for name in names:
        driver = start(config, tmp_path)
        wait_until(lambda name=name: MOMENTS[name](run_dir), driver=driver)  # type: ignore[misc]
        left_behind += kill(driver)
        for path in run_dir.glob("ledger/[0-9]*.json"):
            assert files_of(run_dir)[f"shards/{path.stem}.tar"] == files_of(corpus / "whole")[f"shards/{path.stem}.tar"]
    assert 0 < num_records(open_storage(str(run_dir))) < NUM_UNITS
    driver = start(config, tmp_path)
    finish(driver, tmp_path)
    assert files_of(run_dir) == files_of(corpus / "whole")
    assert find_staged(run_dir) == []
    assert verify_shard_set(open_storage(str(run_dir))) == []
    # Ray's two agents notice late that their node is gone; whatever could still write must be.
    _, alive = psutil.wait_procs([process for process in left_behind if not is_agent(process)], timeout=30)
    assert [process for process in alive if not is_agent(process)] == []  # their names come late, too


def test_a_killed_worker_is_replaced_and_its_unit_done_again(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "set"
    storage = open_storage(str(run_dir))
    config = ten_crop_job(corpus, run_dir, cluster={"num_workers": 1})
    driver = start(config, tmp_path)
    wait_until(lambda: num_records(storage) >= 1 and bool(workers_of(driver.pid)), driver=driver)
    workers_of(driver.pid)[0].send_signal(signal.SIGKILL)
    finish(driver, tmp_path)
    assert "its worker died" in (tmp_path / "log.txt").read_text()
    assert files_of(run_dir) == files_of(corpus / "whole")
    assert verify_shard_set(storage) == []


@pytest.mark.slow
def test_a_job_whose_own_ray_died_ends_and_says_to_run_it_again(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "set"
    config = ten_crop_job(corpus, run_dir)
    driver = start(config, tmp_path)
    wait_until(lambda: num_records(open_storage(str(run_dir))) >= 1, driver=driver)
    (raylet,) = (child for child in psutil.Process(driver.pid).children() if child.name() == "raylet")
    for process in (raylet, *workers_of(driver.pid)):
        process.kill()
    assert driver.wait(timeout=240) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "the Ray that this job started must stay alive, got its node dead" in log
    assert "run the same command again, what is committed is kept" in log
    finish(start(config, tmp_path), tmp_path)
    assert files_of(run_dir) == files_of(corpus / "whole")


@pytest.mark.slow
def test_a_unit_that_kills_its_workers_is_set_aside_and_the_others_are_done(corpus: Path, tmp_path: Path) -> None:
    """Only the unit at fault is given up, though other units were in the hands of the workers that it killed."""
    run_dir, storage = tmp_path / "set", open_storage(str(tmp_path / "set"))
    config = ten_crop_job(corpus, run_dir)
    driver = start(config, tmp_path, PYTHONPATH=f"{POISON_SITE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert driver.wait(timeout=240) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "at most 0 of 6 units may fail, got 1: unit 2 (00002.tar): its worker died" in log
    assert len(read_poison(storage, "00002").problems) == 3
    assert read_status(storage).num_units_done == 5
    assert [poison.unit for poison in read_status(storage).poison] == ["00002.tar"]
    assert storage.find("manifest.json") is None
    left_out = config.model_copy(update={"max_poison_units": 1, "max_attempts": 1})
    finish(start(left_out, tmp_path, PYTHONPATH=str(POISON_SITE)), tmp_path)
    assert verify_shard_set(storage) == []
    assert read_manifest(storage).poison_units == [2]
    finish(start(config, tmp_path), tmp_path)  # mended: nothing kills it any more
    assert files_of(run_dir) == files_of(corpus / "whole")
    assert read_status(storage).poison == []


@pytest.mark.slow
def test_units_that_kill_their_worker_are_left_out_as_many_as_may_be(corpus: Path, tmp_path: Path) -> None:
    # Two attempts each, six deaths in a row: more than may be where workers only die.
    fields = {"max_attempts": 2, "max_poison_units": 3, "cluster": {"num_workers": 1}}
    config = ten_crop_job(corpus, tmp_path / "set", **fields)
    finish(start(config, tmp_path, PYTHONPATH=str(POISON_SITE), POISON="00001 00003 00004"), tmp_path)
    storage = open_storage(str(tmp_path / "set"))
    assert read_manifest(storage).poison_units == [1, 3, 4]
    assert verify_shard_set(storage) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "kills"),
    [
        pytest.param("local", {"driver": 2, "worker": 3, "node": 2}, id="seven"),
        pytest.param("local", {"driver": 6, "worker": 8, "node": 6}, id="twenty", marks=pytest.mark.soak),
        pytest.param("s3", {"driver": 4, "worker": 4, "node": 4}, id="s3", marks=pytest.mark.soak),
    ],
)
def test_many_kills_of_drivers_workers_and_nodes_end_in_the_bytes_of_a_clean_run(
    long_corpus: Path, tmp_path: Path, request: pytest.FixtureRequest, place: str, kills: dict[str, int]
) -> None:
    run_dir = str(tmp_path / "set") if place == "local" else request.getfixturevalue("s3_url")
    # Only now: its workers inherit the address of the S3 server.
    with running_cluster(head_cpus=0, second_node_cpus=2) as cluster:
        fields = {"max_attempts": 20, "cluster": {"address": cluster.address, "num_workers": 2}}
        config = ten_crop_job(long_corpus, run_dir, **fields)
        run_with_kills(config, tmp_path, cluster=cluster, kills=kills, seed=5)
    assert "its node was lost" in (tmp_path / "log.txt").read_text()
    storage = open_storage(run_dir)
    assert verify_shard_set(storage) == []  # which also finds staged leftovers and a ledger that does not balance
    assert contents_of(storage) == contents_of(open_storage(str(long_corpus / "whole")))
    assert read_manifest(storage).totals.num_read == LONG_NUM_UNITS * 12
