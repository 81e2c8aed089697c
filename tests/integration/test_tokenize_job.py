"""The tokenize job on embedded Ray: same bytes for any number of workers, rejects named, reruns skip, failures told."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from toy_corpus import (
    files_of,
    png,
    sample_members,
    tokenize_config,
    tokenize_here,
    write_folder,
    write_tar,
    write_tars,
    write_tiny_tokenizer,
)

from jobs.cli import main
from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig, TokenizeConfig
from pipeline.ledger import read_manifest
from pipeline.pool import WorkerPool
from pipeline.rejects import read_rejects
from pipeline.sources.registry import make_source
from pipeline.storage import ArtifactError, open_storage
from pipeline.tokenize import run_tokenize
from pipeline.verify import verify_shard_set

ONE_WORKER = {"num_workers": 1}
TWO_WORKERS = {"num_workers": 2}


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """One Ray session for all jobs here; `run_tokenize` joins it."""
    with ray_session(ClusterConfig(num_workers=2)):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of 6 and 5 samples with one bad image, one of bad samples only, and the folder tree of 15 images."""
    root = tmp_path_factory.mktemp("corpus")
    write_tiny_tokenizer(root / "tiny.safetensors")
    write_tars(root / "tars", num_tars=3, samples_per_tar=6)
    write_tar(root / "tars" / "00003.tar", [*sample_members(20), ("torn.png", png(1)[:-40]), *sample_members(21)])
    write_tar(root / "tars" / "00004.tar", [("none.png", b"")])
    write_folder(root / "tree")
    return root


def job(corpus: Path, run_dir: Path, *, folder: bool = False, **fields: Any) -> TokenizeConfig:
    source: dict[str, Any] = {"kind": "webdataset", "urls": [f"{corpus}/tars/{{00000..00004}}.tar"]}
    if folder:
        source = {"kind": "image_folder", "root": str(corpus / "tree"), "samples_per_unit": 4}
    return tokenize_config(run_dir, source=source, weights=corpus / "tiny.safetensors", **fields)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "set"
    run_tokenize(job(corpus, run_dir, cluster=TWO_WORKERS, max_rejected_fraction=0.2), progress=False)
    return run_dir


def test_two_workers_write_the_bytes_of_one_process(corpus: Path, finished: Path, tmp_path: Path) -> None:
    tokenize_here(job(corpus, tmp_path / "one"))
    assert files_of(finished) == files_of(tmp_path / "one")
    assert verify_shard_set(open_storage(str(finished))) == []


def test_rejects_are_named_and_an_empty_unit_has_no_shard(finished: Path) -> None:
    assert [reject.source for reject in read_rejects(open_storage(str(finished)), "rejects/00003.parquet")] == ["torn"]
    assert [path.name for path in sorted(finished.glob("shards/*.tar"))] == [f"0000{unit}.tar" for unit in range(4)]
    manifest = read_manifest(open_storage(str(finished)))
    assert (manifest.num_samples, manifest.totals.num_read, manifest.totals.num_rejected) == (20, 22, 2)


def test_the_command_ends_with_a_table_of_what_the_set_holds(corpus: Path, finished: Path, tmp_path: Path) -> None:
    config = job(corpus, shutil.copytree(finished, tmp_path / "set"), max_rejected_fraction=0.2)
    spec = tmp_path / "spec.yaml"
    spec.write_text(config.model_dump_json())
    result = CliRunner().invoke(main, ["run", str(spec)])
    assert result.exit_code == 0, result.output
    cells = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in result.output.splitlines()]
    for cell in (["shards", "4"], ["samples written", "20 of 22 read"], ["rejected", "2"], ["decode/truncated", "1"]):
        assert cell in cells


def test_webdataset_reads_the_set(finished: Path) -> None:
    urls = f"{finished}/shards/{{00000..00003}}.tar"
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len({sample["__key__"] for sample in samples}) == 20
    assert samples[0]["codes.npy"].shape == (1, 16)
    assert samples[0]["codes.npy"].dtype == np.uint16
    assert [sample["json"]["caption"] for sample in samples[:2]] == ["thing 0", "thing 1"]


