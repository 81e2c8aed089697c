"""The cache of shards: whole entries only, within its bound, shared by processes, whatever is killed."""

import dataclasses
import fcntl
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forbidden import forbidden
from small_disk import mounted_disk
from synthetic_shards import codes_of, write_shard_set

from pipeline import local_storage, shard_cache
from pipeline.ledger import read_manifest
from pipeline.shard_cache import ShardCache
from pipeline.shards import ShardInfo, ShardReader
from pipeline.storage import ArtifactError, Storage, open_storage

NUM_SHARDS, SAMPLES = 6, 40

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A set that stands for one on S3: the cache asks its storage for nothing but two files."""
    return open_storage(str(write_shard_set(tmp_path / "set", samples_per_shard=(SAMPLES,) * NUM_SHARDS)))


def infos(storage: Storage) -> list[ShardInfo]:
    return read_manifest(storage).shards


def open_shard(cache: ShardCache, storage: Storage, number: int) -> ShardReader:
    info = infos(storage)[number]
    return cache.open(storage, f"shards/{info.name}", info=info)


def is_right(reader: ShardReader, number: int) -> bool:
    first = number * SAMPLES
    wanted = [codes_of(first + i, num_views=1, codebook_size=16, num_codes=16).tolist() for i in range(SAMPLES)]
    return [reader.sample(i).codes_VT.tolist() for i in range(reader.num_samples)] == wanted


def entry_bytes(storage: Storage) -> int:
    return infos(storage)[0].bytes + 8 * (SAMPLES + 1)


def entries(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.directory.iterdir() if not path.name.startswith(".")}


def entry_of(storage: Storage, number: int) -> str:
    return f"{infos(storage)[number].sha256}.shard"


def test_a_shard_is_read_from_the_cache_once_it_is_there(storage: Storage, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    assert is_right(open_shard(cache, storage, 2), 2)
    for path in (tmp_path / "set" / "shards").iterdir():
        path.unlink()
    again = ShardCache(tmp_path / "cache", max_bytes=10**9)
    assert is_right(open_shard(again, storage, 2), 2)
    assert entries(cache) == {entry_of(storage, 2)}


def test_the_least_recently_used_entries_make_room(storage: Storage, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=int(3.4 * entry_bytes(storage)))
    for number in (0, 1, 2, 0, 3, 4):
        assert is_right(open_shard(cache, storage, number), number)
        assert sum(path.stat().st_size for path in cache.directory.iterdir()) <= cache.max_bytes
        time.sleep(0.01)
    assert entries(cache) == {entry_of(storage, number) for number in (0, 3, 4)}


def test_entries_in_use_stay_and_a_cache_full_of_them_is_an_error(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 0.3)
    cache = ShardCache(tmp_path / "cache", max_bytes=int(2.5 * entry_bytes(storage)))
    used = [open_shard(cache, storage, number) for number in (0, 1)]
    with pytest.raises(ArtifactError, match=r"00002\.tar: data\.max_cache_gb must have room beside the shards in use"):
        open_shard(cache, storage, 2)
    assert entries(cache) == {entry_of(storage, 0), entry_of(storage, 1)}
    assert is_right(used.pop(), 1)
    assert is_right(open_shard(cache, storage, 2), 2)
    assert entries(cache) == {entry_of(storage, 0), entry_of(storage, 2)}


def test_an_entry_stays_while_any_of_its_readers_uses_it(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 0.3)
    cache = ShardCache(tmp_path / "cache", max_bytes=int(1.5 * entry_bytes(storage)))
    first = open_shard(cache, storage, 0)
    second = open_shard(ShardCache(tmp_path / "cache", max_bytes=cache.max_bytes), storage, 0)
    del first
    with pytest.raises(ArtifactError, match="must have room beside the shards in use"):
        open_shard(cache, storage, 1)
    assert is_right(second, 0)
    del second
    assert is_right(open_shard(cache, storage, 1), 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KiB; six shards take 540."""
    with mounted_disk(tmp_path / "disk", kib=600) as disk:
        yield disk


