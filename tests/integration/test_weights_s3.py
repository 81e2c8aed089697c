"""Weights files on S3: what `export --output s3://...` wrote is what its next command may name."""

import shlex
from pathlib import Path

import pytest
import torch
from s3_server import S3Server
from small_disk import mounted_disk
from synthetic_runs import FINGERPRINT, model_of, write_run
from synthetic_shards import train_config, write_shard_set

from jobs.export import export_directory
from jobs.inputs import check_inputs
from pipeline.config import S3Config
from pipeline.storage import ArtifactError, StorageFullError, open_storage
from training.tensorar import TensorAR, build_model
from training.weights import digest_of, find_weights, load_model, warm_start


def exported(tmp_path: Path, output: str, *, model: TensorAR) -> str:
    """The name that the export tells to use."""
    write_run(tmp_path / "run", model)
    to = "llamagen" if output.endswith(".pt") else "safetensors"
    told = export_directory(str(tmp_path / "run"), to=to, output=output, s3=S3Config())
    return shlex.split(told.splitlines()[-1])[-1].partition("=")[2]


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_a_model_exported_to_s3_loads_from_there(s3_url: str, tmp_path: Path) -> None:
    model = model_of(window_size=4)
    url = exported(tmp_path, f"{s3_url}/out/model.safetensors", model=model)
    loaded, file = load_model(url)
    assert same(loaded, model)
    assert (file.path, file.step, file.fingerprint) == (f"{s3_url}/out/model.safetensors", 12, FINGERPRINT)
    assert file.sha256 == digest_of(find_weights(url))
    fresh = build_model(model.config)
    warm_start(fresh, url)
    assert same(fresh, model)


def test_a_base_model_exported_to_s3_for_llamagen_warm_starts_from_there(s3_url: str, tmp_path: Path) -> None:
    model = model_of(window_size=4)
    fresh = build_model(model.config)
    warm_start(fresh, exported(tmp_path, f"{s3_url}/base.pt", model=model))
    assert same(fresh.base, model.base)


def test_copies_of_what_was_read_are_gone(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = exported(tmp_path, f"{s3_url}/model.safetensors", model=model_of())
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    load_model(url)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_launch_reads_the_header_of_a_warm_start_on_s3_and_names_what_differs(s3_url: str, tmp_path: Path) -> None:
    url = exported(tmp_path, f"{s3_url}/model.safetensors", model=model_of(window_size=4))
    config = train_config(tmp_path / "new", shards=write_shard_set(tmp_path / "set"), warm_start=url)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"ops": "reference"})})
    with pytest.raises(ArtifactError, match=rf"warm start from {url}: .* dim \(there 16, in the spec 32\)"):
        check_inputs(config, is_new=True)


def test_a_disk_too_small_for_a_copy_is_named_with_the_weights(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = exported(tmp_path, f"{s3_url}/model.safetensors", model=model_of())
    with mounted_disk(tmp_path / "disk", kib=16) as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(
            StorageFullError, match=rf"read weights {url} to {disk}/.*: no space .*; .* set TMPDIR to a"
        ):
            load_model(url)
        assert list(disk.iterdir()) == []


def test_a_run_at_the_root_of_a_bucket_is_found(s3_server: S3Server, s3_url: str, tmp_path: Path) -> None:
    model = model_of()
    write_run(tmp_path / "run", model)
    bucket = f"s3://{s3_server.bucket}"
    run, root = open_storage(str(tmp_path / "run")), open_storage(bucket)
    try:
        for name in run.list():
            root.write_bytes(name, run.read_bytes(name))
        for url in (bucket, f"{bucket}/"):
            assert same(load_model(url)[0], model)
    finally:  # the bucket is that of all tests
        for name in run.list():
            root.remove(name)


@pytest.mark.parametrize("content", [b"", b"<html>no such thing</html>", b"\x10\0\0\0\0\0\0\0{}"])
@pytest.mark.parametrize("name", ["model.safetensors", "base.pt"])
def test_a_damaged_file_is_named_by_its_url(s3_url: str, tmp_path: Path, name: str, content: bytes) -> None:
    url = f"{s3_url}/{name}"
    open_storage(s3_url).write_bytes(name, content)
    with pytest.raises(ArtifactError, match=rf"weights {url}: (it must be a|the file must hold nothing but tensors)"):
        warm_start(build_model(model_of().config), url)
    config = train_config(tmp_path / "new", shards=write_shard_set(tmp_path / "set"), warm_start=url)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"ops": "reference"})})
    if name == "model.safetensors":
        with pytest.raises(ArtifactError, match=f"read weights {url}: it must be a safetensors file"):
            check_inputs(config, is_new=True)


def test_a_name_without_weights_on_s3_is_told_so(s3_url: str) -> None:
    with pytest.raises(ArtifactError, match=rf"find weights {s3_url}/none.safetensors: it must be a weights file or"):
        load_model(f"{s3_url}/none.safetensors")
