"""Every kind of source on a real S3 server: the plan and the samples of the same files on a disk.

`s3_url` is an `s3://bucket/prefix` of an empty place; endpoint and credentials come from the environment.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from toy_corpus import png, write_folder, write_tars

from pipeline.config import S3Config, SourceConfig
from pipeline.sources.plan import Plan, Source
from pipeline.sources.registry import make_source
from pipeline.sources.sample import InputSample
from pipeline.storage import ArtifactError, open_storage


def source_of(config: dict[str, Any]) -> Source:
    return make_source(TypeAdapter(SourceConfig).validate_python(config), s3=S3Config())


def planned_and_read(config: dict[str, Any]) -> tuple[Plan, list[InputSample]]:
    source = source_of(config)
    plan = source.plan()
    return plan, [sample for unit in plan.units for sample in source.read(unit)]


def upload(root: Path, url: str) -> None:
    storage = open_storage(url)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            storage.write_bytes(path.relative_to(root).as_posix(), path.read_bytes())


def write_corpus(root: Path) -> None:
    """Tars, Parquet files, a class tree, captions and an img2dataset folder, each below a folder of its name."""
    write_tars(root / "tars", num_tars=12, samples_per_tar=2)
    write_tars(root / "tars" / "deep", num_tars=1, samples_per_tar=2)
    (root / "classes.txt").write_text("zero\none\ntwo\n")
    (root / "parquet").mkdir()
    for number in range(3):
        table = pa.table({"image": [png(number), png(number + 1), None], "text": ["a", None, "c"]})
        pq.write_table(table, root / "parquet" / f"{number}.parquet", row_group_size=2)
    write_folder(root / "tree")
    (root / "captions" / "a").mkdir(parents=True)
    for number in range(40):
        (root / "captions" / "a" / f"{number}.png").write_bytes(png(number))
        (root / "captions" / "a" / f"{number}.txt").write_text(f"caption {number}")
    write_tars(root / "img2dataset", num_tars=1, samples_per_tar=2)
    rows = [{"key": f"s{number:04d}", "status": "success", "url": "u", "caption": "x"} for number in range(2)]
    rows.append({"key": "s0002", "status": "failed_to_download", "url": "u", "caption": "y"})
    pq.write_table(pa.Table.from_pylist(rows), root / "img2dataset" / "00000.parquet")
    (root / "img2dataset" / "00000_stats.json").write_text(json.dumps({"count": 3, "successes": 2}))


def configs_of(place: str) -> dict[str, dict[str, Any]]:
    return {
        "braces": {
            "kind": "webdataset",
            "urls": [f"{place}/tars/{{00000..00011}}.tar"],
            "class_names": f"{place}/classes.txt",
        },
        "globs": {"kind": "webdataset", "urls": [f"{place}/tars/0000[0-3].tar", f"{place}/tars/*/*.tar"]},
        "parquet": {"kind": "parquet", "urls": [f"{place}/parquet/*.parquet"], "caption_column": "text"},
        "tree": {"kind": "image_folder", "root": f"{place}/tree", "samples_per_unit": 4},
        "captions": {"kind": "image_folder", "root": f"{place}/captions", "layout": "captions"},
        "img2dataset": {"kind": "img2dataset", "root": f"{place}/img2dataset"},
    }


def test_plans_and_samples_are_those_of_the_same_files_on_a_disk(tmp_path: Path, s3_url: str) -> None:
    write_corpus(tmp_path)
    upload(tmp_path, s3_url)
    (tmp_path / "urls.txt").write_text(f"{s3_url}/tars/0000*.tar\n")
    for (name, local), remote in zip(configs_of(str(tmp_path)).items(), configs_of(s3_url).values(), strict=True):
        local_plan, local_samples = planned_and_read(local)
        remote_plan, remote_samples = planned_and_read(remote)
        assert remote_samples == local_samples, name
        assert [unit.fingerprint for unit in remote_plan.units] == [unit.fingerprint for unit in local_plan.units], name
        assert [unit.name for unit in remote_plan.units] == [unit.name for unit in local_plan.units], name
        assert (remote_plan.keys, remote_plan.class_names) == (local_plan.keys, local_plan.class_names), name
    listed, _ = planned_and_read({"kind": "webdataset", "urls_file": f"{tmp_path}/urls.txt"})
    assert [unit.name for unit in listed.units] == [f"{number:05d}.tar" for number in range(10)]


def test_a_mark_changes_when_an_object_is_written_again(tmp_path: Path, s3_url: str) -> None:
    write_tars(tmp_path, num_tars=2, samples_per_tar=2)
    upload(tmp_path, s3_url)
    config = {"kind": "webdataset", "urls": [f"{s3_url}/*.tar"]}
    before, again = planned_and_read(config)[0], planned_and_read(config)[0]
    data = (tmp_path / "00001.tar").read_bytes()
    open_storage(s3_url).write_bytes("00001.tar", data.replace(b"thing 2", b"thing 7"))
    after, _ = planned_and_read(config)
    assert [unit.mark for unit in again.units] == [unit.mark for unit in before.units]
    assert [unit.fingerprint for unit in after.units] == [unit.fingerprint for unit in before.units]
    assert [unit.mark == old.mark for unit, old in zip(after.units, before.units, strict=True)] == [True, False]


def test_what_is_missing_is_named(tmp_path: Path, s3_url: str) -> None:
    write_tars(tmp_path, num_tars=2, samples_per_tar=1)
    upload(tmp_path, s3_url)
    with pytest.raises(ArtifactError, match=r"s3://.*/00002\.tar cannot be opened: no such file"):
        source_of({"kind": "webdataset", "urls": [f"{s3_url}/{{00000..00002}}.tar"]}).plan()
    with pytest.raises(ArtifactError, match=r"must match a file, got 's3://.*/x\*\.tar'"):
        source_of({"kind": "webdataset", "urls": [f"{s3_url}/x*.tar"]}).plan()
    with pytest.raises(ArtifactError, match="must hold class folders of images, got none"):
        source_of({"kind": "image_folder", "root": f"{s3_url}/nothing"}).plan()
