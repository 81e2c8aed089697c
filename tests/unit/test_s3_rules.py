"""The rules of S3 storage that need no server: what is retried and for how long, when a lock is stale."""

import asyncio
import logging
import os
import pickle
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConfigParseError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    ReadTimeoutError,
    UnauthorizedSSOTokenError,
)

from pipeline.s3 import requests
from pipeline.s3 import upload as upload_module
from pipeline.s3.lock import LockHolder, is_stale, parse_holder, this_process
from pipeline.s3.requests import Attempts, S3RefusedError, backoff_s, classify, parse_time
from pipeline.s3.upload import md5_of, part_bytes_for
from pipeline.storage import ArtifactError, StorageUnavailableError


def refusal(status: int, code: str) -> OSError:
    """What s3fs raises for an answer of the server: an OSError whose cause is botocore's error."""
    error = OSError("text of the server")
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = ClientError(answer, "GetObject")
    return error


def test_a_refusal_crosses_from_a_worker_to_its_job_whole() -> None:
    error = pickle.loads(pickle.dumps(S3RefusedError("write s3://b/a: no", code="KMS.DisabledException")))
    assert (type(error), str(error), error.code) == (S3RefusedError, "write s3://b/a: no", "KMS.DisabledException")


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        (refusal(503, "SlowDown"), "retry", "503 SlowDown"),
        (refusal(500, "InternalError"), "retry", "500 InternalError"),
        (refusal(502, "502"), "retry", "502"),
        (refusal(400, "BadDigest"), "retry", "400 BadDigest"),
        (refusal(409, "ConditionalRequestConflict"), "retry", "409 ConditionalRequestConflict"),
        (refusal(200, "InternalError"), "retry", "200 InternalError"),
        (refusal(404, "NoSuchKey"), "missing", "404 NoSuchKey"),
        (refusal(404, "NoSuchBucket"), "bucket", "404 NoSuchBucket"),
        (refusal(404, "NoSuchUpload"), "refused", "404 NoSuchUpload"),
        (refusal(403, "AccessDenied"), "denied", "403 AccessDenied"),
        (refusal(403, "403"), "denied", "403"),
        (refusal(400, "ExpiredToken"), "denied", "400 ExpiredToken"),
        (refusal(400, "400"), "denied", "400"),
        (refusal(400, "InvalidArgument"), "refused", "400 InvalidArgument"),
        (refusal(412, "PreconditionFailed"), "refused", "412 PreconditionFailed"),
        (refusal(301, "PermanentRedirect"), "refused", "301 PermanentRedirect"),
        (NoCredentialsError(), "credentials", "NoCredentialsError"),
        (UnauthorizedSSOTokenError(), "credentials", "UnauthorizedSSOTokenError"),
        (ConfigParseError(path="/a@b/credentials"), "credentials", "/a@b/credentials, which cannot be parsed"),
        (ConnectTimeoutError(endpoint_url="http://x"), "unreachable", "ConnectTimeoutError"),
        (EndpointConnectionError(endpoint_url="http://x"), "unreachable", "EndpointConnectionError"),
        (ReadTimeoutError(endpoint_url="http://x"), "retry", "ReadTimeoutError"),
        (ConnectionClosedError(endpoint_url="http://x"), "retry", "ConnectionClosedError"),
        (IncompleteReadError(actual_bytes=1, expected_bytes=2), "retry", "IncompleteReadError"),
        (NoRegionError(), "refused", "NoRegionError (You must specify a region.)"),
        (TimeoutError(), "retry", "TimeoutError"),
        (ConnectionResetError(), "retry", "ConnectionResetError"),
    ],
)
def test_an_error_is_known_for_what_it_is(error: Exception, kind: str, cause: str) -> None:
    fault = classify(error)
    assert (fault.kind, fault.cause) == (kind, cause)


def test_a_head_without_a_body_has_the_code_that_its_status_stands_for() -> None:
    assert classify(refusal(412, "412")).code == "PreconditionFailed"
    assert classify(refusal(416, "416")).code == "InvalidRange"


@pytest.mark.parametrize("code", ["ExpiredToken", "ExpiredTokenException"])
def test_expired_credentials_are_to_be_renewed_and_waited_for(code: str) -> None:
    attempts = Attempts("read s3://b/x", url="s3://b/x", endpoint="here", max_attempts=3)
    error = attempts.error_for(classify(refusal(400, code)))
    assert isinstance(error, StorageUnavailableError)
    assert str(error).startswith(f"read s3://b/x: the credentials must allow it, got 400 {code}; renew them")


