"""What a machine does to a tokenize job: a node of a cluster is lost, a disk is full."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from ray_cluster import lose_second_node, running_cluster
from small_disk import mounted_disk
from tokenize_process import finish, num_records, start, wait_until, workers_of
from toy_corpus import files_of, ten_crop_job, write_ten_crop_corpus

from pipeline.status import read_status
from pipeline.storage import open_storage
from pipeline.verify import verify_shard_set

NUM_UNITS = 60
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its tokenizer, and in `whole/` the set of an uninterrupted run."""
    return write_ten_crop_corpus(tmp_path_factory.mktemp("corpus"), num_tars=NUM_UNITS, samples_per_tar=20)


def num_working() -> int:
    """Workers that have loaded their tokenizer, on all nodes of this process's cluster."""
    return sum("__init__" not in " ".join(process.cmdline()) for process in workers_of(os.getpid()))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes with room for one worker each."""
    with running_cluster(head_cpus=1, second_node_cpus=1) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_lost_node_costs_its_units_in_flight_and_no_attempt(corpus: Path, tmp_path: Path, cluster: Cluster) -> None:
    run_dir, storage = tmp_path / "set", open_storage(str(tmp_path / "set"))
    # A single attempt: if the loss of a node cost one, the job would fail.
    config = ten_crop_job(corpus, run_dir, max_attempts=1, cluster={"address": cluster.address, "num_workers": 2})
    driver = start(config, tmp_path)
    wait_until(lambda: num_records(storage) >= 1 and num_working() == 2, driver=driver)
    lose_second_node(cluster)
    finish(driver, tmp_path)
    assert "its node was lost" in (tmp_path / "log.txt").read_text()
    assert files_of(run_dir) == files_of(corpus / "whole")
    assert verify_shard_set(storage) == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_machine_without_room_to_stage_leaves_the_units_to_others(
    corpus: Path, tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted_disk(tmp_path / "disk", kib=16) as disk, running_cluster(head_cpus=1, second_node_cpus=0) as cluster:
        monkeypatch.setenv("TMPDIR", str(disk))
        cluster.add_node(num_cpus=1)
        monkeypatch.delenv("TMPDIR")
        options = {"max_attempts": 1, "cluster": {"address": cluster.address, "num_workers": 2}}
        finish(start(ten_crop_job(corpus, s3_url, **options), tmp_path), tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert 1 <= log.count(f" in {disk} on {socket.gethostname()}: no space left on device") <= 2
    assert "is set aside" not in log
    storage = open_storage(s3_url)
    shards = {name: data for name, data in files_of(corpus / "whole").items() if name.startswith("shards/")}
    assert {name: storage.read_bytes(name) for name in storage.list("shards/")} == shards
    assert verify_shard_set(storage) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB, too small for the set."""
    with mounted_disk(tmp_path / "disk", kib=400) as disk:
        yield disk


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_fails_the_job_in_plain_words_and_a_larger_one_completes_it(
    corpus: Path, tmp_path: Path, small_disk: Path
) -> None:
    run_dir, storage = small_disk / "set", open_storage(str(small_disk / "set"))
    config = ten_crop_job(corpus, run_dir)
    driver = start(config, tmp_path)
    assert driver.wait(timeout=240) == 1
    log = (tmp_path / "log.txt").read_text()
    told = log.strip().splitlines()[-1]
    assert "no space left on device; free some space and run the same command again" in told
    assert "status.json" not in told
    assert "is set aside" not in log
    assert 0 < read_status(storage).num_units_done < NUM_UNITS
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    finish(start(config, tmp_path), tmp_path)
    assert files_of(run_dir) == files_of(corpus / "whole")
    assert verify_shard_set(storage) == []
