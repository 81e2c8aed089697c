"""What a caller of `Storage` may rely on, the same on a file system and on S3."""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.storage import ArtifactError, Storage, StorageFullError, open_storage


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    url = str(tmp_path / "set") if request.param == "local" else request.getfixturevalue("s3_url")
    return open_storage(url)


def test_written_bytes_are_read_back_and_found_and_listed(storage: Storage) -> None:
    info = storage.write_bytes("ledger/00000.json", b"{}")
    assert storage.read_bytes("ledger/00000.json") == b"{}"
    assert info.num_bytes == 2
    assert storage.find("ledger/00000.json") == info
    assert storage.list() == {"ledger/00000.json": info}


def test_a_url_of_a_file_names_it_for_others(storage: Storage) -> None:
    assert storage.url_of("shards/00000.tar") == f"{storage.url}/shards/00000.tar"


def test_a_missing_file_is_not_found(storage: Storage) -> None:
    assert storage.find("none") is None
    for read in (storage.read_bytes, storage.open, storage.map):
        with pytest.raises(FileNotFoundError, match="none"):
            read("none")
    storage.remove("none")


def test_an_empty_directory_lists_nothing(storage: Storage) -> None:
    assert storage.list() == {}
    assert storage.list("shards/") == {}


def test_a_listing_is_sorted_deep_and_without_hidden_names(storage: Storage) -> None:
    names = ["a/b/c", "a/b c+%41.txt", "a.tar", "b", "a/\u00e9"]
    for name in [*names, ".lock", ".staged-x", "a/.hidden", "a/.d/x"]:
        storage.write_bytes(name, b"1")
    assert list(storage.list()) == ["a.tar", "a/b c+%41.txt", "a/b/c", "a/\u00e9", "b"]
    assert list(storage.list("a/")) == ["a/b c+%41.txt", "a/b/c", "a/\u00e9"]
    assert list(storage.list("a/b")) == ["a/b c+%41.txt", "a/b/c"]
    assert [storage.read_bytes(name) for name in names] == [b"1"] * 5


def test_a_range_is_what_slicing_gives(storage: Storage) -> None:
    data = bytes(range(200))
    storage.write_bytes("a", data)
    for start, end in ((0, None), (0, 200), (5, 9), (5, None), (199, 200), (150, 500), (7, 7), (200, None), (300, 400)):
        assert storage.read_bytes("a", start=start, end=end) == data[start:end], (start, end)


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    info = storage.write_bytes("empty", b"")
    assert info.num_bytes == 0
    assert storage.find("empty") == info
    assert storage.read_bytes("empty") == b""
    assert bytes(storage.map("empty")) == b""
    with storage.open("empty") as file:
        assert file.read() == b""


def test_a_file_written_again_has_another_mark(storage: Storage) -> None:
    before = storage.write_bytes("a", b"old")
    after = storage.write_bytes("a", b"new")
    assert before.mark != after.mark
    assert storage.find("a") == after
    assert storage.read_bytes("a") == b"new"


def test_a_staged_file_appears_at_the_clean_exit(storage: Storage) -> None:
    with storage.stage("shards/00000.tar") as path:
        path.write_bytes(b"whole")
        assert storage.list() == {}
    assert not path.exists()
    assert storage.read_bytes("shards/00000.tar") == b"whole"


def test_a_failed_stage_leaves_the_old_file_and_no_local_one(storage: Storage) -> None:
    storage.write_bytes("a", b"old")

    def write_half() -> Path:
        with storage.stage("a") as path:
            path.write_bytes(b"half")
            paths.append(path)
            raise RuntimeError("boom")

    paths: list[Path] = []
    with pytest.raises(RuntimeError, match="boom"):
        write_half()
    assert storage.read_bytes("a") == b"old"
    assert list(storage.list()) == ["a"]
    assert not paths[0].exists()
    assert storage.remove_staged() == 0


def test_a_full_disk_is_told_with_its_place_and_commits_nothing(storage: Storage) -> None:
    def write() -> None:
        with storage.stage("a.tar") as path:
            path.symlink_to("/dev/full")
            path.write_bytes(b"1")

    with pytest.raises(StorageFullError, match=rf"{storage.url}/a.tar.*: no space left on device; free .* and "):
        write()
    assert storage.find("a.tar") is None
    assert storage.find_staged() == ()


def test_an_open_file_seeks_and_reads_as_bytes_do(storage: Storage) -> None:
    data = bytes(range(256)) * 5000
    storage.write_bytes("a", data)
    with storage.open("a") as file:
        assert file.seekable()
        assert file.read(10) == data[:10]
        assert file.seek(-7, 2) == len(data) - 7
        assert file.read() == data[-7:]
        assert file.read(1) == b""
        assert file.seek(1000) == 1000
        assert file.read(700_000) == data[1000:701_000]
        assert file.seek(3, 1) == file.tell() == 701_003
        assert file.read() == data[701_003:]
        file.seek(0)
        assert file.read() == data


def test_parquet_and_tar_are_read_through_an_open_file(storage: Storage, tmp_path: Path) -> None:
    table = pyarrow.table({"caption": [f"caption {i}" for i in range(5000)], "image": [bytes(200)] * 5000})
    with storage.stage("a.parquet") as path:
        pyarrow.parquet.write_table(table, path, row_group_size=1000)
    with storage.open("a.parquet") as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        assert parquet.num_row_groups == 5
        assert parquet.read_row_group(3, columns=["caption"])["caption"][7].as_py() == "caption 3007"
    with storage.stage("a.tar") as path, tarfile.open(path, "w") as tar:
        for name in ("one", "two", "three"):
            (tmp_path / name).write_bytes(name.encode() * 1000)
            tar.add(tmp_path / name, arcname=name)
    for mode in ("r|", "r:"):
        with storage.open("a.tar") as file, tarfile.open(fileobj=file, mode=mode) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}
        assert found == {name: name.encode() * 1000 for name in ("one", "two", "three")}


def test_map_returns_the_whole_file(storage: Storage) -> None:
    data = bytes(range(256)) * 400
    storage.write_bytes("a", data)
    assert bytes(storage.map("a")) == data
    assert bytes(storage.map("a")[256:512]) == bytes(range(256))


def test_many_are_removed_at_once_and_the_others_stay(storage: Storage) -> None:
    names = [f"reports/{number:05d}.json" for number in range(100)]
    for name in [*names[:99], "reports/record.json", "other"]:
        storage.write_bytes(name, b"1")
    storage.remove_all(iter(names))  # the last of them was not there
    assert list(storage.list()) == ["other", "reports/record.json"]
    storage.remove_all([])


def test_removed_means_gone(storage: Storage) -> None:
    storage.write_bytes("a", b"1")
    storage.remove("a")
    assert storage.find("a") is None
    assert storage.list() == {}


def test_one_job_at_a_time_holds_the_directory(storage: Storage) -> None:
    with storage.exclusive():
        with pytest.raises(ArtifactError, match="one job at a time"), storage.exclusive():
            raise AssertionError("held twice")
        storage.write_bytes("a", b"1")
    with storage.exclusive():
        assert list(storage.list()) == ["a"]


def test_threads_may_share_a_storage(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.write_bytes(f"{i:03d}", b"%d" % i), range(40)))
        assert list(pool.map(lambda i: storage.read_bytes(f"{i:03d}"), range(40))) == [b"%d" % i for i in range(40)]
    assert len(storage.list()) == 40
