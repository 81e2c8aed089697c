"""S3 through a proxy that breaks a third of the exchanges: the bytes stay the same, the errors say what to do."""

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from s3_faults import FaultPlan, FaultProxy, fault_proxy
from s3_server import S3Server

from pipeline.config import S3Config
from pipeline.s3 import download, reader, requests, upload
from pipeline.s3.storage import S3Storage
from pipeline.storage import ArtifactError

MIB = 1 << 20


@pytest.fixture
def direct(s3_url: str) -> S3Storage:
    """The storage without a proxy: what is really there."""
    return S3Storage(s3_url, config=S3Config())


@contextmanager
def broken(direct: S3Storage, plan: FaultPlan, *, max_attempts: int = 12) -> Iterator[tuple[S3Storage, FaultProxy]]:
    """Yield the same storage through a proxy."""
    with fault_proxy(direct.requests.endpoint(), plan) as proxy:
        config = S3Config(endpoint_url=proxy.endpoint_url, max_attempts=max_attempts)
        yield S3Storage(direct.url, config=config), proxy


def pseudo_random_bytes(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, ranges and parts of a size that makes many of them out of a few MiB; back-off in milliseconds."""
    monkeypatch.setattr(requests, "BACKOFF_FIRST_S", 0.005)
    monkeypatch.setattr(reader, "FIRST_BLOCK_BYTES", 32 << 10)
    monkeypatch.setattr(reader, "LAST_BLOCK_BYTES", 256 << 10)
    monkeypatch.setattr(download, "RANGE_BYTES", 256 << 10)
    monkeypatch.setattr(upload, "PART_BYTES", 5 * MIB)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.usefixtures("small_blocks")
def test_reads_are_byte_identical_while_a_third_of_the_exchanges_break(direct: S3Storage, seed: int) -> None:
    data = pseudo_random_bytes(3 * MIB + 17)
    direct.write_bytes("a", data)
    draws = random.Random(seed)
    with broken(direct, FaultPlan(rate=0.35, seed=seed)) as (storage, proxy):
        assert storage.read_bytes("a") == data
        assert bytes(storage.map("a")) == data
        with storage.open("a") as file:
            assert file.read() == data
            file.seek(0)
            assert b"".join(iter(lambda: file.read(100_000), b"")) == data
            for _ in range(20):
                start, num_bytes = draws.randrange(len(data)), draws.choice([1, 5_000, 300_000])
                file.seek(start)
                assert file.read(num_bytes) == data[start : start + num_bytes]
        for _ in range(10):
            start = draws.randrange(len(data))
            assert storage.read_bytes("a", start=start, end=start + 200_000) == data[start : start + 200_000]
        assert storage.find("a") == direct.find("a")
        assert len(proxy.faults) >= 6


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.usefixtures("small_blocks")
def test_writes_are_byte_identical_while_a_third_of_the_exchanges_break(direct: S3Storage, seed: int) -> None:
    data = pseudo_random_bytes(12 * MIB + 5)
    with broken(direct, FaultPlan(rate=0.35, seed=seed)) as (storage, proxy):
        for i in range(15):
            storage.write_bytes(f"small/{i:02d}", data[i : i + 1000])
        with storage.stage("large.tar") as path:
            path.write_bytes(data)
        with storage.exclusive():
            storage.write_bytes("last", b"1")
        assert list(storage.list()) == ["large.tar", "last", *(f"small/{i:02d}" for i in range(15))]
        storage.remove("last")
        assert proxy.faults.total() >= 6
    assert direct.read_bytes("large.tar") == data
    assert [direct.read_bytes(f"small/{i:02d}") for i in range(15)] == [data[i : i + 1000] for i in range(15)]
    assert len(direct.list()) == 16
    assert direct.find(".lock") is None


@pytest.mark.usefixtures("small_blocks")
def test_a_body_that_always_breaks_is_read_on_from_where_it_stopped(direct: S3Storage) -> None:
    data = pseudo_random_bytes(8 * MIB)
    direct.write_bytes("a", data)
    with broken(direct, FaultPlan(rate=1, faults=("drop_body",), max_faults=5), max_attempts=2) as (storage, proxy):
        is_equal = storage.read_bytes("a", end=7 * MIB) == data[: 7 * MIB]
        assert is_equal
        assert proxy.counts["get_object"] == 6
        # Each answer is of the rest only: six whole ones would be 42 MiB.
        assert proxy.body_bytes["get_object"] < 21 * MIB


@pytest.mark.usefixtures("small_blocks")
def test_an_object_replaced_while_it_is_read_is_an_error(direct: S3Storage) -> None:
    old, new = b"o" * 2 * MIB, b"n" * 2 * MIB
    direct.write_bytes("a", old)
    with broken(direct, FaultPlan(rate=1, faults=("drop_body",), max_faults=1)) as (storage, proxy):
        proxy.on_fault = lambda _: direct.write_bytes("a", new)
        with pytest.raises(ArtifactError, match="/a: it must stay as it is while it is read, got another ETag than"):
            storage.read_bytes("a")
    with direct.open("a") as file:
        assert file.read(10) == b"n" * 10
        direct.write_bytes("a", old)
        file.seek(MIB)
        with pytest.raises(ArtifactError, match="/a: it must stay as it is while it is read, got another ETag than"):
            file.read(10)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("slow_down", "503 SlowDown"),
        ("internal_error", "500 InternalError"),
        ("short_body", "a body that ends after"),
        ("drop_before", "ConnectionClosedError"),
    ],
)
def test_exhausted_attempts_say_what_to_do(direct: S3Storage, fault: str, cause: str) -> None:
    direct.write_bytes("a", b"x" * 1000)
    with broken(direct, FaultPlan(rate=1, faults=(fault,)), max_attempts=2) as (storage, proxy):
        with pytest.raises(ArtifactError) as failed:
            storage.read_bytes("a")
        assert proxy.faults[fault] >= 2
    message = str(failed.value)
    assert message.startswith(f"read {direct.url}/a: must succeed within s3.max_attempts = 2 attempts, got {cause}")
    assert message.endswith(f"from {proxy.endpoint_url}; run again later or raise s3.max_attempts")
    assert "\n" not in message


def test_a_server_that_does_not_answer_in_time_is_asked_again(
    direct: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "READ_TIMEOUT_S", 1)
    direct.write_bytes("a", b"slow")
    with broken(direct, FaultPlan(rate=1, faults=("delay",), delay_s=2.5, max_faults=1)) as (storage, proxy):
        assert storage.read_bytes("a") == b"slow"
        assert proxy.counts["get_object"] == 2


@pytest.mark.usefixtures("small_blocks")
def test_a_completion_whose_answer_is_lost_is_a_commit(direct: S3Storage) -> None:
    data = pseudo_random_bytes(6 * MIB)
    plan = FaultPlan(rate=1, faults=("lost_answer",), operations=frozenset({"complete_multipart_upload"}))
    with broken(direct, plan, max_attempts=2) as (storage, proxy):
        with storage.stage("a") as path:
            path.write_bytes(data)
        assert proxy.faults["lost_answer"] == 2
    assert direct.read_bytes("a") == data


@pytest.mark.usefixtures("small_blocks")
def test_an_upload_that_is_gone_because_it_was_completed_is_a_commit(direct: S3Storage) -> None:
    data = pseudo_random_bytes(6 * MIB)
    plan = FaultPlan(rate=1, faults=("gone_after",), operations=frozenset({"complete_multipart_upload"}))
    with broken(direct, plan) as (storage, _), storage.stage("a") as path:
        path.write_bytes(data)
    assert direct.read_bytes("a") == data


@pytest.mark.usefixtures("small_blocks")
def test_an_upload_that_another_job_aborts_is_an_error_that_says_so(direct: S3Storage) -> None:
    direct.write_bytes("a", b"old")
    plan = FaultPlan(rate=1, faults=("delay",), delay_s=0.5, operations=frozenset({"upload_part"}))

    def write_new(storage: S3Storage) -> None:
        with storage.stage("a") as path:
            path.write_bytes(b"n" * 16 * MIB)

    with broken(direct, plan) as (storage, proxy):
        proxy.on_fault = lambda _: direct.remove_staged()
        with pytest.raises(ArtifactError, match="its upload must stay open until it is complete, got NoSuchUpload"):
            write_new(storage)
    assert direct.read_bytes("a") == b"old"
    assert direct.remove_staged() == 0


@pytest.mark.parametrize("operation", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
@pytest.mark.usefixtures("small_blocks")
def test_a_failed_upload_leaves_the_old_object_and_nothing_open(direct: S3Storage, operation: str) -> None:
    direct.write_bytes("a", b"old")
    plan = FaultPlan(rate=1, faults=("internal_error",), operations=frozenset({operation}))
    paths: list[Path] = []

    def write_new(storage: S3Storage) -> None:
        with storage.stage("a") as path:
            paths.append(path)
            path.write_bytes(b"n" * 6 * MIB)

    with (
        broken(direct, plan, max_attempts=2) as (storage, _),
        pytest.raises(ArtifactError, match=r"must succeed within s3.max_attempts = 2 attempts, got 500"),
    ):
        write_new(storage)
    assert direct.read_bytes("a") == b"old"
    assert direct.remove_staged() == 0
    assert not paths[0].exists()


def test_a_sequential_read_costs_one_request_for_each_growing_block(direct: S3Storage) -> None:
    data = pseudo_random_bytes(22 * MIB)
    with direct.stage("a.tar") as path:
        path.write_bytes(data)
    with broken(direct, FaultPlan()) as (storage, proxy):
        with storage.open("a.tar") as file:
            assert b"".join(iter(lambda: file.read(10_240), b"")) == data
        # 256 KiB, then 1, 4, 8, 8 MiB and the rest.
        assert proxy.counts == {"head_object": 1, "get_object": 6}
        assert proxy.body_bytes["get_object"] == len(data)


def test_reads_near_the_end_fetch_it_once_and_little(direct: S3Storage) -> None:
    data = pseudo_random_bytes(10 * MIB)
    direct.write_bytes("a.parquet", data)
    with broken(direct, FaultPlan()) as (storage, proxy):
        with storage.open("a.parquet") as file:
            for num_bytes in (8, 100, 65_536, 200_000):
                file.seek(-num_bytes, io.SEEK_END)
                assert file.read(num_bytes) == data[-num_bytes:]
        assert proxy.counts["get_object"] == 1
        assert proxy.body_bytes["get_object"] == 256 << 10


def test_a_whole_object_is_fetched_in_ranges_of_8_mib(direct: S3Storage) -> None:
    data = pseudo_random_bytes(20 * MIB)
    direct.write_bytes("a", data)
    with broken(direct, FaultPlan()) as (storage, proxy):
        assert bytes(storage.map("a")) == data
        assert proxy.counts == {"get_object": 3}


def test_a_listing_costs_one_request_for_each_1000_objects(direct: S3Storage, s3_server: S3Server) -> None:
    direct.requests.wait(
        requests.all_of(upload.put(direct.requests, f"{direct.base}{i // 500}/{i:05d}", b"") for i in range(1100))
    )
    with broken(direct, FaultPlan()) as (storage, proxy):
        assert list(storage.list()) == [f"{i // 500}/{i:05d}" for i in range(1100)]
        assert proxy.counts == {"list_objects_v2": 2}
        storage.write_bytes("2/99999", b"new")
        assert list(storage.list("2/"))[-1] == "2/99999"
