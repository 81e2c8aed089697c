"""`tensorar export` and `tensorar retry-rejects` from S3 to S3: the bytes of the local run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from s3_server import S3Server
from synthetic_shards import write_shard_set
from toy_corpus import png, tokenize_config, tokenize_here, write_folder, write_tiny_tokenizer

from jobs.cli import main
from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig, TokenizeConfig
from pipeline.ledger import read_manifest
from pipeline.storage import Storage, open_storage
from pipeline.verify import verify_shard_set


@pytest.fixture
def session(s3_url: str) -> Iterator[None]:
    """A Ray session whose workers inherit the environment of the S3 server."""
    with ray_session(ClusterConfig(num_workers=1)):
        yield


def invoke(*words: str) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def upload(directory: Path, url: str) -> None:
    storage = open_storage(url)
    for path in directory.rglob("*"):
        if path.is_file():
            storage.write_bytes(path.relative_to(directory).as_posix(), path.read_bytes())


def contents_of(storage: Storage, *folders: str) -> dict[str, bytes]:
    names = [name for folder in folders for name in storage.list(folder)]
    return {name: storage.read_bytes(name) for name in names}


def test_an_export_from_s3_to_s3_has_the_bytes_of_a_local_one(tmp_path: Path, s3_url: str) -> None:
    run_dir = write_shard_set(tmp_path / "set", samples_per_shard=(3, 2))
    upload(run_dir, f"{s3_url}/set")
    invoke("export", str(run_dir), "--to", "llamagen", "--output", str(tmp_path / "out"))
    told = invoke("export", f"{s3_url}/set", "--to", "llamagen", "--output", f"{s3_url}/out")
    local = contents_of(open_storage(str(tmp_path / "out")), "")
    assert len(local) > 2 * 5  # codes and label of each sample, and the record
    assert contents_of(open_storage(f"{s3_url}/out"), "") == local
    assert told.startswith(f"codes: {s3_url}/out/")
    assert "copied to a disk under its own name" in told


def folder_job(root: str, run_dir: str, *, weights: Path) -> TokenizeConfig:
    source = {"kind": "image_folder", "root": root, "samples_per_unit": 7}
    fields = {"max_rejected_fraction": 0.5, "cluster": {"num_workers": 1}}
    return tokenize_config(run_dir, source=source, weights=weights, **fields)


@pytest.mark.usefixtures("session")
def test_rejects_retried_on_s3_end_in_the_bytes_of_a_local_retry(tmp_path: Path, s3_url: str) -> None:
    weights = write_tiny_tokenizer(tmp_path / "tiny.safetensors")
    tree = write_folder(tmp_path / "tree", images_per_class=4)
    for name in ("apple/2.png", "bear/1.png", "car/3.png"):
        (tree / name).write_bytes(b"no image")
    upload(tree, f"{s3_url}/tree")
    sets: dict[str, dict[str, bytes]] = {}
    for place in (str(tmp_path), s3_url):
        config = folder_job(f"{place}/tree", f"{place}/set", weights=weights)
        assert tokenize_here(config).totals.num_rejected == 3
        for name, data in (("apple/2.png", png(2)), ("bear/1.png", png(101))):
            open_storage(f"{place}/tree").write_bytes(name, data)
        (tmp_path / "spec.yaml").write_text(config.model_dump_json())
        invoke("retry-rejects", str(tmp_path / "spec.yaml"))
        storage = open_storage(f"{place}/set")
        totals = read_manifest(storage).totals
        assert (totals.num_read, totals.num_written, totals.num_rejected) == (12, 11, 1)
        assert verify_shard_set(storage) == []
        sets[place] = contents_of(storage, "shards/", "rejects/", "manifest.json", "shardindex.json")
    assert "shards/00002.tar" in sets[s3_url]  # two units of the folder, and the appended one
    assert sets[s3_url] == sets[str(tmp_path)]


def test_status_of_a_training_run_is_read_where_the_run_is(s3_url: str) -> None:
    storage = open_storage(f"{s3_url}/run")
    storage.write_json("spec.json", {"kind": "train", "num_steps": 20})
    line = {"step": 10, "split": "train", "elapsed_s": 4.0, "loss": 2.5, "loss_of_offset": [2.25]}
    storage.write_bytes("metrics.jsonl", json.dumps(line).encode() + b"\n")
    told = invoke("status", f"{s3_url}/run")
    assert "step 10 of 20" in told
    assert "not done; run the spec again to go on" in told


def test_debug_lines_hold_no_secret(s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-nobody-may-see")
    words = ["-m", "jobs.cli", "--debug", "status", f"{s3_url}/set"]
    told = subprocess.run([sys.executable, *words], capture_output=True, text=True).stderr
    assert "s3://" in told
    for secret in ("a-token-nobody-may-see", s3_server.variables["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in told
