"""Parquet as a source: row groups are units, only the named columns count, every row is a sample or has its reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forbidden import forbidden
from toy_corpus import png

from pipeline.config import ParquetConfig, S3Config
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.sample import InputSample
from pipeline.storage import ArtifactError


def source_of(*urls: Path | str, **fields: Any) -> ParquetSource:
    config = ParquetConfig(kind="parquet", urls=tuple(map(str, urls)), **fields)
    return ParquetSource(config, s3=S3Config())


def read_all(source: ParquetSource) -> list[InputSample]:
    return [sample for unit in source.plan().units for sample in source.read(unit)]


def write(path: Path, columns: dict[str, Any], *, row_group_size: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def reasons(samples: list[InputSample]) -> list[str | None]:
    return [sample.problem and sample.problem.reason for sample in samples]


def test_a_row_becomes_a_sample_with_the_named_columns(tmp_path: Path) -> None:
    columns = {"jpg": [png(0), png(1)], "text": ["one", None], "class": [3, None], "url": ["u", "v"], "other": [1, 2]}
    path = write(tmp_path / "a.parquet", columns)
    source = source_of(
        path, image_column="jpg", caption_column="text", label_column="class", extra_columns=("url", "text")
    )
    assert read_all(source) == [
        InputSample(
            position=0,
            source="a.parquet#0",
            data=png(0),
            caption="one",
            label=3,
            extra={"url": "u", "text": "one"},
        ),
        InputSample(position=1, source="a.parquet#1", data=png(1), extra={"url": "v", "text": None}),
    ]


def test_a_file_whose_name_is_not_utf8_is_read_and_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"x"]})  # pyarrow opens no such name, we do
    path.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))
    source = source_of(f"{tmp_path}/*.parquet")
    assert [unit.name for unit in source.plan().units] == ["caf\\xe9.parquet row groups 0..0"]
    assert [sample.source for sample in read_all(source)] == ["caf\\xe9.parquet#0"]


def test_units_are_runs_of_row_groups_and_never_span_two_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": [b"%d" % row for row in range(7)]}, row_group_size=2)
    write(tmp_path / "b.parquet", {"image": [b"7", b"8", b"9"]}, row_group_size=2)
    source = source_of(f"{tmp_path}/*.parquet", row_groups_per_unit=3)
    plan = source.plan()
    assert [unit.name for unit in plan.units] == [
        "a.parquet row groups 0..2",
        "a.parquet row groups 3..3",
        "b.parquet row groups 0..1",
    ]
    read = [[(sample.position, sample.source, sample.data) for sample in source.read(unit)] for unit in plan.units]
    assert read[1] == [(0, "a.parquet#6", b"6")]
    assert [[data for _, _, data in unit] for unit in read] == [
        [b"0", b"1", b"2", b"3", b"4", b"5"],
        [b"6"],
        [b"7", b"8", b"9"],
    ]
    assert [position for position, _, _ in read[0]] == [0, 1, 2, 3, 4, 5]


def test_positions_go_on_over_batches_and_row_groups(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"%d" % row for row in range(200)]}, row_group_size=70)
    source = source_of(path, row_groups_per_unit=2)
    first, second = ([(sample.position, sample.data) for sample in source.read(unit)] for unit in source.plan().units)
    assert first == [(row, b"%d" % row) for row in range(140)]
    assert second == [(row - 140, b"%d" % row) for row in range(140, 200)]


def test_keys_are_as_wide_as_the_largest_unit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b""] * 1001}, row_group_size=1001)
    assert source_of(path).plan().keys.key(0, 7) == "000000007"
    path = write(tmp_path / "a.parquet", {"image": [b""] * 1001}, row_group_size=1000)
    assert source_of(path).plan().keys.key(0, 7) == "00000007"


def test_what_hugging_face_writes_is_read_with_its_class_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "caption": datasets.Value("string"),
        }
    )
    rows = {
        "image": [{"bytes": png(number), "path": f"{number}.png"} for number in range(3)],
        "label": [1, 0, 1],
        "caption": ["a", "b", "c"],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train-00000.parquet"))
    source = source_of(tmp_path / "train-00000.parquet", caption_column="caption", label_column="label")
    assert source.plan().class_names == ("cat", "dog")
    samples = read_all(source)
    assert [(sample.data, sample.label, sample.caption) for sample in samples] == [
        (png(0), 1, "a"),
        (png(1), 0, "b"),
        (png(2), 1, "c"),
    ]
    assert samples[0].extra == {"path": "0.png"}


def test_a_label_beyond_the_class_names_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 4, "label": [0, 2, -1, 1]})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    source = source_of(path, label_column="label", class_names=str(tmp_path / "classes.txt"))
    assert source.plan().class_names == ("cat", "dog")
    assert reasons(read_all(source)) == [None, "bad_label", "bad_label", None]


def test_files_that_name_their_classes_differently_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [b"x"], "label": [0]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{number}.parquet"))
    with pytest.raises(ArtifactError, match=r"same class names, got others in .*1\.parquet than in .*0\.parquet"):
        source_of(f"{tmp_path}/*.parquet", label_column="label").plan()


def test_an_image_that_is_not_there_has_its_reason(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "far/away.png"}, None]
    path = write(tmp_path / "a.parquet", {"image": pa.array(images, kind)})
    samples = read_all(source_of(path))
    assert reasons(samples) == [None, "no_image_bytes", "null_image"]
    assert samples[1].problem is not None
    assert "far/away.png" in samples[1].problem.detail
    assert [sample.position for sample in samples] == [0, 1, 2]
    plain = write(tmp_path / "b.parquet", {"image": [b"x", None]})
    assert reasons(read_all(source_of(plain))) == [None, "null_image"]


@pytest.mark.parametrize(
    "encode",
    [
        lambda values: pa.array(values, pa.large_binary()),
        lambda values: pa.array(values, pa.binary_view()),
        lambda values: pa.array(values, pa.binary()).dictionary_encode(),
        lambda values: pa.array([{"bytes": value} for value in values], pa.struct([("bytes", pa.large_binary())])),
    ],
    ids=["large", "view", "dictionary", "struct_of_large"],
)
def test_every_encoding_of_bytes_is_read(tmp_path: Path, encode: Callable[[list[bytes]], pa.Array]) -> None:
    path = write(tmp_path / "a.parquet", {"image": encode([b"one", b"two", b"one"])})
    assert [sample.data for sample in read_all(source_of(path))] == [b"one", b"two", b"one"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_every_encoding_of_text_and_integers_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["a", None, "b"]).cast(kind)
    labels = pa.array([2, 0, None], pa.uint8())
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 3, "caption": texts, "label": labels})
    samples = read_all(source_of(path, caption_column="caption", label_column="label"))
    assert [(sample.caption, sample.label) for sample in samples] == [("a", 2), (None, 0), ("b", None)]


def test_text_that_is_not_utf8_is_that_rows_problem_alone(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0])), pa.py_buffer(b"ok\xff\xfego")],
    )
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 3, "caption": texts})
    samples = read_all(source_of(path, caption_column="caption"))
    assert reasons(samples) == [None, "bad_text", None]
    assert samples[2].caption == "go"
    assert reasons(read_all(source_of(path, extra_columns=("caption",)))) == [None, "bad_text", None]


def test_text_of_a_dictionary_column_that_is_not_utf8_is_its_rows_problem_alone(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"\xff\xfe", b"go"]).view(pa.string())
    texts = pa.DictionaryArray.from_arrays(pa.array([2, 1, None, 0, 2], pa.int8()), bad)
    columns = {"image": [b"x"] * 5, "caption": texts, "info": pa.StructArray.from_arrays([texts], ["t"])}
    path = write(tmp_path / "a.parquet", columns | {"label": pa.array([4, 3, None, 1, 0]).dictionary_encode()})
    samples = read_all(source_of(path, caption_column="caption", label_column="label"))
    assert reasons(samples) == [None, "bad_text", None, None, None]
    assert [(sample.caption, sample.label) for sample in samples if sample.problem is None] == [
        ("go", 4),
        (None, None),
        ("ok", 1),
        ("go", 0),
    ]
    samples = read_all(source_of(path, extra_columns=("info",)))
    assert reasons(samples) == [None, "bad_text", None, None, None]
    assert samples[3].extra == {"info": {"t": "ok"}}


def test_extra_values_can_be_written_as_json(tmp_path: Path) -> None:
    columns = {
        "image": [b"x"],
        "score": [float("nan")],
        "boxes": [[[0.5, float("inf")]]],
        "info": [{"n": 1, "ok": True}],
    }
    (sample,) = read_all(source_of(write(tmp_path / "a.parquet", columns), extra_columns=("score", "boxes", "info")))
    assert sample.extra == {"score": None, "boxes": [[0.5, None]], "info": {"n": 1, "ok": True}}
    json.dumps(sample.extra, allow_nan=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_column": "imge"},
            r"a\.parquet: there must be one column 'imge' .*image, text, n, x; did you mean image",
        ),
        ({"image_column": "text"}, r"a\.parquet: column 'text' must be bytes .*got string; such columns are image"),
        ({"caption_column": "n"}, r"column 'n' must be text to be source\.caption_column, got int64; such .* text"),
        ({"label_column": "text"}, r"column 'text' must be integers .*such columns are n"),
        ({"label_column": "x"}, r"column 'x' must be integers .*got double"),
        ({"extra_columns": ["n", "image"]}, r"column 'image' must be numbers, text.* got binary; .* text, n, x"),
        ({"extra_columns": ["nothing"]}, r"one column 'nothing' .* got 0 .*; check source\.extra_columns"),
    ],
)
def test_a_wrong_column_is_named_before_anything_is_read(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"x"], "text": ["t"], "n": [1], "x": [0.5]})
    with pytest.raises(ArtifactError, match=message):
        source_of(path, **fields).plan()


def test_a_file_that_is_no_parquet_fails_the_plan_by_name(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.parquet", {"image": [png(number) for number in range(4)]}).read_bytes()
    damaged = [b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], whole[:-8] + b"\xff\xff\xff\x7fPAR1", bytes(100)]
    damaged.append(whole[:-60] + bytes(52) + whole[-8:])
    for data in damaged:
        (tmp_path / "b.parquet").write_bytes(data)
        with pytest.raises(ArtifactError, match=r"read .*b\.parquet: must be a Parquet file, got .*again"):
            source_of(f"{tmp_path}/*.parquet").plan()


def test_a_file_that_may_not_be_read_is_not_to_be_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", {"image": [b"x"]})
    monkeypatch.chdir(tmp_path)
    source = source_of("a.parquet")
    (unit,) = source.plan().units
    said = r"read \./a\.parquet: .* Permission denied.*; give the user of the job permission to read it$"
    for look in (source.plan, lambda: list(source.read(unit))):
        with forbidden(Path("a.parquet")), pytest.raises(ArtifactError, match=said):
            look()


def test_a_footer_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    columns = {"image": [b"x"] * 300} | {f"column_{number:03d}": ["y"] * 300 for number in range(40)}
    path = write(tmp_path / "a.parquet", columns, row_group_size=2)
    assert int.from_bytes(path.read_bytes()[-8:-4], "little") > 1 << 17
    assert len(source_of(path).plan().units) == 150


def test_a_row_group_that_is_damaged_later_fails_its_unit_alone(tmp_path: Path) -> None:
    images = [png(number) for number in range(40)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=10, compression="zstd", write_page_checksum=True)
    source = source_of(path)
    plan = source.plan()
    offset = pq.read_metadata(path).row_group(2).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[offset + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"a\.parquet: row groups 2\.\.2 must be whole, got .*again"):
        list(source.read(plan.units[2]))
    assert [sample.data for sample in source.read(plan.units[3])] == images[30:]


def test_a_file_that_is_another_than_was_planned_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 6}, row_group_size=3)
    source = source_of(path)
    units = source.plan().units
    write(path, {"image": [b"x"] * 4}, row_group_size=2)
    with pytest.raises(ArtifactError, match=r"must hold 3 rows as planned, got 2"):
        list(source.read(units[0]))
    write(path, {"image": [b"x"] * 3}, row_group_size=3)
    with pytest.raises(ArtifactError, match=r"row groups 1\.\.1 must be whole"):
        list(source.read(units[1]))


def test_the_plan_depends_on_the_files_alone(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "x.parquet", {"image": [b"x"] * 6}, row_group_size=3)
    first, second = (source_of(tmp_path / folder / "x.parquet").plan() for folder in ("a", "b"))
    assert [unit.fingerprint for unit in first.units] == [unit.fingerprint for unit in second.units]
    assert len({unit.fingerprint for unit in first.units}) == 2
    write(tmp_path / "b" / "x.parquet", {"image": [b"x", b"yy"] * 3}, row_group_size=3)
    third = source_of(tmp_path / "b" / "x.parquet").plan()
    assert {unit.fingerprint for unit in third.units}.isdisjoint(unit.fingerprint for unit in first.units)
    assert {unit.mark for unit in third.units}.isdisjoint(unit.mark for unit in second.units)


def test_a_set_without_a_row_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(ArtifactError, match="must hold rows, got none in 1"):
        source_of(path).plan()
