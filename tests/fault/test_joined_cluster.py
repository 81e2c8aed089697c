"""A cluster as its users make one: `ray start` on each node, a token for all, jobs that join it by its address."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
def node(*arguments: str, cwd: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A node of the cluster, with all that belongs to it, until the body ends."""
    command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments]
    with (cwd / "node.log").open("ab") as log:
        started = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
    try:
        yield started
    finally:
        processes = [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=20)
        started.wait()


def wait_for_port(port: int, *, of: subprocess.Popen[bytes]) -> None:
    """Wait until the head answers."""
    end = time.monotonic() + 60
    while True:
        assert of.poll() is None, "the head ended"
        assert time.monotonic() < end, "the head does not answer"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address and environment of a cluster: a head without workers, two nodes that start in other directories."""
    environment = with_token(tmp_path / "home", secrets.token_hex(32))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as nodes:
        for name in ("head", "first", "second"):
            (tmp_path / name).mkdir()
        head = nodes.enter_context(
            node(
                *("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"),
                cwd=tmp_path / "head",
                environment=environment,
            )
        )
        wait_for_port(port, of=head)
        for name in ("first", "second"):
            nodes.enter_context(
                node(f"--address=127.0.0.1:{port}", "--num-cpus=1", cwd=tmp_path / name, environment=environment)
            )
        yield f"127.0.0.1:{port}", environment


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