def test_a_folder_with_room_for_one_of_two_workers_gives_the_same_bytes_too(corpus: Path, tmp_path: Path) -> None:
    too_many = {"num_workers": 2, "cpus_per_worker": 2.0}
    manifest = run_tokenize(job(corpus, tmp_path / "ray", folder=True, cluster=too_many), progress=False)
    tokenize_here(job(corpus, tmp_path / "here", folder=True))
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "here")
    assert manifest.class_names == ["apple", "bear", "car"]
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 4, 3]


def test_a_rerun_skips_what_is_done_and_does_the_rest(
    corpus: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = job(corpus, finished, cluster=ONE_WORKER, max_rejected_fraction=0.2)
    before = files_of(finished)
    (finished / "shards" / "00002.tar").unlink()
    (finished / "shards" / ".staged-00002.tar-1-dead").write_bytes(b"half")
    times = {path.name: path.stat().st_mtime_ns for path in finished.glob("ledger/*.json")}
    with caplog.at_level(logging.INFO):
        run_tokenize(config, progress=False)
    assert "unit 2 (00002.tar) is done again: 00002.tar is missing" in caplog.text
    assert files_of(finished) == before
    changed = [path.name for path in finished.glob("ledger/*.json") if path.stat().st_mtime_ns != times[path.name]]
    assert changed == ["00002.json"]
    assert verify_shard_set(open_storage(str(finished))) == []


def test_workers_that_cannot_start_fail_the_job_with_their_reason(corpus: Path, tmp_path: Path) -> None:
    config = job(corpus, tmp_path / "set", folder=True, cluster=ONE_WORKER, max_attempts=1)
    the_plan = make_source(config.source, s3=config.s3).plan()
    pool = WorkerPool(config, keys=the_plan.keys, fingerprint_digest="0123456789abcdef")
    with pytest.raises(ArtifactError, match=r"got 2 deaths in a row and 4 units left: .*must be 0123456789abcdef ever"):
        list(pool.run(the_plan.units))


def test_too_many_rejects_fail_the_job_and_a_raised_limit_accepts_its_work(corpus: Path, finished: Path) -> None:
    with pytest.raises(ArtifactError, match=r"at most 1\.0% .* got 2 of 22 \(decode/empty 1, decode/truncated 1\)"):
        run_tokenize(job(corpus, finished, max_rejected_fraction=0.01), progress=False)
    assert run_tokenize(job(corpus, finished, max_rejected_fraction=0.2), progress=False).num_samples == 20


def test_a_torn_tar_fails_the_job_after_the_others_are_done(corpus: Path, tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", num_tars=3, samples_per_tar=4)
    torn = tmp_path / "tars" / "00000.tar"
    write_tar(torn, [member for number in range(30) for member in sample_members(number)])
    whole = torn.read_bytes()  # 140 KiB, so that keys would be wider if it were whole from the start
    torn.write_bytes(whole[: 6 * 512])
    source = {"kind": "webdataset", "urls": [f"{tmp_path}/tars/*.tar"]}
    config = tokenize_config(tmp_path / "set", source=source, weights=corpus / "tiny.safetensors", cluster=ONE_WORKER)
    with pytest.raises(ArtifactError, match=r"at most 0 of 3 units may fail, got 1: unit 0 \(00000\.tar\): .*again"):
        run_tokenize(config, progress=False)
    assert sorted(path.name for path in tmp_path.glob("set/ledger/*.json")) == ["00001.json", "00002.json"]
    assert not (tmp_path / "set" / "manifest.json").exists()
    poison = tmp_path / "set" / "poison" / "00000.json"
    left_by_a_killed_driver = poison.read_bytes()
    torn.write_bytes(whole)
    assert run_tokenize(config, progress=False).num_samples == 38
    poison.write_bytes(left_by_a_killed_driver)
    assert run_tokenize(config, progress=False).num_samples == 38
    assert verify_shard_set(open_storage(str(tmp_path / "set"))) == []
