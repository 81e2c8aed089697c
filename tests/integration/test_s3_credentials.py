"""Credentials and addresses of S3: where they come from, how they are renewed, and what a wrong one says."""

import logging
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import S3Server

from pipeline.config import S3Config
from pipeline.s3.storage import S3Storage
from pipeline.storage import ArtifactError, StorageUnavailableError


@pytest.fixture
def storage(s3_url: str) -> S3Storage:
    return S3Storage(s3_url, config=S3Config())


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