@needs_root
def test_entries_make_room_where_the_disk_is_smaller_than_the_bound(storage: Storage, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(100_000))
    cache = ShardCache(small_disk / "cache", max_bytes=10**9)
    for number in (0, 1, 2, 3, 4, 5, 0):
        assert is_right(open_shard(cache, storage, number), number)
    assert len(entries(cache)) >= 3


@needs_root
def test_a_twentieth_of_the_disk_stays_free_for_others(storage: Storage, small_disk: Path) -> None:
    taken = 4096 * sum(-(-(info.bytes + 8 * (info.num_samples + 1)) // 4096) for info in infos(storage))
    (small_disk / "other").write_bytes(bytes(600 * 1024 - taken - 7 * 4096))  # all shards would leave 28 KiB at most
    cache = ShardCache(small_disk / "cache", max_bytes=10**9)
    for number in range(NUM_SHARDS):
        assert is_right(open_shard(cache, storage, number), number)
    (small_disk / "staged").write_bytes(bytes(30 * 1024))


@needs_root
def test_a_disk_full_of_shards_in_use_is_named(
    storage: Storage, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 0.3)
    (small_disk / "other").write_bytes(bytes(400_000))
    cache = ShardCache(small_disk / "cache", max_bytes=10**9)
    used = open_shard(cache, storage, 0)
    said = (
        rf"must have room beside the shards in use, got 1 with 0\.000182 on the disk of {cache.directory}; .*free some"
    )
    with pytest.raises(ArtifactError, match=said):
        [open_shard(cache, storage, number) for number in (1, 2)]
    assert is_right(used, 0)


@needs_root
def test_what_other_processes_are_downloading_is_counted_in_full(storage: Storage, small_disk: Path) -> None:
    cache = ShardCache(small_disk / "cache", max_bytes=10**9)
    begun = small_disk / "cache" / f"{'0' * 64}.staged"
    with begun.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(400_000)  # of which nothing is written yet
        for number in (0, 1, 2, 3):
            open_shard(cache, storage, number)
        file.write(bytes(400_000))


def test_a_mapped_entry_whose_file_is_removed_is_still_read(storage: Storage, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    reader = open_shard(cache, storage, 0)
    (cache.directory / entry_of(storage, 0)).unlink()
    assert is_right(reader, 0)


def test_a_directory_that_was_cleaned_away_is_made_again(storage: Storage, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "tmp" / "cache", max_bytes=10**9)
    first = open_shard(cache, storage, 0)
    shutil.rmtree(tmp_path / "tmp")
    assert is_right(open_shard(cache, storage, 1), 1)
    assert is_right(first, 0)
    assert entries(cache) == {entry_of(storage, 1)}


def clean_before(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *, call: str, suffix: str = "", numbers: Container[int] = (0,)
) -> list[int]:
    """Have the directory removed before calls of these numbers that name a file in it; returns those it came to."""
    really, cleaned, counter = getattr(os, call), [], itertools.count()

    def cleaned_call(path: Any, *args: Any, **named: Any) -> Any:
        is_of_cache = str(path).startswith(str(directory)) and str(path).endswith(suffix)
        if is_of_cache and (number := next(counter)) in numbers:
            cleaned.append(number)
            shutil.rmtree(directory)
        return really(path, *args, **named)

    monkeypatch.setattr(os, call, cleaned_call)
    return cleaned


@pytest.mark.parametrize(
    ("call", "suffix", "number"),
    [
        ("open", ".lock", 0),  # of the constructor
        ("open", ".lock", 1),  # before the download
        ("open", ".lock", 2),  # after it
        ("stat", "", 0),  # of the lock
        ("stat", "", 1),  # of the directory, while it is made again
        ("open", ".staged", 0),
        ("listdir", "", 0),
        ("statvfs", "", 0),
        ("rename", "", 0),
    ],
)
def test_a_directory_that_is_cleaned_away_at_any_moment_ends_no_read(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, suffix: str, number: int
) -> None:
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    cleaned = clean_before(monkeypatch, tmp_path / "cache", call=call, suffix=suffix, numbers=[number])
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    reader = open_shard(cache, storage, 1)
    assert cleaned == [number]
    assert is_right(reader, 1)
    del reader
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open
    assert is_right(open_shard(cache, storage, 1), 1)
    assert entries(cache) == {entry_of(storage, 1)}


def test_a_directory_that_is_cleaned_away_again_and_again_is_named_and_no_shard_to_remove(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    clean_before(monkeypatch, cache.directory, call="open", suffix=".staged", numbers=range(1000))
    said = r"fit into .*/cache, got .* No such file .*\.staged'; check data\.cache_dir and run the same command again$"
    with pytest.raises(ArtifactError, match=said):
        open_shard(cache, storage, 1)


def test_a_refused_shard_is_told_where_its_download_is_cleaned_away_too(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set" / "shards" / "00001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    cleaned = clean_before(monkeypatch, cache.directory, call="unlink")
    with pytest.raises(ArtifactError, match=r"download .*/00001\.tar: it must have the manifest's"):
        open_shard(cache, storage, 1)
    assert cleaned == [0]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe may stand where a shard is, as a disk that gives its bytes when the test wants; else it is refused."""
    monkeypatch.setattr(local_storage, "_open_regular", lambda path, flags=os.O_RDONLY: os.open(path, flags))


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("is_begun_again", [False, True])
def test_a_download_that_was_cleaned_away_is_read_and_commits_no_other(
    storage: Storage, tmp_path: Path, is_begun_again: bool
) -> None:
    path = tmp_path / "set" / "shards" / "00000.tar"
    whole = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    staged = cache.directory / entry_of(storage, 0).replace(".shard", ".staged")
    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(open_shard, cache, storage, 0)
        with path.open("wb", buffering=0) as pipe:
            pipe.write(whole[:60_000])
            shutil.rmtree(cache.directory)
            if is_begun_again:
                cache.directory.mkdir()
                staged.write_bytes(b"of another process")
            pipe.write(whole[60_000:])
        assert is_right(opening.result(), 0)
    assert entries(cache) == ({staged.name} if is_begun_again else set())


@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
def test_a_shard_that_is_not_as_its_manifest_says_is_refused_and_not_kept(
    storage: Storage, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "set" / "shards" / "00001.tar"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[700] ^= 1
    path.write_bytes({"cut": data[:-1], "longer": data + b"\0"}.get(damage, data))
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    with pytest.raises(ArtifactError, match=r"download .*/00001\.tar: (sha256 must be the manifest's|it must have)"):
        open_shard(cache, storage, 1)
    assert entries(cache) == set()
    assert is_right(open_shard(cache, storage, 0), 0)


@pytest.mark.parametrize("added", [1, 512, 2048])
def test_a_wrong_index_on_storage_harms_no_sample(storage: Storage, tmp_path: Path, added: int) -> None:
    path = tmp_path / "set" / "shards" / "00001.tar.idx"
    offsets = np.fromfile(path, dtype="<u8")
    offsets[3] += added
    path.write_bytes(offsets.tobytes())
    assert is_right(open_shard(ShardCache(tmp_path / "cache", max_bytes=10**9), storage, 1), 1)


def test_a_tar_of_fewer_samples_than_its_manifest_says_is_refused_and_not_kept(
    storage: Storage, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    info = dataclasses.replace(infos(storage)[1], num_samples=SAMPLES + 1)
    with pytest.raises(ArtifactError, match=r"download .*/00001\.tar: it must hold the manifest's 41 samples, got 40;"):
        cache.open(storage, f"shards/{info.name}", info=info)
    assert entries(cache) == set()


def test_a_file_that_is_no_shard_is_refused_and_not_kept(storage: Storage, tmp_path: Path) -> None:
    text = b"no tar" * 1000
    (tmp_path / "set" / "shards" / "00001.tar").write_bytes(text)
    info = dataclasses.replace(infos(storage)[1], bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    with pytest.raises(ArtifactError, match=r"download .*/00001\.tar: it must hold the manifest's 40 samples, got"):
        cache.open(storage, f"shards/{info.name}", info=info)
    assert entries(cache) == set()


def test_an_entry_of_another_size_is_downloaded_again(storage: Storage, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    open_shard(cache, storage, 0)
    os.truncate(cache.directory / entry_of(storage, 0), 1000)
    assert is_right(open_shard(cache, storage, 0), 0)


def test_a_sha256_that_would_be_a_path_is_refused(storage: Storage, tmp_path: Path) -> None:
    info = dataclasses.replace(infos(storage)[0], sha256="../" + "0" * 61)
    with pytest.raises(ArtifactError, match=r"sha256 in its manifest must be 64 hex digits, got '\.\./000"):
        ShardCache(tmp_path / "cache", max_bytes=10**9).open(storage, f"shards/{info.name}", info=info)


def test_a_missing_shard_is_named(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "set" / "shards" / "00001.tar").unlink()
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    with pytest.raises(ArtifactError, match=r"read .*/00001\.tar: it must be readable.*rerun the tokenize job"):
        open_shard(cache, storage, 1)
    assert entries(cache) == set()


def test_an_entry_that_may_not_be_read_is_no_lack_of_space(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = ShardCache(Path("cache"), max_bytes=10**9)
    cache.directory.chmod(0o777)
    open_shard(cache, storage, 0)
    (cache.directory / ".lock").chmod(0o666)
    said = r"read .*/00000\.tar: .* Permission denied.*; give the user of the job permission to read it$"
    info = infos(storage)[0]
    with forbidden(cache.directory / entry_of(storage, 0)), pytest.raises(ArtifactError, match=said):
        cache.open(storage, "shards/00000.tar", info=info)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"it must be a directory of ours to write in.*set data\.cache_dir"):
        ShardCache(tmp_path / "file" / "cache", max_bytes=1)


def open_slowly(directory: Path, set_dir: Path) -> None:
    """Open shard 0 in a process of its own; its tar is a pipe, so the download lasts as long as the writer wants."""
    open_shard(ShardCache(directory, max_bytes=10**9), open_storage(str(set_dir)), 0)


@pytest.mark.usefixtures("slow_disk")
def test_a_killed_download_leaves_nothing_that_is_trusted(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "set" / "shards" / "00000.tar"
    whole = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    process = multiprocessing.get_context("fork").Process(
        target=open_slowly, args=(tmp_path / "cache", tmp_path / "set")
    )
    process.start()
    with path.open("wb", buffering=0) as pipe:
        pipe.write(whole[:60_000])
        time.sleep(0.1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    path.unlink()
    path.write_bytes(whole)
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)
    assert entries(cache) == {entry_of(storage, 0).replace(".shard", ".staged")}
    assert is_right(open_shard(cache, storage, 1), 1)  # whoever makes room first removes it
    assert entries(cache) == {entry_of(storage, 1)}
    assert is_right(open_shard(cache, storage, 0), 0)


@pytest.mark.usefixtures("slow_disk")
def test_processes_that_need_a_shard_wait_for_the_one_that_downloads_it(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "set" / "shards" / "00000.tar"
    whole = path.read_bytes()
    path.unlink()
    os.mkfifo(path)  # whose content can be read only once
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache", tmp_path / "set")
    processes = [context.Process(target=open_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    with path.open("wb") as pipe:
        time.sleep(0.3)
        pipe.write(whole)
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert np.fromfile(tmp_path / "cache" / entry_of(storage, 0), dtype=np.uint8)[: len(whole)].tobytes() == whole
