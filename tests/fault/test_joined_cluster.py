"""A cluster as its users make one: `ray start` on each node, a token for all, jobs that join it by its address."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from toy_corpus import files_of, tokenize_config, tokenize_here, write_tars, write_tiny_tokenizer

from pipeline.storage import open_storage
from pipeline.verify import verify_shard_set

BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def with_token(home: Path, token: str) -> dict[str, str]:
    """The environment of a machine whose token file holds this."""
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(token)
    return os.environ | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}


@contextmanager
def node(*arguments: str, cwd: Path, environment: dict[str, str]) -> Iterator[None]:
    """A node of the cluster, which has started, with all that belongs to it, until the body ends."""
    cwd.mkdir()
    command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments]
    with (cwd / "node.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
    try:
        wait_for_start(process, cwd / "node.log")
        yield
    finally:
        with suppress(psutil.NoSuchProcess):  # it ended by itself
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for member in family:
                member.kill()
            psutil.wait_procs(family, timeout=20)
        process.wait()


def wait_for_start(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a node says that it runs.

    Nodes of one machine share a directory of sockets: two that start at the same time take the same, and both end.
    """
    end = time.monotonic() + 90
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address and environment of a cluster: a head without workers, two nodes that start in other directories."""
    environment = with_token(tmp_path / "home", secrets.token_hex(32))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    head = ["--head", f"--port={address.partition(':')[2]}", "--num-cpus=0", "--include-dashboard=false"]
    other = [f"--address={address}", "--num-cpus=1"]
    with (
        node(*head, cwd=tmp_path / "head", environment=environment),
        node(*other, cwd=tmp_path / "first", environment=environment),
        node(*other, cwd=tmp_path / "second", environment=environment),
    ):
        yield address, environment


def tokenize(directory: Path, *, address: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the job of `directory/spec.json`, whose paths are relative, on the cluster."""
    command = [str(BIN / "tensorar"), "run", "spec.json", "--set", f"cluster.address={address}"]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=200)


def test_a_job_joins_a_cluster_by_address_and_writes_the_bytes_of_one_process(
    tmp_path: Path, joined: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, environment = joined
    work = tmp_path / "work"
    work.mkdir()
    write_tiny_tokenizer(work / "tiny.safetensors")
    write_tars(work / "tars", num_tars=6, samples_per_tar=8)
    source = {"kind": "webdataset", "urls": ["tars/{00000..00005}.tar"]}
    spec = tokenize_config("set", source=source, weights=Path("tiny.safetensors"), cluster={"num_workers": 2})
    (work / "spec.json").write_text(spec.model_dump_json())

    stranger = with_token(tmp_path / "elsewhere", "0" * 64)
    refused = tokenize(work, address=address, environment=stranger)
    assert refused.returncode == 1
    assert f"a cluster must answer at '{address}', got" in refused.stderr.splitlines()[-1]
    assert "RAY_AUTH_MODE=token and bring its token file" in refused.stderr.splitlines()[-1]
    assert not list(work.glob("set/shards/*.tar"))

    result = tokenize(work, address=address, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    monkeypatch.chdir(work)
    tokenize_here(spec.model_copy(update={"run_dir": "one"}))
    shards = {name: data for name, data in files_of(work / "set").items() if name.startswith("shards/")}
    assert len(shards) == 2 * 6  # and their indices
    assert shards.items() <= files_of(work / "one").items()
    assert verify_shard_set(open_storage("set")) == []