def test_waits_double_up_to_ten_seconds_with_half_of_jitter() -> None:
    for num_failed, ceiling_s in ((1, 0.1), (2, 0.2), (5, 1.6), (8, 10.0), (100, 10.0), (10**6, 10.0)):
        waits = [backoff_s(num_failed) for _ in range(200)]
        assert all(ceiling_s / 2 <= wait_s <= ceiling_s for wait_s in waits)
        assert max(waits) - min(waits) > ceiling_s / 10


@pytest.mark.parametrize(("num_bytes", "num_attempts"), [(0, 3), (65_535, 3), (65_536, 50)])
def test_attempts_without_progress_are_counted_those_with_it_start_again(
    num_bytes: int, num_attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "BACKOFF_FIRST_S", 0.0)
    attempts = Attempts("read s3://b/x", url="s3://b/x", endpoint="here", max_attempts=3)

    async def fail(times: int) -> int:
        for time in range(times):
            try:
                await attempts.wait_after(TimeoutError(), num_bytes=num_bytes)
            except ArtifactError:
                return time + 1
        return times

    assert asyncio.run(fail(50)) == num_attempts


def test_times_of_listings_and_of_headers_are_read() -> None:
    expected = datetime(2026, 11, 24, 9, 42, 23, tzinfo=UTC)
    assert parse_time("2026-11-24T09:42:23.000Z") == expected
    assert parse_time("2026-11-24T09:42:23Z") == expected
    assert parse_time("Tue, 24 Nov 2026 09:42:23 GMT") == expected


def test_md5_is_base64_as_the_header_wants_it() -> None:
    assert md5_of(b"hello") == "XUFAKrxLKna5cZ2REBfFkg=="


def test_parts_grow_where_10000_of_16_mib_are_too_few() -> None:
    assert part_bytes_for(17 << 20) == 16 << 20
    assert part_bytes_for(10_000 * (16 << 20)) == 16 << 20
    assert part_bytes_for(5 << 40) * 10_000 >= 5 << 40


class Bucket:
    """What an upload asks of S3, kept in memory."""

    bucket = "b"

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.content = b""

    async def ask(self, operation: str, **fields: Any) -> dict[str, Any]:
        if operation == "upload_part":
            self.parts[fields["PartNumber"]] = fields["Body"]
        elif operation == "complete_multipart_upload":
            self.content = b"".join(self.parts[part["PartNumber"]] for part in fields["MultipartUpload"]["Parts"])
        return {"UploadId": "1", "ETag": "tag", "ContentLength": len(self.content)}


def test_parts_of_any_size_are_put_together_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "PART_BYTES", 10)
    monkeypatch.setattr(upload_module, "MAX_PARTS", 3)
    data = bytes(range(100))
    (tmp_path / "a").write_bytes(data)
    bucket = Bucket()
    asyncio.run(upload_module.upload(bucket, "a", tmp_path / "a"))  # type: ignore[arg-type]
    assert bucket.parts == {1: data[:34], 2: data[34:68], 3: data[68:]}
    assert bucket.content == data


def holder(**changes: object) -> LockHolder:
    mine = this_process()
    fields = {name: getattr(mine, name) for name in LockHolder.__slots__}
    return LockHolder(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "age_s", "expected"),
    [
        ({}, 0, False),
        ({}, 60, False),
        ({}, 61, True),
        ({"started": "1"}, 0, True),  # the pid was given to another process since
        ({"pid": 2**22 + 1}, 0, True),
        ({"pid": 2**22 + 1, "machine": "another boot"}, 59, False),
        ({"pid": 2**22 + 1, "machine": ""}, 59, False),
        ({"machine": ""}, 61, True),
    ],
)
def test_a_lock_is_stale_by_age_or_when_its_process_here_is_gone(
    changes: dict[str, object], age_s: float, expected: bool
) -> None:
    assert is_stale(holder(**changes), age_s=age_s) is expected


def test_a_lock_says_which_process_holds_it() -> None:
    mine = this_process()
    assert (mine.host, mine.pid) == (socket.gethostname(), os.getpid())
    assert mine.token != this_process().token


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b'{"host": "x"}', b"\xff", b'{"pid": "many"}'])
def test_a_lock_that_is_not_ours_is_of_somebody_unknown(content: bytes) -> None:
    assert parse_holder(content) == LockHolder(host="unknown", machine="", pid=0, started="", token="")


def test_a_retry_is_told_with_its_cause_and_count(caplog: pytest.LogCaptureFixture) -> None:

    caplog.set_level(logging.INFO)
    attempts = Attempts("read s3://b/x", url="s3://b/x", endpoint="here", max_attempts=3)
    asyncio.run(attempts.wait_after(refusal(503, "SlowDown")))
    assert "s3 retry doing='read s3://b/x' attempt=1 max_attempts=3 cause='503 SlowDown'" in caplog.text
