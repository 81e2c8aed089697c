"""Batches of a shard set on S3 are those of the same set on a disk, while half of the exchanges break too."""

import os
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from s3_faults import FaultPlan, fault_proxy
from s3_server import S3Server
from synthetic_shards import train_config, write_shard_set

from jobs.inputs import check_inputs
from pipeline import shard_cache
from pipeline.config import LoaderConfig, S3Config
from pipeline.loader import Batch, Loader, check_room, open_cache, open_parts
from pipeline.s3 import requests
from pipeline.storage import ArtifactError, open_storage
from training.data import open_shards

SAMPLES_PER_SHARD = (20, 7, 30, 11, 25, 16, 9, 21, 13, 18)
FIELDS = ("codes_BT", "labels_B", "parts_B", "sample_indices_B", "counters_B")


def upload(source: Path, url: str) -> None:
    storage = open_storage(url)
    for path in source.rglob("*"):
        if path.is_file():
            storage.write_bytes(path.relative_to(source).as_posix(), path.read_bytes())


@pytest.fixture
def local(s3_url: str, tmp_path: Path) -> Path:
    """A set on a disk; the same one is at `s3_url`."""
    path = write_shard_set(tmp_path / "set", samples_per_shard=SAMPLES_PER_SHARD, num_views=2)
    upload(path, s3_url)
    return path


