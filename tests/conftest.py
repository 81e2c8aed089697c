"""Fixtures shared by all tests; its presence also puts tests/ on the path, for `synthetic_shards`."""

import secrets
from collections.abc import Iterator

import pytest
from s3_server import S3Server, running_s3_server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, for all tests of this session that ask for it."""
    with running_s3_server() as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on the server, which the environment points to: processes that the test starts inherit it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/test-{secrets.token_hex(6)}"
