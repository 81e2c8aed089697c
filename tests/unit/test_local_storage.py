"""Stage and commit: a name is whole or absent, leftovers are found, one writer at a time."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from disk_calls import record_disk_calls

from pipeline.config import S3Config
from pipeline.local_storage import (
    LocalStorage,
    commit,
    exclusive,
    find_staged,
    is_held,
    local_path,
    remove_staged,
    sha256_of_file,
    stage,
    write_bytes,
    write_json,
)
from pipeline.sources.tar_samples import read_groups
from pipeline.storage import ArtifactError, StorageUnavailableError, open_storage


def test_nothing_is_visible_before_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with stage(path) as staged_path:
        staged_path.write_bytes(b"whole")
        assert not path.exists()
        assert staged_path.parent == path.parent
        assert staged_path.name.startswith(".staged-a.bin-")
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bin"]


def test_a_file_is_on_disk_before_its_name_and_its_name_before_the_commit_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_disk_calls(monkeypatch, root=tmp_path)
    LocalStorage(tmp_path).write_bytes("set/a.bin", b"whole")
    assert calls == ["fsync .", "fsync set/*", "rename to set/a.bin", "fsync set"]  # first that `set` is there
    calls.clear()
    LocalStorage(tmp_path).remove("set/a.bin")
    assert calls == ["unlink set/a.bin", "fsync set"]


def test_a_directory_is_on_disk_with_all_below_it_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half" / "inner").mkdir(parents=True)
    (tmp_path / "half" / "inner" / "a").write_text("1")
    calls = record_disk_calls(monkeypatch, root=tmp_path)
    commit(tmp_path / "half", tmp_path / "whole")
    assert sorted(calls[:-2]) == ["fsync half", "fsync half/inner", "fsync half/inner/a"]
    assert calls[-2:] == ["rename to whole", "fsync ."]


def test_an_error_leaves_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with stage(path) as staged_path:
            staged_path.write_bytes(b"half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), stage(tmp_path / "a.bin"):
        pass


def test_a_directory_is_committed_whole(tmp_path: Path) -> None:
    with stage(tmp_path / "step") as staged_path:
        (staged_path / "inner").mkdir(parents=True)
        (staged_path / "inner" / "a").write_text("1")
        assert not (tmp_path / "step").exists()
    assert (tmp_path / "step" / "inner" / "a").read_text() == "1"
    assert find_staged(tmp_path) == []


def test_leftovers_of_killed_runs_are_found_and_removed(tmp_path: Path) -> None:
    (tmp_path / "shards" / ".staged-b-2-beef").mkdir(parents=True)
    (tmp_path / "shards" / ".staged-b-2-beef" / "x").write_text("half")
    (tmp_path / ".staged-a-1-dead").write_text("half")
    (tmp_path / "shards" / "00000.tar").write_text("data")
    assert [path.name for path in find_staged(tmp_path)] == [".staged-a-1-dead", ".staged-b-2-beef"]
    assert remove_staged(tmp_path) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["00000.tar"]


def test_many_removals_sync_each_directory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{folder}/{number}" for folder in "ab" for number in range(5)]
    for name in names:
        LocalStorage(tmp_path).write_bytes(name, b"1")
    calls = record_disk_calls(monkeypatch, root=tmp_path)
    LocalStorage(tmp_path).remove_all(names)
    assert calls[:10] == [f"unlink {name}" for name in names]
    assert sorted(calls[10:]) == ["fsync a", "fsync b"]


def test_json_keeps_its_order_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "ü"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert list(json.loads(text).items()) == [("b", 1), ("a", "ü")]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads(text) == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    first, second = exclusive(tmp_path / "run"), exclusive(tmp_path / "run")
    with first, pytest.raises(ArtifactError, match="one job at a time"):
        second.__enter__()
    with exclusive(tmp_path / "run"):
        pass


def test_a_look_tells_a_writer_and_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert not is_held(directory)
    assert not directory.exists()
    with exclusive(directory):
        assert is_held(directory)
    assert not is_held(directory)


def test_a_writer_that_begins_while_others_look_is_not_refused(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        pass
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            is_held(tmp_path)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(300):
            with exclusive(tmp_path):
                pass
    finally:
        is_over.set()
        for looker in lookers:
            looker.join()


@pytest.mark.parametrize("url", ["s3://bucket/x", "s3:/bucket/x"])
def test_object_storage_is_refused_by_name(url: str) -> None:
    with pytest.raises(ArtifactError, match=url):
        local_path(url)


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3:/bucket/x", "S3://bucket/x"])
def test_what_is_neither_a_path_nor_s3_is_refused_by_name(url: str) -> None:
    with pytest.raises(ArtifactError, match=f"open {url}: storage must be a path or an s3:// URL, got '{url}'; "):
        open_storage(url)


@pytest.mark.parametrize("path", ["a:b/c", "./s3:/x", "/s3:/x", "runs/2026-11-28T02:00"])
def test_a_path_with_a_colon_is_a_path(path: str) -> None:
    assert open_storage(path).url == str(Path(path))


def test_a_link_to_a_directory_is_listed_but_not_one_that_leads_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "a" / "b").mkdir(parents=True)
    elsewhere.mkdir()
    (root / "a" / "b" / "1.txt").write_text("1")
    (elsewhere / "2.txt").write_text("2")
    (root / "a" / "link").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "a")
    (root / "a" / "b" / "up").symlink_to(root)
    (elsewhere / "self").symlink_to(elsewhere)
    names = ["a/b/1.txt", "a/link/2.txt", "again/b/1.txt", "again/link/2.txt"]
    assert list(LocalStorage(root).list()) == names
    told = f"list {root}/a/b/up: the link leads back to a directory above it and is left out"
    assert told in [record.getMessage() for record in caplog.records]
    for prefix in ("a/", "a/b/", "a/b/up/", "a/link/", "a/link/self/", "again/b/", "none/"):
        assert list(LocalStorage(root).list(prefix)) == [name for name in names if name.startswith(prefix)], prefix


def test_a_link_to_nothing_is_no_shorter_listing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "1.txt").write_text("1")
    (root / "a" / ".hidden").symlink_to(tmp_path / "gone")
    assert list(LocalStorage(root).list()) == ["1.txt"]
    for target in ("/gone/away.png", "../1.txt/x", "self.png"):
        (root / "a" / "self.png").symlink_to(target)
        for prefix in ("", "a/", "a/s"):
            with pytest.raises(ArtifactError) as caught:
                LocalStorage(root).list(prefix)
            assert str(caught.value) == (
                f"list {root}/a/self.png: a link must lead to a file or folder, got one to {target!r}, where there is "
                "none; mend or remove the link"
            )
        assert LocalStorage(root).list("a/t") == {}
        (root / "a" / "self.png").unlink()


@pytest.mark.parametrize(
    ("start", "end", "want"), [(0, None, b"0123456789"), (3, 5, b"34"), (8, 99, b"89"), (4, 4, b"")]
)
def test_a_range_of_a_file_is_read(tmp_path: Path, start: int, end: int | None, want: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    assert LocalStorage(tmp_path).read_bytes("a.bin", start=start, end=end) == want


FAILING_FILE = Path("/proc/self/mem")
"""Address 0 of a process is never mapped: the kernel answers a read of it with EIO."""


def test_a_file_system_that_fails_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to(FAILING_FILE)
    said = f"read {tmp_path}/a.tar: the file system must answer, got Input/output error; check the disk or the mount"
    with LocalStorage(tmp_path).open("a.tar") as file, pytest.raises(StorageUnavailableError, match=said):
        file.read(100)
    with LocalStorage(tmp_path).open("a.tar") as file, pytest.raises(StorageUnavailableError, match=said):
        file.read()
    with pytest.raises(StorageUnavailableError, match=said):
        list(read_groups(f"{tmp_path}/a.tar", s3=S3Config()))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.ENOTCONN])
def test_a_mount_that_is_gone_is_told_by_every_look_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_bytes("a.bin", b"0123")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("pread", "scandir", "fsync"):
        monkeypatch.setattr(os, name, fail)
    for look in (lambda: storage.read_bytes("a.bin"), storage.list, lambda: storage.write_bytes("a.bin", b"4567")):
        with pytest.raises(StorageUnavailableError, match=os.strerror(number)):
            look()
    monkeypatch.undo()
    assert storage.list().keys() == {"a.bin"}
    assert storage.read_bytes("a.bin") == b"0123"


def test_what_is_missing_or_forbidden_is_no_outage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LocalStorage(tmp_path).open("a.bin")
    with pytest.raises(IsADirectoryError):
        LocalStorage(tmp_path).read_bytes("")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", ["read_bytes", "open", "map"])
def test_a_pipe_is_an_error_and_not_waited_for(tmp_path: Path, read: str) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match=r"not a regular file: '.*/a\.png'"):
        getattr(LocalStorage(tmp_path), read)("a.png")
