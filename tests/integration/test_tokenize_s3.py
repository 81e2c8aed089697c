"""The tokenize job from S3 to S3: the bytes of a local run though the network breaks, few requests, and the tools."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from s3_faults import FaultPlan, fault_proxy
from s3_server import S3Server
from toy_corpus import sample_members, tokenize_config, tokenize_here, write_tar, write_tars, write_tiny_tokenizer

from jobs.cli import main
from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig, S3Config, TokenizeConfig
from pipeline.storage import Storage, open_storage
from pipeline.tokenize import run_tokenize
from pipeline.verify import verify_shard_set

NUM_UNITS = 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars with one bad image among them, a tokenizer, and in `whole/` the set of a local run."""
    root = tmp_path_factory.mktemp("corpus")
    write_tiny_tokenizer(root / "tiny.safetensors")
    write_tars(root / "tars", num_tars=NUM_UNITS - 1, samples_per_tar=6)
    write_tar(root / "tars" / f"{NUM_UNITS - 1:05d}.tar", [("bad.png", b"no image"), *sample_members(500)])
    tokenize_here(job(str(root / "tars"), root, str(root / "whole")))
    return root


@pytest.fixture
def session(s3_url: str) -> Iterator[None]:
    """A Ray session whose workers inherit the environment of the S3 server."""
    with ray_session(ClusterConfig(num_workers=2)):
        yield


def job(tars: str, corpus: Path, run_dir: str, *, s3: S3Config | None = None) -> TokenizeConfig:
    source = {"kind": "webdataset", "urls": [f"{tars}/*.tar"]}
    fields = {"max_rejected_fraction": 0.5, "s3": (s3 or S3Config()).model_dump()}
    return tokenize_config(run_dir, source=source, weights=corpus / "tiny.safetensors", **fields)


def upload(directory: Path, url: str) -> None:
    for path in directory.iterdir():
        open_storage(url).write_bytes(path.name, path.read_bytes())


def contents_of(storage: Storage) -> dict[str, bytes]:
    names = [*storage.list("shards/"), *storage.list("rejects/"), "manifest.json", "shardindex.json"]
    return {name: storage.read_bytes(name) for name in names}


@pytest.mark.usefixtures("session")
def test_a_job_over_a_network_that_breaks_ends_in_the_bytes_of_a_local_run(
    corpus: Path, s3_server: S3Server, s3_url: str
) -> None:
    upload(corpus / "tars", f"{s3_url}/tars")
    with fault_proxy(s3_server.endpoint_url, FaultPlan(rate=0.2, seed=7)) as proxy:
        s3 = S3Config(endpoint_url=proxy.endpoint_url, max_attempts=12)
        run_tokenize(job(f"{s3_url}/tars", corpus, f"{s3_url}/set", s3=s3), progress=False)
        assert proxy.faults.total() >= 50
        assert len(proxy.faults) >= 5
    storage = open_storage(f"{s3_url}/set")
    assert contents_of(storage) == contents_of(open_storage(str(corpus / "whole")))
    assert verify_shard_set(storage) == []


@pytest.mark.usefixtures("session")
def test_a_rerun_makes_no_request_for_each_unit_and_the_tools_work_on_s3(
    corpus: Path, s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    upload(corpus / "tars", f"{s3_url}/tars")
    with fault_proxy(s3_server.endpoint_url, FaultPlan()) as proxy:
        config = job(f"{s3_url}/tars", corpus, f"{s3_url}/set", s3=S3Config(endpoint_url=proxy.endpoint_url))
        (tmp_path / "spec.yaml").write_text(config.model_dump_json())
        run = CliRunner().invoke(main, ["run", str(tmp_path / "spec.yaml")])
        assert run.exit_code == 0, run.output
        proxy.counts.clear()
        run_tokenize(config, progress=False)
        assert proxy.counts.total() < NUM_UNITS
        assert proxy.counts["list_objects_v2"] <= 8  # one for each folder, and for the tars
    for command, told in (("verify", "everything is whole"), ("status", "30 of 30"), ("preview", "preview.html")):
        result = CliRunner().invoke(main, [command, f"{s3_url}/set", "--endpoint-url", s3_server.endpoint_url])
        assert result.exit_code == 0, result.output
        assert told in result.output
    page = open_storage(f"{s3_url}/set").read_bytes("preview.html").decode()
    assert "175 written" in page
