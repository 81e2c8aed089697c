"""What only S3 has: buckets, open uploads, staged files, other processes."""

import errno
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from python_child import run_python
from s3_faults import FaultPlan, fault_proxy
from s3_server import S3Server

from pipeline.config import S3Config
from pipeline.s3 import staging
from pipeline.s3.requests import S3Requests
from pipeline.s3.storage import S3Storage
from pipeline.storage import ArtifactError, StorageFullError, open_storage

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def storage(s3_url: str) -> S3Storage:
    return S3Storage(s3_url, config=S3Config())


def read_in_child(url: str) -> bytes:
    return open_storage(url).read_bytes("a")


STAGE = """
import sys, time
from pipeline.storage import open_storage
with open_storage(sys.argv[1]).stage("a.tar") as path:
    path.write_bytes(b"half")
    print("staged", flush=True)
    time.sleep(60)
"""

UPLOAD = """
import sys
from pathlib import Path

from pipeline.s3 import upload
from pipeline.storage import open_storage
upload.NUM_PARALLEL_PARTS = 1
with open_storage(sys.argv[1]).stage("a.tar") as path:
    path.write_bytes(b"n" * (40 << 20))
"""


def test_open_storage_makes_it_of_an_s3_url_without_touching_the_server(s3_url: str) -> None:
    storage = open_storage(s3_url + "/", s3=S3Config(endpoint_url="http://127.0.0.1:1"))
    assert isinstance(storage, S3Storage)
    assert storage.url == s3_url


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://bad bucket/x"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ArtifactError, match="an S3 URL must be s3://bucket/prefix, got "):
        S3Storage(url, config=S3Config())


def test_the_root_of_a_bucket_is_a_directory_too(storage: S3Storage, s3_server: S3Server) -> None:
    storage.write_bytes("a", b"1")
    root = S3Storage(f"s3://{s3_server.bucket}", config=S3Config())
    name = f"{storage.url.rpartition('/')[2]}/a"
    assert list(root.list(name[:-1])) == [name]
    assert root.read_bytes(name) == b"1"


def test_storage_is_imported_without_s3fs() -> None:
    code = "import sys, pipeline.storage, pipeline.local_storage; print({'s3fs', 'botocore'} & set(sys.modules))"
    assert run_python(code).communicate()[0].strip() == "set()"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_reads_what_its_parent_reads(storage: S3Storage, method: str) -> None:
    storage.write_bytes("a", b"shared")
    assert read_in_child(storage.url) == b"shared"
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_in_child, [storage.url] * 4) == [b"shared"] * 4


@pytest.mark.parametrize("read", ["list", "find", "read_bytes", "open", "map", "remove_staged", "exclusive"])
def test_every_reading_of_a_missing_bucket_says_so(s3_url: str, read: str) -> None:
    storage = S3Storage("s3://no-such-bucket/set", config=S3Config())
    with pytest.raises(
        ArtifactError, match=r"bucket no-such-bucket must exist, got 404.*; make it or correct the URL$"
    ):
        {
            "list": storage.list,
            "find": lambda: storage.find("a"),
            "read_bytes": lambda: storage.read_bytes("a"),
            "open": lambda: storage.open("a"),
            "map": lambda: storage.map("a"),
            "remove_staged": storage.remove_staged,
            "exclusive": lambda: storage.exclusive().__enter__(),
        }[read]()


def test_a_large_file_is_committed_in_parts(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * (33 * MIB // 256) + b"end"
    with fault_proxy(storage.requests.endpoint(), FaultPlan()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        with storage.stage("a") as path:
            path.write_bytes(data)
        expected = {"create_multipart_upload": 1, "upload_part": 3, "complete_multipart_upload": 1, "head_object": 1}
        assert proxy.counts == expected
    is_equal = storage.map("a") == data
    assert is_equal


def test_an_upload_of_a_killed_process_is_invisible_and_removed(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes("a.tar", b"old")
    with fault_proxy(storage.requests.endpoint(), FaultPlan(rate=1, faults=("delay",), delay_s=0.2)) as proxy:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            child = run_python(UPLOAD, storage.url)
        deadline = time.monotonic() + 30
        while proxy.counts["upload_part"] < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        child.kill()
        child.communicate()
        assert "complete_multipart_upload" not in proxy.counts
    neighbour = S3Storage(storage.url + "-2", config=S3Config())
    assert neighbour.remove_staged() == 0
    assert storage.read_bytes("a.tar") == b"old"
    assert list(storage.list()) == ["a.tar"]
    assert storage.remove_staged() == 1
    assert storage.remove_staged() == 0
    assert storage.read_bytes("a.tar") == b"old"


def test_many_objects_are_removed_side_by_side_and_not_all_at_once(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        storage.write_bytes(f"reports/{number:05d}.json", b"1")
    send, under_way, seen = S3Requests.send, 0, set()

    async def watched_send(self: S3Requests, method: str, **kwargs: Any) -> Any:
        nonlocal under_way
        under_way += 1
        seen.add(under_way)
        try:
            return await send(self, method, **kwargs)
        finally:
            under_way -= 1

    monkeypatch.setattr(S3Requests, "send", watched_send)
    storage.remove_all(f"reports/{number:05d}.json" for number in range(100))
    assert max(seen) == 32
    assert storage.list("reports/") == {}


def test_staged_files_lie_in_tmpdir(storage: S3Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)  # it remembers the first answer
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with storage.stage("shards/00000.tar") as path:
        assert path.name == "00000.tar"
        assert tmp_path in path.parents
        path.write_bytes(b"1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_tmpdir_without_room_for_a_directory_is_full(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    where = f"{tmp_path} on {socket.gethostname()}"
    place = f"stage {storage.url}/a in {where}: {os.strerror(number).lower()}; free some space there or set TMPDIR"
    with pytest.raises(StorageFullError, match=place), storage.stage("a"):
        raise AssertionError("staged nowhere")


def test_local_files_of_a_killed_process_are_removed_and_those_of_a_living_one_kept(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(staging, "YOUNG_S", -1.0)
    writer = run_python(STAGE, storage.url)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "staged\n"
    storage.remove_staged()
    assert len(list(tmp_path.glob("*/a.tar"))) == 1
    writer.kill()
    writer.communicate()
    storage.remove_staged()
    assert list(tmp_path.iterdir()) == []
