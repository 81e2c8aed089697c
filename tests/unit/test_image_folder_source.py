"""Folders as a source: captions beside the images, plans that stay small, files that are lost later."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from toy_corpus import png

from pipeline.config import ImageFolderConfig, S3Config
from pipeline.sources.image_folder import ImageFolderSource
from pipeline.sources.sample import InputSample
from pipeline.storage import ArtifactError


def source_of(root: Path, **fields: Any) -> ImageFolderSource:
    return ImageFolderSource(ImageFolderConfig(kind="image_folder", root=str(root), **fields), s3=S3Config())


def captions(root: Path, **fields: Any) -> ImageFolderSource:
    return source_of(root, layout="captions", **fields)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def read(source: ImageFolderSource, unit_index: int = 0) -> list[InputSample]:
    return list(source.read(source.plan().units[unit_index]))


def test_captions_lie_beside_the_images_at_any_depth(tmp_path: Path) -> None:
    fields = {"caption": "in json", "label": 7, "author": "me"}
    write(
        tmp_path,
        {
            "b.png": png(0),
            "b.txt": b"\xef\xbb\xbf two words\n",
            "a/x.v1.JPG": png(1),
            "a/x.v1.json": json.dumps(fields).encode(),
            "a/deep/y.png": png(2),
            "a/deep/y.txt": b"txt wins",
            "a/deep/y.json": json.dumps(fields).encode(),
            "README.txt": b"no image",
        },
    )
    source = captions(tmp_path)
    assert source.plan().class_names is None
    assert read(source) == [
        InputSample(position=0, source="b.png", data=png(0), caption="two words", extra={}),
        InputSample(position=1, source="a/x.v1.JPG", data=png(1), caption="in json", label=7, extra={"author": "me"}),
        InputSample(
            position=2, source="a/deep/y.png", data=png(2), caption="txt wins", label=7, extra={"author": "me"}
        ),
    ]


@pytest.mark.parametrize(
    ("sidecar", "reason"),
    [
        ({}, "no_caption"),
        ({"a.json": b"{}"}, "no_caption"),
        ({"a.json": b'{"caption": null}'}, "no_caption"),
        ({"a.json": b'{"caption": 5}'}, "bad_caption"),
        ({"a.json": b"{"}, "bad_json"),
        ({"a.json": b'{"caption": "x", "label": "y"}'}, "bad_label"),
        ({"a.txt": b"\xff"}, "bad_caption"),
    ],
)
def test_an_image_without_a_usable_caption_has_its_reason(
    tmp_path: Path, sidecar: dict[str, bytes], reason: str
) -> None:
    write(tmp_path, {"a.png": png(0), "z.png": png(1), "z.txt": b"good"} | sidecar)
    bad, good = read(captions(tmp_path))
    assert bad.problem is not None
    assert (bad.source, bad.problem.stage, bad.problem.reason) == ("a.png", "read", reason)
    assert (good.caption, good.problem) == ("good", None)


def test_a_tree_without_any_caption_is_refused_at_once(tmp_path: Path) -> None:
    write(tmp_path, {"cat/a.png": b"x", "cat/a.png.caption": b"x"})
    with pytest.raises(ArtifactError, match=r"must have captions beside them .*got none; use layout: class_per_folder"):
        captions(tmp_path).plan()
    (tmp_path / "cat" / "empty").mkdir()
    with pytest.raises(ArtifactError, match="must hold images with captions beside them, got none"):
        captions(tmp_path / "cat" / "empty").plan()


def test_a_changed_caption_changes_its_unit_alone(tmp_path: Path) -> None:
    files = {f"{number}.png": png(number) for number in range(4)} | {f"{number}.txt": b"old" for number in range(4)}
    write(tmp_path, files)
    before = captions(tmp_path, samples_per_unit=2).plan().units
    os.utime(tmp_path / "1.txt", (1, 1))
    touched = captions(tmp_path, samples_per_unit=2).plan().units
    assert [unit.fingerprint for unit in touched] == [unit.fingerprint for unit in before]
    assert [unit.mark != old.mark for unit, old in zip(touched, before, strict=True)] == [True, False]
    (tmp_path / "3.txt").write_bytes(b"longer")
    after = captions(tmp_path, samples_per_unit=2).plan().units
    changed = [unit.fingerprint != old.fingerprint for unit, old in zip(after, before, strict=True)]
    assert changed == [False, True]


def test_files_that_are_lost_after_the_plan_are_rejects(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("a.png", "a.txt", "b.png", "b.txt", "c.png", "c.txt"), b"x"))
    source = captions(tmp_path)
    (unit,) = source.plan().units
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.txt").unlink()
    samples = list(source.read(unit))
    assert [sample.problem and sample.problem.reason for sample in samples] == ["unreadable", "unreadable", None]


def test_labels_follow_the_sorted_folders_over_the_borders_of_units(tmp_path: Path) -> None:
    write(tmp_path, {f"{folder}/{number}.png": b"x" for folder in ("b", "a", "b-c", "a/sub") for number in range(3)})
    source = source_of(tmp_path, samples_per_unit=4)
    plan = source.plan()
    assert plan.class_names == ("a", "b", "b-c")
    samples = [(sample.source, sample.label) for unit in plan.units for sample in source.read(unit)]
    expected = [("a", 0), ("a/sub", 0), ("b", 1), ("b-c", 2)]
    assert samples == [(f"{folder}/{number}.png", label) for folder, label in expected for number in range(3)]


def test_folders_without_images_and_hidden_ones(tmp_path: Path) -> None:
    write(tmp_path, {"a/0.png": b"x", ".cache/0.png": b"x", "a/.0.png": b"x"})
    assert source_of(tmp_path).plan().class_names == ("a",)
    assert [sample.source for sample in read(source_of(tmp_path))] == ["a/0.png"]
    write(tmp_path, {"notes/x.txt": b"x"})
    with pytest.raises(ArtifactError, match=r"every class folder must hold images, got none in .*/notes; remove it"):
        source_of(tmp_path).plan()


def test_a_class_folder_that_is_a_link_to_nothing_moves_no_label(tmp_path: Path) -> None:
    write(tmp_path, {"a/0.png": b"x", "c/0.png": b"x"})
    (tmp_path / "b").symlink_to("/gone/b")
    with pytest.raises(ArtifactError, match=r"list .*/b: a link must lead to .* got one to '/gone/b', .* remove the"):
        source_of(tmp_path).plan()


def test_a_link_back_to_the_root_is_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path / "root", {"a/0.png": b"a", "z/0.png": b"z"})
    elsewhere = write(tmp_path / "elsewhere", {"1.png": b"m"})
    (root / "self").symlink_to(".")
    (root / "m").symlink_to(elsewhere)
    (root / "a" / "up").symlink_to("..")
    source = source_of(root)
    assert source.plan().class_names == ("a", "m", "z")
    assert [(sample.source, sample.label) for sample in read(source)] == [
        ("a/0.png", 0),
        ("m/1.png", 1),
        ("z/0.png", 2),
    ]
    for link in ("self", "a/up"):
        told = f"list {root}/{link}: the link leads back to a directory above it and is left out"
        assert told in [record.getMessage() for record in caplog.records]


NOT_SEEN = "plan source: {} files below {} are not seen, since their names do not end as those of images: {}"


def test_files_that_are_not_seen_are_counted_by_extension(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = ["a/0.png", "a/1.JPG", "b/2.webp", "b/deep/3.tiff"]
    write(tmp_path, dict.fromkeys([*seen, "a/0.gif", "b/1.gif", "b/2.GIF", "b/d", "a/e.v1/x.heic"], b"x"))
    assert [sample.source for sample in read(source_of(tmp_path))] == seen
    assert [record.getMessage() for record in caplog.records] == [
        NOT_SEEN.format(5, tmp_path, ".gif 2, .GIF 1, .heic 1, none 1")
    ]
    caplog.clear()
    write(tmp_path, {f"a/{number}.x{number:02d}" + "y" * 100: b"x" for number in range(9)})
    source_of(tmp_path).plan()
    shown = ", ".join([".gif 2", ".GIF 1", ".heic 1", *(f".x0{number}yyyyyyyyyyyy 1" for number in range(5))])
    assert [record.getMessage() for record in caplog.records] == [
        NOT_SEEN.format(14, tmp_path, f"{shown} and 5 other endings")
    ]


def test_captioned_images_have_more_extensions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a.gif", "b.JFIF", "c.jpe", "d.png", "e.heic"]
    write(tmp_path, {name: name.encode() for name in names} | {f"{name[0]}.txt": b"words" for name in names})
    write(tmp_path, {"orphan.json": b"{}", "f.TXT": b"x"})
    samples = read(captions(tmp_path))
    assert [(sample.source, sample.data, sample.caption) for sample in samples] == [
        (name, name.encode(), "words") for name in names[:4]
    ]
    assert [record.getMessage() for record in caplog.records] == [NOT_SEEN.format(2, tmp_path, ".TXT 1, .heic 1")]


def test_names_of_any_bytes_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, name in enumerate((b"line\nbreak.png", "\u00e9\U0001f600.png".encode(), b"latin\xe9.png")):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/" + name)).write_bytes(b"%d" % number)
    samples = read(source_of(tmp_path))
    assert {sample.source: sample.data for sample in samples} == {
        "a/line\nbreak.png": b"0",
        "a/\u00e9\U0001f600.png": b"1",
        "a/latin\\xe9.png": b"2",
    }


def test_class_folders_of_any_bytes_have_printable_names(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"a", "\u00e9".encode()):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        folder.mkdir()
        (folder / "0.png").write_bytes(name)
    source = source_of(tmp_path)
    assert source.plan().class_names == ("a", "caf\\xe9", "\u00e9")
    assert [sample.data for sample in read(source)] == [b"a", b"caf\xe9", b"\xc3\xa9"]


def test_a_plan_holds_a_few_bytes_a_sample(tmp_path: Path) -> None:
    (tmp_path / "n01440764").mkdir()
    for number in range(3000):
        (tmp_path / "n01440764" / f"n01440764_{number * 7919 % 50000}.JPEG").touch()
    plan = source_of(tmp_path).plan()
    assert len(plan.units) == 3
    assert sum(len(pickle.dumps(unit)) for unit in plan.units) < 6 * 3000
