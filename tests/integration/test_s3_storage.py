"""What only S3 has: credentials and their errors, open uploads, the lock object, other processes."""

import errno
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_faults import FaultPlan, fault_proxy
from s3_server import S3Server

from pipeline.config import S3Config
from pipeline.s3 import lock, staging
from pipeline.s3.storage import S3Storage
from pipeline.storage import ArtifactError, DirectoryInUseError, StorageFullError, StorageUnavailableError, open_storage

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def storage(s3_url: str) -> S3Storage:
    return S3Storage(s3_url, config=S3Config())


def read_in_child(url: str) -> bytes:
    return open_storage(url).read_bytes("a")


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


HOLD = """
import sys, time
from pipeline.storage import open_storage
with open_storage(sys.argv[1]).exclusive():
    print("held", flush=True)
    time.sleep(60)
"""

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


def test_a_wrong_secret_is_denied_and_told_without_it(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage.write_bytes("a", b"1")
    secret = "wrong-secret-0123456789abcdef"  # a value to look for, of no service
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    caplog.set_level(logging.DEBUG)
    for use in (storage.list, lambda: storage.read_bytes("a"), lambda: storage.write_bytes("a", b"2")):
        with pytest.raises(
            ArtifactError, match=r"the credentials must allow it, got 403 SignatureDoesNotMatch; "
        ) as got:
            use()
        assert "\n" not in str(got.value)
        assert secret not in "".join(traceback.format_exception(got.value))
    with pytest.raises(ArtifactError, match="the credentials must allow it, got 403; "):
        storage.find("a")
    assert secret not in caplog.text
    assert secret not in repr(storage) + repr(vars(storage)) + str(storage) + repr(vars(storage.requests))
    assert secret not in repr(storage.requests.file_system()) + repr(vars(storage.requests.file_system()))


def test_no_credentials_say_where_to_put_them(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(ArtifactError, match=r"standard chain, got NoCredentialsError; set AWS_ACCESS_KEY_ID and"):
        storage.list()


@pytest.mark.parametrize("variable", ["AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", ""])
def test_credentials_renewed_in_their_file_are_seen_by_a_living_process(
    storage: S3Storage, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    path = tmp_path / ".aws" / "credentials"
    path.parent.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    if variable:
        path = tmp_path / "elsewhere"
        monkeypatch.setenv(variable, str(path))
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    for name in names:
        monkeypatch.delenv(name)
    path.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = old\n")
    os.utime(path, times=(0, 0))  # what was just written might be half of a file
    with pytest.raises(StorageUnavailableError, match="the credentials must allow it, got 403 InvalidAccessKeyId; "):
        storage.write_bytes("a", b"1")
    lines = [f"{name.lower()} = {s3_server.variables[name]}\n" for name in names]
    path.write_text("[default]\n" + "".join(lines))
    assert storage.write_bytes("a", b"1").num_bytes == 1


@pytest.mark.parametrize("written", ["nothing", "half a section", "no secret", "half a secret"])
def test_a_credentials_file_that_is_being_written_is_waited_for(
    s3_server: S3Server,
    s3_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    written: str,
) -> None:
    caplog.set_level(logging.INFO)
    storage = S3Storage(s3_url, config=S3Config())
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    for name in names:
        monkeypatch.delenv(name)
    whole = "[default]\n" + "".join(f"{name.lower()} = {s3_server.variables[name]}\n" for name in names)
    num_chars = {
        "nothing": 0,
        "half a section": 5,
        "no secret": whole.index("aws_secret"),
        "half a secret": len(whole) - 20,
    }
    path.write_text(whole[: num_chars[written]])
    written_ns = path.stat().st_mtime_ns
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(storage.write_bytes, "a", b"1")
        while "s3 retry" not in caplog.text and not asked.done():
            time.sleep(0.01)
        with path.open("r+") as file:
            file.write(whole)
        os.utime(path, ns=(written_ns, written_ns))
        assert asked.result(timeout=30).num_bytes == 1


def test_a_credentials_file_that_stays_torn_is_named(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    path.write_text("[default")
    os.utime(path, times=(0, 0))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(
        StorageUnavailableError, match=rf"standard chain, got {path}, which cannot be parsed; .*correct"
    ):
        storage.list()


def test_an_unreachable_endpoint_is_named(s3_url: str) -> None:
    storage = S3Storage(s3_url, config=S3Config(endpoint_url="http://127.0.0.1:1", max_attempts=2))
    rule = "http://127.0.0.1:1 must answer, got EndpointConnectionError in 2 attempts; check s3.endpoint_url"
    with pytest.raises(ArtifactError, match=rule):
        storage.list()


@pytest.mark.parametrize("address", ["127.0.0.1:9000", "user:hidden@127.0.0.1:9000"])
def test_an_endpoint_of_the_environment_without_its_scheme_is_refused(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    rule = r"^open s3://tensorar: .* begin with http:// or https://, got .*127\.0\.0\.1:9000'; .*AWS_ENDPOINT_URL"
    for _ in range(2):
        with pytest.raises(ArtifactError, match=rule) as failed:
            storage.read_bytes("a")
        assert "hidden" not in "".join(traceback.format_exception(failed.value))


def test_a_password_in_an_endpoint_is_not_told(s3_url: str) -> None:
    storage = S3Storage(s3_url, config=S3Config(endpoint_url="http://user:hidden@127.0.0.1:1", max_attempts=1))
    with pytest.raises(ArtifactError, match=r"from http://127\.0\.0\.1:1; ") as failed:
        storage.list()
    assert "hidden" not in str(failed.value)


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


def test_a_held_lock_names_its_holder(storage: S3Storage) -> None:
    holder = run_python(HOLD, storage.url)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ArtifactError,
                match=rf"lock {storage.url}/.lock: one job .* pid {holder.pid}, seen \d s ago; wait for it",
            ),
            storage.exclusive(),
        ):
            raise AssertionError("held twice")
    finally:
        holder.kill()
        holder.communicate()


def test_a_look_at_a_lock_writes_nothing_and_tells_the_living_from_the_dead(storage: S3Storage) -> None:
    assert not storage.is_held()
    assert storage.find(".lock") is None
    holder = run_python(HOLD, storage.url)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    found = storage.find(".lock")
    assert storage.is_held()
    holder.kill()
    holder.communicate()
    assert not storage.is_held()
    assert storage.find(".lock") == found


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_at_once(
    storage: S3Storage, caplog: pytest.LogCaptureFixture
) -> None:
    holder = run_python(HOLD, storage.url)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    with storage.exclusive():
        assert json.loads(storage.read_bytes(".lock"))["pid"] != holder.pid
    assert f"s3 lock taken over url={storage.url}/.lock" in caplog.text
    assert storage.find(".lock") is None


def foreign_lock(storage: S3Storage) -> dict[str, object]:
    fields: dict[str, object] = {"host": "far", "machine": "other", "pid": 1, "started": "1", "token": "x"}
    storage.write_bytes(".lock", json.dumps(fields).encode())
    return fields


def test_the_lock_of_another_machine_is_taken_when_it_is_not_renewed(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign_lock(storage)
    with pytest.raises(ArtifactError, match="got one of host far, pid 1, seen"), storage.exclusive():
        raise AssertionError("held twice")
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    time.sleep(2.1)  # the server's clock, which decides, has whole seconds
    with storage.exclusive():
        assert json.loads(storage.read_bytes(".lock"))["host"] != "far"


def test_a_lock_taken_over_by_two_at_once_is_held_by_the_last_where_if_match_is_ignored(
    storage: S3Storage, s3_server: S3Server
) -> None:
    gone = {"host": "here", "machine": lock._machine(), "pid": 2**22 + 1, "started": "1", "token": "x"}
    storage.write_bytes(".lock", json.dumps(gone).encode())
    slow = FaultPlan(rate=1, faults=("delay",), max_faults=1, operations=frozenset({"put_object"}))
    with fault_proxy(s3_server.endpoint_url, slow) as proxy:
        proxy.on_fault = lambda _: foreign_lock(storage)  # the other one's write, which the server lets through
        slower = S3Storage(storage.url, config=S3Config(endpoint_url=proxy.endpoint_url))
        with pytest.raises(DirectoryInUseError, match="got one of host far, pid 1, seen"), slower.exclusive():
            raise AssertionError("held twice")


def test_a_lock_is_renewed_while_it_is_held(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    with storage.exclusive():
        first = storage.find(".lock")
        deadline = time.monotonic() + 10
        while storage.find(".lock") == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads(storage.read_bytes(".lock"))["renewals"] >= 1
    assert storage.find(".lock") is None


def test_a_lock_lost_while_running_is_told_loudly_and_left_to_its_new_holder(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    with storage.exclusive() as is_lost:
        time.sleep(0.5)
        assert not is_lost.is_set()
        fields = foreign_lock(storage)
        assert is_lost.wait(timeout=10)
    lost = [entry for entry in caplog.records if "s3 lock LOST" in entry.message]
    assert [entry.levelname for entry in lost] == ["ERROR"]
    assert json.loads(storage.read_bytes(".lock")) == fields


def test_a_lock_that_somebody_removed_is_made_again_and_not_lost(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    with storage.exclusive() as is_lost:
        token = json.loads(storage.read_bytes(".lock"))["token"]
        storage.remove(".lock")
        deadline = time.monotonic() + 10
        while storage.find(".lock") is None and not is_lost.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads(storage.read_bytes(".lock"))["token"] == token
        assert not is_lost.wait(timeout=0.5)
    assert "LOST" not in caplog.text
    assert storage.find(".lock") is None


def test_a_lock_that_is_gone_after_it_was_stale_may_have_been_taken_over_and_is_lost(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 1.0)
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    with storage.exclusive() as is_lost:
        storage.remove(".lock")
        assert is_lost.wait(timeout=10)
    assert storage.find(".lock") is None


def test_a_renewal_that_is_under_way_when_the_body_ends_is_no_loss(
    storage: S3Storage, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    with fault_proxy(s3_server.endpoint_url) as proxy:
        slower = S3Storage(storage.url, config=S3Config(endpoint_url=proxy.endpoint_url))
        with slower.exclusive() as is_lost:
            (renewing,) = [thread for thread in threading.enumerate() if thread.name.startswith("renew ")]
            slow = FaultPlan(rate=1, faults=("delay",), delay_s=2.0, max_faults=1, operations=frozenset({"get_object"}))
            proxy.plan = slow
            while not proxy.faults:
                time.sleep(0.01)
        assert renewing.is_alive()
        renewing.join(timeout=30)
        assert not renewing.is_alive()
    assert not is_lost.is_set()
    assert [entry.message for entry in caplog.records if "s3 lock" in entry.message] == []
    assert storage.find(".lock") is None


@pytest.mark.parametrize("is_stale", [False, True])
def test_of_many_that_begin_at_once_one_gets_the_lock(storage: S3Storage, is_stale: bool) -> None:
    if is_stale:
        holder = {"host": "here", "machine": lock._machine(), "pid": 2**22 + 1, "started": "1", "token": "x"}
        storage.write_bytes(".lock", json.dumps(holder).encode())
    all_tried = threading.Barrier(8)

    def try_once(_: int) -> bool:
        try:
            with storage.exclusive():
                all_tried.wait(timeout=30)
                return True
        except ArtifactError:
            all_tried.wait(timeout=30)
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_once, range(8))) == 1