def batches(
    url: str, *, cache_dir: Path, s3: S3Config | None = None, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """Two epochs and a half of a rank's batches."""
    config = LoaderConfig(shards=url, shuffle_window_shards=2, seed=3, cache_dir=str(cache_dir), max_cache_gb=1e-3)
    shard_sets = open_parts(config, s3=s3 or S3Config(), cache=open_cache(config, urls=[url]))
    with Loader(shard_sets, config=config, global_batch_size=12, rank=rank, world_size=world_size) as loader:
        return [loader.batch(position) for position in range(0, 425, 12)]


def are_equal(some: list[Batch], others: list[Batch]) -> bool:
    return all(
        np.array_equal(getattr(one, field), getattr(other, field))
        for one, other in zip(some, others, strict=True)
        for field in FIELDS
    )


def test_batches_are_those_of_the_local_set(local: Path, s3_url: str, tmp_path: Path) -> None:
    assert are_equal(batches(s3_url, cache_dir=tmp_path / "cache"), batches(str(local), cache_dir=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_ranks_of_a_machine_download_each_shard_once(
    local: Path, s3_url: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with fault_proxy(s3_server.endpoint_url) as proxy:
        s3 = S3Config(endpoint_url=proxy.endpoint_url)
        ranks = [batches(s3_url, cache_dir=tmp_path / "cache", s3=s3, rank=r, world_size=2) for r in (0, 1)]
        tars = sum(path.stat().st_size for path in (local / "shards").glob("*.tar"))
        manifest = (local / "manifest.json").stat().st_size
        assert proxy.body_bytes["get_object"] <= tars + 2 * manifest
    whole = batches(str(local), cache_dir=tmp_path)
    for field in FIELDS:
        parts = [np.concatenate([getattr(batch, field) for batch in pair]) for pair in zip(*ranks, strict=True)]
        assert all(np.array_equal(part, getattr(batch, field)) for part, batch in zip(parts, whole, strict=True))


@pytest.mark.parametrize("seed", [1, 2])
def test_batches_are_the_same_while_half_of_the_exchanges_break(
    local: Path, s3_url: str, s3_server: S3Server, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "BACKOFF_FIRST_S", 0.005)
    with fault_proxy(s3_server.endpoint_url, FaultPlan(rate=0.5, seed=seed)) as proxy:
        s3 = S3Config(endpoint_url=proxy.endpoint_url, max_attempts=12)
        found = batches(s3_url, cache_dir=tmp_path / "cache", s3=s3)
        assert proxy.faults.total() >= 5
    assert are_equal(found, batches(str(local), cache_dir=tmp_path / "none"))


def test_a_cache_smaller_than_its_windows_is_refused_with_the_size_it_must_have(
    local: Path, s3_url: str, tmp_path: Path
) -> None:
    config = LoaderConfig(shards=s3_url, shuffle_window_shards=2, cache_dir=str(tmp_path / "cache"), max_cache_gb=1e-4)
    cache = open_cache(config, urls=[s3_url])
    sizes = sorted(tar.stat().st_size + Path(f"{tar}.idx").stat().st_size for tar in (local / "shards").glob("*.tar"))
    # Four windows of 2 shards, and the shard of 7 samples that 3 batches of 4 may hold whole; another has 9.
    with pytest.raises(ArtifactError, match=rf"max_cache_gb must be at least {sum(sizes[-9:]) / 1e9:.3g}, "):
        check_room(open_parts(config, s3=S3Config(), cache=cache), cache=cache, config=config, global_batch_size=4)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_smaller_than_the_windows_is_refused_with_the_room_it_must_have(
    local: Path, s3_url: str, tmp_path: Path
) -> None:
    config = LoaderConfig(shards=s3_url, cache_dir=str(tmp_path / "disk"))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=True)
    try:
        cache = open_cache(config, urls=[s3_url])
        (disk / ("0" * 64 + ".shard")).write_bytes(bytes(100_000))  # another set's, that may go
        total = sum(tar.stat().st_size + Path(f"{tar}.idx").stat().st_size for tar in (local / "shards").glob("*.tar"))
        said = (
            rf"open shard cache {disk}: its disk must have room for {total / 1e9:.3g} GB, .* got 0\.000292; free some"
        )
        with pytest.raises(ArtifactError, match=said):
            check_room(open_parts(config, s3=S3Config(), cache=cache), cache=cache, config=config, global_batch_size=4)
        run = train_config(tmp_path / "run", shards=s3_url, data__cache_dir=str(disk), cluster__gpus_per_worker=1)
        engine = run.engine.model_copy(update={"ops": "reference"})
        with pytest.raises(ArtifactError, match="its disk must have room for"):
            check_inputs(run.model_copy(update={"engine": engine}), is_new=True)
        joined = run.cluster.model_copy(update={"address": "auto"})  # its other machines have their own disks and GPUs
        check_inputs(run.model_copy(update={"cluster": joined}), is_new=True)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_cache_as_large_as_asked_for_serves_ranks_whose_batch_spans_many_windows(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 10.0)
    upload(write_shard_set(tmp_path / "set", samples_per_shard=(10,) * 60), s3_url)
    small = LoaderConfig(shards=s3_url, shuffle_window_shards=1, cache_dir=str(tmp_path / "cache"), max_cache_gb=1e-9)
    cache = open_cache(small, urls=[s3_url])
    with pytest.raises(ArtifactError, match="max_cache_gb must be at least") as refusal:
        check_room(open_parts(small, s3=S3Config(), cache=cache), cache=cache, config=small, global_batch_size=96)
    asked = re.search(r"at least ([\d.e-]+)", str(refusal.value))
    assert asked is not None
    config = small.model_copy(update={"max_cache_gb": float(asked[1]) * 1.001})  # which is rounded to three digits
    together = threading.Barrier(4)

    def read(rank: int) -> int:
        shard_sets = open_parts(config, s3=S3Config(), cache=open_cache(config, urls=[s3_url]))
        with Loader(shard_sets, config=config, global_batch_size=96, rank=rank, world_size=4) as loader:
            for position in range(0, 960, 96):
                loader.batch(position)
                together.wait(60)
        return rank

    with ThreadPoolExecutor(4) as ranks:
        assert list(ranks.map(read, range(4))) == [0, 1, 2, 3]


def test_a_shard_that_is_gone_ends_the_run_with_its_name(local: Path, s3_url: str, tmp_path: Path) -> None:
    open_storage(s3_url).remove("shards/00004.tar")
    with pytest.raises(ArtifactError, match=rf"read {s3_url}/shards/00004\.tar: it must be readable"):
        batches(s3_url, cache_dir=tmp_path / "cache")


def test_a_train_spec_reads_its_sets_from_s3(local: Path, s3_url: str, tmp_path: Path) -> None:
    config = train_config(
        tmp_path / "run", shards=s3_url, data__cache_dir=str(tmp_path / "cache"), validation={"shards": s3_url}
    )
    shard_sets, held_out = open_shards(config)
    assert held_out is not None
    indices = np.arange(0, 170, 17)
    wanted, labels = open_shards(train_config(tmp_path / "run", shards=str(local)))[0][0].read_batch(
        indices, views=np.zeros_like(indices)
    )
    for shard_set in (*shard_sets, held_out):
        codes_BT, labels_B = shard_set.read_batch(indices, views=np.zeros_like(indices))
        assert codes_BT.tolist() == wanted.tolist()
        assert labels_B.tolist() == labels.tolist()
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 6  # once for both sets: those that hold the ten samples
