"""Reading tars and folders: webdataset's grouping, every cut noticed, every problem named."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from toy_corpus import Members, png, sample_members, write_folder, write_tar
from webdataset import tariterators

from pipeline.config import ImageFolderConfig, S3Config, WebDatasetConfig
from pipeline.sources.registry import make_source
from pipeline.sources.sample import InputSample, content_digest
from pipeline.storage import ArtifactError


def read(path: Path, *, class_names: Path | None = None) -> list[InputSample]:
    names = None if class_names is None else str(class_names)
    config = WebDatasetConfig(kind="webdataset", urls=(str(path),), class_names=names)
    source = make_source(config, s3=S3Config())
    return list(source.read(source.plan().units[0]))


def test_fields_of_good_samples(tmp_path: Path) -> None:
    members = [*sample_members(0, style="flat"), ("a/b.WEBP", png(1)), ("a/b.txt", b" two\n"), ("a/b.cls", b"5")]
    first, second = read(write_tar(tmp_path / "t.tar", members))
    assert first == InputSample(
        position=0, source="s0000", data=png(0), caption="thing 0", label=0, extra={"group": "toys", "style": "flat"}
    )
    assert second == InputSample(position=1, source="a/b", data=png(1), caption="two", label=5, extra={})


def test_an_image_of_every_format_is_a_tars_image_as_it_is_a_folders(tmp_path: Path) -> None:
    endings = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
    path = write_tar(tmp_path / "t.tar", [(f"{ending}.{ending}", png(0)) for ending in endings])
    assert [(sample.source, sample.problem) for sample in read(path)] == [(ending, None) for ending in endings]


def test_members_group_as_in_webdataset(tmp_path: Path) -> None:
    names = ["a.png", "a.json", "b.left.png", "b.png", "dir.v1/c.PNG", "dir.v1/c.json", "__meta__/x.png", "noext"]
    names += ["d.png", "__d__.json", ".hidden.png", "e.json", "e.png", "a/e.png"]
    path = write_tar(tmp_path / "t.tar", [(name, b"{}" if name.endswith("json") else png(1)) for name in names])
    theirs = [
        (sample["__key__"], any(extension in sample for extension in ("png", "jpg", "jpeg", "webp")))
        for sample in tariterators.tarfile_samples([{"url": str(path)}])
    ]
    assert [(sample.source, sample.problem is None) for sample in read(path)] == theirs
    assert len(theirs) == 7


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.cls", b"1"), ("a.png", png(0)), ("b.png", png(1)), ("b.cls", b"0")])
    with tarfile.open(path) as tar:
        tar.getmembers()
        end_of_members = tar.offset
    whole = path.read_bytes()
    cuts = sorted({*range(0, end_of_members, 512), *range(1, end_of_members, 97), end_of_members, end_of_members + 511})
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match=r"t\.tar.*fetch or write it again"):
            read(path)
    path.write_bytes(whole[: end_of_members + 512])
    assert [sample.source for sample in read(path)] == ["a", "b"]


def test_other_damage_to_a_tar_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.png", png(0)), ("b.png", png(1))])
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ArtifactError, match="uncompressed tar"):
        read(path)
    path.write_bytes(whole + whole)
    with pytest.raises(ArtifactError, match="split joined tars"):
        read(path)
    second_header = whole.index(b"b.png")
    path.write_bytes(whole[:second_header] + b"X" + whole[second_header + 1 :])
    with pytest.raises(ArtifactError, match="zero blocks"):
        read(path)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.json", b"{}")], "no_image"),
        ([("a.png", b"x"), ("a.jpg", b"y")], "several_images"),
        ([("a.png", b"x"), ("a.PNG", b"y")], "duplicate_member"),
        ([("a.png", b"x"), ("a.json", b"{")], "bad_json"),
        ([("a.png", b"x"), ("a.json", b"[1]")], "bad_json"),
        ([("a.png", b"x"), ("a.json", b'{"score": NaN}')], "bad_json"),
        ([("a.png", b"x"), ("a.json", b'{"name": "\\ud800"}')], "bad_json"),
        ([("a.png", b"x"), ("a.json", b"\xff")], "bad_json"),
        ([("a.png", b"x"), ("a.json", b'{"caption": 3}')], "bad_caption"),
        ([("a.png", b"x"), ("a.txt", b"\xff")], "bad_caption"),
        ([("a.png", b"x"), ("a.json", b'{"label": true}')], "bad_label"),
        ([("a.png", b"x"), ("a.json", b'{"label": -1}')], "bad_label"),
        ([("a.png", b"x"), ("a.json", b'{"label": 1.0}')], "bad_label"),
        ([("a.png", b"x"), ("a.json", b'{"label": 2}')], "bad_label"),
        ([("a.png", b"x"), ("a.cls", b"two")], "bad_label"),
    ],
)
def test_a_sample_that_cannot_be_used_has_its_reason_and_the_next_is_read(
    tmp_path: Path, members: Members, reason: str
) -> None:
    (tmp_path / "classes.txt").write_text("zero\none\n")
    path = write_tar(tmp_path / "t.tar", [*members, ("z.png", png(0)), ("z.cls", b"1")])
    bad, good = read(path, class_names=tmp_path / "classes.txt")
    assert bad.problem is not None
    assert (bad.source, bad.position, bad.problem.stage, bad.problem.reason) == ("a", 0, "read", reason)
    assert (good.source, good.position, good.problem, good.label) == ("z", 1, None, 1)


def test_a_link_in_a_tar_makes_its_sample_a_reject(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in [
            ("a.png", tarfile.REGTYPE),
            ("b.png", tarfile.LNKTYPE),
            ("c.png", tarfile.REGTYPE),
            ("c.TXT", tarfile.SYMTYPE),
            ("d/" * 60 + "d.jpg", tarfile.SYMTYPE),
            ("e.png", tarfile.REGTYPE),
            ("e.v2", tarfile.SYMTYPE),
            ("latest.v1", tarfile.SYMTYPE),
            ("noext", tarfile.LNKTYPE),
            ("f.png", tarfile.REGTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "" if kind == tarfile.REGTYPE else "a.png"
            tar.addfile(member)
    samples = [(sample.source, sample.problem and sample.problem.reason) for sample in read(tmp_path / "t.tar")]
    linked = [("b", "link"), ("c", "link"), ("d/" * 60 + "d", "link")]
    assert samples == [("a", None), *linked, ("e", None), ("f", None)]


def test_a_key_at_two_places_is_rejected_the_second_time(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.png", png(0)), ("b.png", png(1)), ("a.json", b"{}")])
    samples = read(path)
    assert [sample.source for sample in samples] == ["a", "b", "a"]
    assert [sample.problem and sample.problem.reason for sample in samples] == [None, None, "duplicate_key"]


def test_names_that_are_not_utf8_become_printable(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        member = tarfile.TarInfo("caf\xe9.png")
        member.size = len(png(0))
        tar.addfile(member, io.BytesIO(png(0)))
    (sample,) = read(tmp_path / "t.tar")
    assert sample.source.encode("utf-8").decode("ascii") == "caf\\xe9"


def test_the_fields_of_the_json_may_have_other_names_and_more_formats_are_read(tmp_path: Path) -> None:
    fields = {"text": "a cat", "class": 3, "caption": "kept"}
    path = write_tar(tmp_path / "t.tar", [("a.gif", b"x"), ("a.json", json.dumps(fields).encode()), ("b.TIFF", b"y")])
    config = WebDatasetConfig(kind="webdataset", urls=(str(path),), caption_field="text", label_field="class")
    source = make_source(config, s3=S3Config())
    first, second = source.read(source.plan().units[0])
    assert (first.caption, first.label, first.extra) == ("a cat", 3, {"caption": "kept"})
    assert (second.data, second.problem) == (b"y", None)


def test_folder_samples_carry_path_and_class_and_a_lost_file_is_a_problem(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "tree", images_per_class=2)
    source = make_source(ImageFolderConfig(kind="image_folder", root=str(root)), s3=S3Config())
    unit = source.plan().units[0]
    (root / "bear" / "0.png").unlink()
    samples = list(source.read(unit))
    assert [(sample.source, sample.label) for sample in samples[:2]] == [("apple/0.png", 0), ("apple/1.png", 0)]
    assert samples[0].data == png(0)
    assert samples[2].problem is not None
    assert (samples[2].source, samples[2].problem.reason) == ("bear/0.png", "unreadable")
    assert (samples[3].source, samples[3].label) == ("bear/1.png", 1)


def test_the_content_digest_sees_every_byte_of_data_and_metadata(tmp_path: Path) -> None:
    def digest(members: Members) -> str:
        return content_digest(read(write_tar(tmp_path / "t.tar", members)))

    before = digest(sample_members(0))
    assert digest(sample_members(0)) == before
    assert digest(sample_members(0, caption="other")) != before
    assert digest(sample_members(0, style="other")) != before
    image, metadata = sample_members(0)
    assert digest([(image[0], image[1][:-1] + b"x"), metadata]) != before
