"""Fixtures for all tests and the rule of the `gpu` marker; the file's presence also puts tests/ on the path."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from s3_server import S3Server, running_s3_server

from tokenization import native


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


@pytest.fixture(params=["native", "pillow"])
def pixels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Pixels from the native library, and once more as where it is not built."""
    if request.param == "pillow":
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "_pixels.so")
    native.library.cache_clear()
    assert (native.library() is None) == (request.param == "pillow")
    yield
    native.library.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    """Torch's number of threads is put back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `gpu` test on a machine without a CUDA device; fail it under REQUIRE_GPU=1."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail("REQUIRE_GPU=1, but torch sees no CUDA device")
    pytest.skip("needs a CUDA device")
