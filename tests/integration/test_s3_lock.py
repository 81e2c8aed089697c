"""The lock object of S3: who holds it, when it is taken over, and when it is lost."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from python_child import run_python
from s3_faults import FaultPlan, fault_proxy
from s3_server import S3Server

from pipeline.config import S3Config
from pipeline.s3 import lock
from pipeline.s3.storage import S3Storage
from pipeline.storage import ArtifactError, DirectoryInUseError

HOLD = """
import sys, time
from pipeline.storage import open_storage
with open_storage(sys.argv[1]).exclusive():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def storage(s3_url: str) -> S3Storage:
    return S3Storage(s3_url, config=S3Config())


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
