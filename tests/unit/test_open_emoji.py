"""How the demo's corpus is split, sampled and described; fetching it is the demo's own test."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from jobs.npm import FetchError, NpmPackage, fetch_packages
from jobs.open_emoji import Concept, build_open_emoji, draw, keeps, metadata_of, read_concepts, split_of

GROUPS = {
    "groups": {"0": "smileys-emotion", "1": "people-body", "2": "component"},
    "subgroups": {"0": "face-smiling", "16": "hand-fingers-open", "32": "skin-tone"},
}
DATA: list[dict[str, Any]] = [
    {"label": "grinning face", "hexcode": "1F600", "tags": ["happy"], "group": 0, "subgroup": 0},
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "tags": ["hello"],
        "group": 1,
        "subgroup": 16,
        "skins": [{"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB"}],
    },
    {"label": "light skin tone", "hexcode": "1F3FB", "group": 2, "subgroup": 32},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]


def concept(hexcode: str, base_hexcode: str) -> Concept:
    return Concept(hexcode=hexcode, base_hexcode=base_hexcode, text="x", tags=(), group="g", class_name="face-smiling")


def test_the_split_follows_the_hash_of_the_base_concept() -> None:
    hexcodes = [f"{0x1F300 + index:X}" for index in range(2000)]
    expected = {code: int(hashlib.sha256(code.encode()).hexdigest(), 16) % 20 == 0 for code in hexcodes}
    assert {code: split_of(code) == "validation" for code in hexcodes} == expected
    assert 60 < sum(expected.values()) < 140
    assert split_of("1F600") == "train"
    assert split_of("1F37E") == "validation"


def test_a_skin_tone_variant_stays_on_the_side_of_its_base() -> None:
    assert concept("1F37E-1F3FB", "1F37E").split == "validation"


def test_all_plain_drawings_and_three_tenths_of_the_variants_are_kept() -> None:
    bases = [f"{0x1F300 + index:X}" for index in range(2000)]
    assert all(keeps(style="noto", concept=concept(base, base)) for base in bases)
    kept = [keeps(style="noto", concept=concept(f"{base}-1F3FB", base)) for base in bases]
    assert 0.27 < sum(kept) / len(kept) < 0.33
    other = [keeps(style="twemoji", concept=concept(f"{base}-1F3FB", base)) for base in bases]
    assert kept != other


def test_concepts_are_those_with_a_subgroup_and_their_variants() -> None:
    concepts = read_concepts(DATA, GROUPS)
    assert [(c.hexcode, c.base_hexcode, c.class_name) for c in concepts] == [
        ("1F600", "1F600", "face-smiling"),
        ("1F44B", "1F44B", "hand-fingers-open"),
        ("1F44B-1F3FB", "1F44B", "hand-fingers-open"),
    ]


def test_a_drawing_is_found_without_the_variation_selector_and_described() -> None:
    concepts = [Concept("263A-FE0F", "263A-FE0F", "smiling face", ("happy",), "smileys-emotion", "face-smiling")]
    icons = {"width": 36, "height": 36, "icons": {"smiling-face": {"body": "<path/>", "width": 40}}}
    (drawing,) = draw(concepts, style="noto", icons=icons, chars={"263a": "smiling-face"})
    assert drawing.key == "263a-fe0f-noto"
    assert drawing.svg == (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'viewBox="0 0 40 36" width="64" height="64"><path/></svg>'
    )
    assert metadata_of(drawing, class_names=["arrow", "face-smiling"]) == {
        "caption": "smiling face, noto style",
        "label": 1,
        "class": "face-smiling",
        "group": "smileys-emotion",
        "style": "noto",
        "concept": "smiling face",
        "tags": ["happy"],
        "hexcode": "263A-FE0F",
    }


def test_a_corpus_in_place_is_not_built_again(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({"version": 1, "num_samples": {"train": 3}}))
    record = build_open_emoji(tmp_path / "corpus", download_dir=tmp_path / "downloads")
    assert record["num_samples"] == {"train": 3}
    assert not (tmp_path / "downloads").exists()


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ValueError, match="must be absent or hold version 1 of the corpus, got version None"):
        build_open_emoji(tmp_path / "corpus", download_dir=tmp_path / "downloads")


def package_at(path: Path) -> NpmPackage:
    member = path.parent / "data.json"
    member.write_text("{}")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(member, arcname="package/data.json")
    return NpmPackage(name="@own/thing", version="1.0.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_tarballs_put_there_by_hand_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_at(tmp_path / "own-thing-1.0.0.tgz")
    monkeypatch.setenv("PATH", "")
    assert fetch_packages((package,), download_dir=tmp_path) == {"@own/thing": tmp_path / "own-thing-1.0.0.tgz"}


def test_a_tarball_of_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own-thing-1.0.0.tgz"
    package = package_at(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(FetchError, match=r"its sha256 must be .*; delete it and fetch it again with `npm pack"):
        fetch_packages((package,), download_dir=tmp_path)


def test_without_network_the_error_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    said = (
        "code ENOTFOUND",
        "request to http://r/x failed, reason: getaddrinfo ENOTFOUND r",
        "A complete log is in: x",
    )
    npm.write_text("#!/bin/sh\n" + "".join(f"echo 'npm error {line}' >&2\n" for line in said) + "exit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/bin:/usr/bin")
    package = NpmPackage(name="@own/thing", version="1.0.0", sha256="0" * 64)
    with pytest.raises(FetchError) as caught:
        fetch_packages((package,), download_dir=tmp_path / "downloads")
    assert str(caught.value) == (
        "fetching 1 npm packages: the registry must be reachable through npm, got 'npm error request to "
        "http://r/x failed, reason: getaddrinfo ENOTFOUND r'; "
        "on a machine with network run `npm pack @own/thing@1.0.0`, "
        f"copy the .tgz files into {tmp_path / 'downloads'} and run this again"
    )
    assert list((tmp_path / "downloads").iterdir()) == []
