"""img2dataset's folders as a source: every row of a sidecar is accounted for, and an unfinished shard is noticed."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from forbidden import forbidden
from img2dataset_shards import NO_DOWNLOAD, NO_RESIZE, SUCCESS, row_of, write_shard
from toy_corpus import png

from pipeline.config import Img2DatasetConfig, S3Config
from pipeline.rejects import RULE_STAGE
from pipeline.sources.img2dataset import Img2DatasetSource
from pipeline.sources.sample import InputSample
from pipeline.storage import ArtifactError


def source_of(root: Path, **fields: Any) -> Img2DatasetSource:
    return Img2DatasetSource(Img2DatasetConfig(kind="img2dataset", root=str(root), **fields), s3=S3Config())


def write_folder(root: Path, *, num_shards: int = 2) -> Path:
    for shard in range(num_shards):
        statuses = [SUCCESS, NO_DOWNLOAD, SUCCESS, NO_RESIZE]
        rows = [row_of(f"{shard:05d}{number:04d}", status) for number, status in enumerate(statuses)]
        write_shard(root, f"{shard:05d}", rows)
    return root


def read(source: Img2DatasetSource, unit_index: int = 0) -> list[InputSample]:
    return list(source.read(source.plan().units[unit_index]))


def reason_of(samples: list[InputSample]) -> dict[str, str | None]:
    return {sample.source: sample.problem and sample.problem.reason for sample in samples}


def test_a_downloaded_image_has_the_fields_of_its_sidecar(tmp_path: Path) -> None:
    samples = read(source_of(write_folder(tmp_path)), 1)
    assert samples[0] == InputSample(
        position=0,
        source="000010000",
        data=png(10000),
        caption="picture 000010000",
        extra={
            "url": "https://pictures.example/000010000.jpg",
            "width": 40,
            "height": 36,
            "original_width": 400,
            "exif": "{}",
        },
    )


def test_every_row_of_the_sidecar_is_one_sample_and_what_was_not_downloaded_is_dropped(tmp_path: Path) -> None:
    samples = read(source_of(write_folder(tmp_path)))
    assert reason_of(samples) == {
        "000000000": None,
        "000000002": None,
        "000000001": "img2dataset_failed_to_download",
        "000000003": "img2dataset_failed_to_resize",
    }
    assert [sample.position for sample in samples] == [0, 1, 2, 3]
    assert samples[2].problem is not None
    assert (samples[2].problem.stage, samples[2].problem.detail) == (RULE_STAGE, "HTTP Error 404: Not Found")


def test_a_shard_of_which_nothing_was_downloaded_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", [row_of(f"{number:09d}", NO_DOWNLOAD) for number in range(3)])
    samples = read(source_of(tmp_path))
    assert [sample.problem and sample.problem.reason for sample in samples] == ["img2dataset_failed_to_download"] * 3


def test_a_disagreement_of_tar_and_sidecar_is_a_reject_by_name(tmp_path: Path) -> None:
    rows = [row_of("000000000"), row_of("000000001"), row_of("000000002", NO_DOWNLOAD)]
    write_shard(tmp_path, "00000", rows, in_tar=["000000000", "000000002", "000000007", "000000000"])
    samples = read(source_of(tmp_path))
    assert [(sample.source, sample.problem and sample.problem.reason) for sample in samples] == [
        ("000000000", None),
        ("000000002", "sidecar_disagrees"),
        ("000000007", "not_in_sidecar"),
        ("000000000", "duplicate_key"),
        ("000000001", "not_in_tar"),
    ]
    assert {sample.problem.stage for sample in samples if sample.problem is not None} == {"read"}


def test_captions_come_from_the_txt_where_the_sidecar_has_none(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", [row_of("000000000"), row_of("000000001", caption=None)])
    assert [sample.caption for sample in read(source_of(tmp_path))] == ["picture 000000000", "picture 000000001"]
    assert [sample.caption for sample in read(source_of(tmp_path, caption_column="url"))] == [
        "https://pictures.example/000000000.jpg",
        "https://pictures.example/000000001.jpg",
    ]


def test_labels_and_kept_columns_are_named_in_the_spec(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", [row_of("000000000", kind=4), row_of("000000001", kind=-1)])
    good, bad = read(source_of(tmp_path, label_column="kind", extra_columns=("url",)))
    assert (good.label, good.extra) == (4, {"url": "https://pictures.example/000000000.jpg"})
    assert bad.problem is not None
    assert bad.problem.reason == "bad_label"
    with pytest.raises(ArtifactError, match=r"00000\.parquet: there must be one column 'knd' .*; did you mean kind\?"):
        source_of(tmp_path, label_column="knd").plan()


def test_a_tar_without_its_stats_is_an_error_unless_allowed(tmp_path: Path) -> None:
    write_folder(tmp_path, num_shards=3)
    (tmp_path / "00001_stats.json").unlink()
    (tmp_path / "00001.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"must have its _stats\.json, got 1 without: 00001; .*allow_unfinished"):
        source_of(tmp_path).plan()
    units = source_of(tmp_path, allow_unfinished=True).plan().units
    assert [(unit.unit_index, unit.name) for unit in units] == [(0, "00000.tar"), (1, "00002.tar")]


def test_a_shard_of_which_only_the_sidecar_is_left_is_unfinished(tmp_path: Path) -> None:
    write_folder(tmp_path, num_shards=3)
    (tmp_path / "00001_stats.json").unlink()
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ArtifactError, match=r"must have its _stats\.json, got 1 without: 00001; .*allow_unfinished"):
        source_of(tmp_path).plan()
    assert [unit.name for unit in source_of(tmp_path, allow_unfinished=True).plan().units] == ["00000.tar", "00002.tar"]


@pytest.mark.parametrize("column", ["url", "status", "error_message", "caption"])
def test_a_column_that_is_there_twice_is_named(tmp_path: Path, column: str) -> None:
    write_folder(tmp_path)
    table = pq.read_table(tmp_path / "00001.parquet")
    pq.write_table(table.append_column(column, table[column]), tmp_path / "00001.parquet")
    with pytest.raises(
        ArtifactError, match=rf"00001\.parquet: there must be one column '{column}' .* got 2 of it among"
    ):
        read(source_of(tmp_path), 1)


@pytest.mark.parametrize("ending", [".tar", ".parquet"])
def test_a_finished_shard_that_lacks_a_file_is_an_error(tmp_path: Path, ending: str) -> None:
    write_folder(tmp_path)
    (tmp_path / f"00001{ending}").unlink()
    with pytest.raises(ArtifactError, match=r"must have its \.tar and \.parquet, got 1 without: 00001"):
        source_of(tmp_path).plan()


@pytest.mark.parametrize("name", ["00000_stats.json", "00000.parquet", "00000.tar"])
def test_a_file_that_may_not_be_read_is_not_to_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = source_of(Path())
    unit = source.plan().units[0]
    said = rf"read \./{name}: .*Permission denied.*; give the user of the job permission to read it$"
    with forbidden(Path(name)), pytest.raises(ArtifactError, match=said):
        list(source.read(unit))


def test_a_folder_of_something_else_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "00000.jpg").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="output_format webdataset"):
        source_of(tmp_path).plan()


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ('{"count": 4, "successes": 3}', r"00000_stats\.json: .*got \(4, 3\) for \(4, 2\); let img2dataset"),
        ('{"count": 4', r"00000_stats\.json: must be img2dataset's JSON"),
        ("[]", r"00000_stats\.json: must be img2dataset's JSON"),
    ],
)
def test_a_sidecar_of_another_run_than_its_stats_fails_the_unit(tmp_path: Path, stats: str, message: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "00000_stats.json").write_text(stats)
    source = source_of(tmp_path)
    units = source.plan().units
    with pytest.raises(ArtifactError, match=message):
        list(source.read(units[0]))
    assert len(list(source.read(units[1]))) == 4


def test_a_damaged_sidecar_or_tar_fails_the_unit(tmp_path: Path) -> None:
    source = source_of(write_folder(tmp_path, num_shards=3))
    units = source.plan().units
    write_shard(tmp_path, "00000", [row_of("000000000"), row_of("000000000")], in_tar=["000000000"])
    with pytest.raises(ArtifactError, match="a key of its own, got 1 keys in 2 rows"):
        list(source.read(units[0]))
    (tmp_path / "00001.parquet").write_bytes((tmp_path / "00001.parquet").read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"00001\.parquet: must be img2dataset's sidecar"):
        list(source.read(units[1]))
    (tmp_path / "00002.tar").write_bytes((tmp_path / "00002.tar").read_bytes()[:1024])
    with pytest.raises(ArtifactError, match=r"00002\.tar"):
        list(source.read(units[2]))


def test_the_plan_depends_on_tars_and_sidecars_alone(tmp_path: Path) -> None:
    first = source_of(write_folder(tmp_path / "a")).plan()
    write_folder(tmp_path / "b")
    (tmp_path / "b" / "00000_stats.json").write_text('{"count": 4, "successes": 2, "duration": 1234567.5}')
    second = source_of(tmp_path / "b").plan()
    assert [unit.fingerprint for unit in first.units] == [unit.fingerprint for unit in second.units]
    write_shard(tmp_path / "b", "00001", [row_of("000010000", caption="a longer caption than before")])
    third = source_of(tmp_path / "b").plan()
    assert third.units[0].fingerprint == first.units[0].fingerprint
    assert third.units[1].fingerprint != first.units[1].fingerprint
    assert (third.units[0].mark, third.units[1].mark) != (second.units[0].mark, second.units[1].mark)


def test_keys_hold_every_row_also_where_nothing_was_downloaded(tmp_path: Path) -> None:
    write_shard(
        tmp_path, "00000", [row_of(f"{number:09d}", NO_DOWNLOAD, caption="x", url="u") for number in range(3000)]
    )
    plan = source_of(tmp_path).plan()
    assert plan.keys.position_digits >= 4
