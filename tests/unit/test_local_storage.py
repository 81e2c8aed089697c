"""Stage and commit: a name is whole or absent, leftovers are found, one writer at a time."""

import json
from pathlib import Path

import pytest

from pipeline.local_storage import (
    exclusive,
    find_staged,
    local_path,
    remove_staged,
    sha256_of_file,
    stage,
    write_bytes,
    write_json,
)
from pipeline.storage import ArtifactError


def test_nothing_is_visible_before_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with stage(path) as staged_path:
        staged_path.write_bytes(b"whole")
        assert not path.exists()
        assert staged_path.parent == path.parent
        assert staged_path.name.startswith(".staged-a.bin-")
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bin"]


def test_an_error_leaves_the_old_file_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with stage(path) as staged_path:
            staged_path.write_bytes(b"half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), stage(tmp_path / "a.bin"):
        pass


def test_a_directory_is_committed_whole(tmp_path: Path) -> None:
    with stage(tmp_path / "step") as staged_path:
        (staged_path / "inner").mkdir(parents=True)
        (staged_path / "inner" / "a").write_text("1")
        assert not (tmp_path / "step").exists()
    assert (tmp_path / "step" / "inner" / "a").read_text() == "1"
    assert find_staged(tmp_path) == []


def test_leftovers_of_killed_runs_are_found_and_removed(tmp_path: Path) -> None:
    (tmp_path / "shards" / ".staged-b-2-beef").mkdir(parents=True)
    (tmp_path / "shards" / ".staged-b-2-beef" / "x").write_text("half")
    (tmp_path / ".staged-a-1-dead").write_text("half")
    (tmp_path / "shards" / "00000.tar").write_text("data")
    assert [path.name for path in find_staged(tmp_path)] == [".staged-a-1-dead", ".staged-b-2-beef"]
    assert remove_staged(tmp_path) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["00000.tar"]


def test_json_keeps_its_order_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "ü"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert list(json.loads(text).items()) == [("b", 1), ("a", "ü")]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads(text) == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    first, second = exclusive(tmp_path / "run"), exclusive(tmp_path / "run")
    with first, pytest.raises(ArtifactError, match="one job at a time"):
        second.__enter__()
    with exclusive(tmp_path / "run"):
        pass


def test_object_storage_is_refused_by_name() -> None:
    with pytest.raises(ArtifactError, match="s3://bucket/x"):
        local_path("s3://bucket/x")
