"""Plans: the same files give the same units, keys fit, and what is missing is named."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from toy_corpus import write_folder, write_tar, write_tars

from pipeline.config import ImageFolderConfig, S3Config, SourceConfig, WebDatasetConfig
from pipeline.sources.plan import Plan
from pipeline.sources.registry import make_source
from pipeline.storage import ArtifactError


def plan(config: SourceConfig) -> Plan:
    return make_source(config, s3=S3Config()).plan()


def tars(*urls: str, class_names: str | None = None) -> WebDatasetConfig:
    return WebDatasetConfig(kind="webdataset", urls=urls, class_names=class_names)


def folder(root: Path, samples_per_unit: int = 1000) -> ImageFolderConfig:
    return ImageFolderConfig(kind="image_folder", root=str(root), samples_per_unit=samples_per_unit)


def test_one_tar_is_one_unit_and_the_order_of_the_urls_is_kept(tmp_path: Path) -> None:
    write_tars(tmp_path / "a", num_tars=3)
    write_tars(tmp_path / "b", num_tars=2)
    units = plan(tars(f"{tmp_path}/b/*.tar", f"{tmp_path}/a/{{00002,00000}}.tar")).units
    assert [Path(unit.details.url).relative_to(tmp_path).as_posix() for unit in units] == [
        "b/00000.tar",
        "b/00001.tar",
        "a/00002.tar",
        "a/00000.tar",
    ]
    assert [unit.unit_index for unit in units] == [0, 1, 2, 3]


def test_keys_are_unit_then_position_and_wide_enough_for_the_largest_tar(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, num_tars=2, samples_per_tar=3)
    with (tmp_path / "00001.tar").open("ab") as file:
        file.truncate(5_000 * 1024)  # at most 5000 samples: positions 0..4999
    keys = plan(tars(pattern)).keys
    assert keys.key(1, 4999) == "000014999"
    assert keys.stem(1) == "00001"


def test_a_position_that_the_plan_did_not_foresee_has_no_key(tmp_path: Path) -> None:
    keys = plan(tars(write_tars(tmp_path, num_tars=1, samples_per_tar=3))).keys
    assert keys.key(0, 99) == "0000099"
    rule = (
        r"unit 0: position must have 2 digits, as plan\.json of the set says, got 100; put the input back as it was, or"
    )
    with pytest.raises(ArtifactError, match=rule):
        keys.key(0, 100)


def test_keys_have_room_for_a_tar_of_nothing_but_empty_members(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{number:04d}.jpg", b"") for number in range(1020)])
    source = make_source(tars(str(tmp_path / "0.tar")), s3=S3Config())
    the_plan = source.plan()
    positions = [sample.position for sample in source.read(the_plan.units[0])]
    assert positions == list(range(1020))
    assert the_plan.keys.key(0, 1019) == "000001019"


def test_folder_keys_are_as_wide_as_the_samples_of_a_unit(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "tree")
    assert plan(folder(root, samples_per_unit=1000)).keys.key(0, 7) == "00000007"
    assert plan(folder(root, samples_per_unit=1001)).keys.key(0, 7) == "000000007"


def test_folder_order_is_that_of_image_folder(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.JPG", "b/deep/1.png", "b/notes.txt", "A/z.webp", "c/x.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = make_source(folder(tmp_path, samples_per_unit=3), s3=S3Config())
    assert source.plan().class_names == ("A", "b", "c")
    units = [[(sample.source, sample.label) for sample in source.read(unit)] for unit in source.plan().units]
    assert units == [
        [("A/z.webp", 0), ("b/10.JPG", 1), ("b/2.png", 1)],
        [("b/deep/1.png", 1), ("c/x.jpeg", 2)],
    ]


def test_a_moved_corpus_keeps_its_fingerprints_and_a_grown_file_changes_one(tmp_path: Path) -> None:
    write_tars(tmp_path / "a", num_tars=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = [unit.fingerprint for unit in plan(tars(f"{tmp_path}/a/*.tar")).units]
    assert [unit.fingerprint for unit in plan(tars(f"{tmp_path}/b/*.tar")).units] == before
    with (tmp_path / "b" / "00001.tar").open("ab") as file:
        file.write(bytes(512))
    after = [unit.fingerprint for unit in plan(tars(f"{tmp_path}/b/*.tar")).units]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_fingerprints_are_those_of_names_and_sizes_as_json(tmp_path: Path) -> None:
    (tmp_path / 'caf\u00e9 "x".tar').write_bytes(bytes(10))
    (unit,) = plan(tars(f"{tmp_path}/*.tar")).units
    expected = hashlib.sha256(json.dumps([['caf\u00e9 "x".tar', 10]]).encode()).hexdigest()[:16]
    assert unit.fingerprint == expected


def test_a_tar_whose_name_is_not_utf8_is_read_and_named(tmp_path: Path) -> None:
    write_tars(tmp_path, num_tars=1, samples_per_tar=2)
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar"))
    (tmp_path / "00000.tar").rename(path)
    source = make_source(tars(f"{tmp_path}/*.tar"), s3=S3Config())
    (unit,) = source.plan().units
    assert unit.name == "caf\\xe9.tar"
    assert [sample.source for sample in source.read(unit)] == ["s0000", "s0001"]
    path.write_bytes(b"x")
    with pytest.raises(ArtifactError) as caught:
        list(source.read(unit))
    assert rf"{tmp_path}/caf\udce9.tar: must be a whole tar".encode() in str(caught.value).encode()


def test_a_mark_changes_when_a_file_is_written_again(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, num_tars=2)
    before = [unit.mark for unit in plan(tars(pattern)).units]
    os.utime(tmp_path / "00001.tar", (1, 1))
    after = [unit.mark for unit in plan(tars(pattern)).units]
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


def test_class_names_of_tars_come_from_their_file(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, num_tars=1)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert plan(tars(pattern, class_names=str(tmp_path / "classes.txt"))).class_names == ("cat", "dog")


def test_a_blank_line_is_no_class(tmp_path: Path) -> None:
    pattern, classes = write_tars(tmp_path, num_tars=1), tmp_path / "classes.txt"
    for text in ("cat\ndog\n\n", "cat\ndog\n \n\n", "cat\r\ndog\r\n\r\n", "cat\ndog"):
        classes.write_text(text)
        assert plan(tars(pattern, class_names=str(classes))).class_names == ("cat", "dog"), text
    for text, got in (("cat\n\ndog\n", "none on line 2"), ("\ncat", "none on line 1"), ("", "none"), ("\n\n", "none")):
        classes.write_text(text)
        with pytest.raises(ArtifactError, match=rf"class_names .*classes\.txt' must hold a class, .* got {got}; mend"):
            plan(tars(pattern, class_names=str(classes)))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path / "t", num_tars=1)
    with pytest.raises(ArtifactError, match="must match a file"):
        plan(tars(f"{tmp_path}/none/*.tar"))
    with pytest.raises(ArtifactError, match=r"00007\.tar"):
        plan(tars(f"{tmp_path}/t/00007.tar"))
    with pytest.raises(ArtifactError, match="listed once"):
        plan(tars(pattern, f"{tmp_path}/t/*.tar"))
    with pytest.raises(ArtifactError, match=r"class_names.*nope\.txt"):
        plan(tars(pattern, class_names=f"{tmp_path}/nope.txt"))
    with pytest.raises(ArtifactError, match="must be a folder"):
        plan(folder(tmp_path / "no"))
    (tmp_path / "tree" / "empty").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="tree/empty"):
        plan(folder(tmp_path / "tree"))
