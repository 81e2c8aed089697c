"""The files behind `urls` and `urls_file`: order kept, patterns expanded, everything there and named once."""

from pathlib import Path

import pytest

from pipeline.config import S3Config
from pipeline.local_storage import LocalStorage
from pipeline.sources.urls import list_files
from pipeline.storage import ArtifactError


def names(root: Path, *urls: str, urls_file: str | None = None) -> list[str]:
    files = list_files(urls, urls_file=urls_file, s3=S3Config())
    return [Path(file.url).relative_to(root).as_posix() for file in files]


def touch(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())


def test_braces_keep_their_order_and_globs_are_sorted(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a/{number}.tar" for number in (0, 1, 2, 10)), "b/x.tar", "c.tar")
    urls = (f"{tmp_path}/c.tar", f"{tmp_path}/a/{{2..0}}.tar")
    assert names(tmp_path, *urls) == ["c.tar", "a/2.tar", "a/1.tar", "a/0.tar"]
    assert names(tmp_path, f"{tmp_path}/{{b,a}}/*.tar") == ["b/x.tar", "a/0.tar", "a/1.tar", "a/10.tar", "a/2.tar"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/*.tar", ["a/1.tar", "a/12.tar", "a/x.tar"]),
        ("a/?.tar", ["a/1.tar", "a/x.tar"]),
        ("a/[0-9]*.tar", ["a/1.tar", "a/12.tar"]),
        ("a/[!0-9].tar", ["a/x.tar"]),
        ("a/1*", ["a/1.tar", "a/12.tar"]),
        ("*/x.tar", ["a/x.tar", "b/x.tar"]),
        ("[ab]/*/*.tar", ["a/deep/y.tar"]),
        ("a*/x.tar", ["a/x.tar"]),
    ],
)
def test_a_star_stays_within_one_level(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, "a/1.tar", "a/12.tar", "a/x.tar", "a/deep/y.tar", "a/notes.txt", "b/x.tar", "c.tar")
    assert names(tmp_path, f"{tmp_path}/{pattern}") == expected


def test_patterns_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.tar", "b.tar", "d/c.tar")
    monkeypatch.chdir(tmp_path)
    found = list_files(["*.tar", "d/*.tar"], urls_file=None, s3=S3Config())
    assert [file.url for file in found] == ["./a.tar", "./b.tar", "d/c.tar"]


def test_a_file_of_urls_is_read_line_by_line_and_expanded(tmp_path: Path) -> None:
    touch(tmp_path, "a/0.tar", "a/1.tar", "b.tar", "c.tar")
    lines = ["# the corpus", f"{tmp_path}/c.tar", "", f"  {tmp_path}/a/{{1..0}}.tar  ", "#x", f"{tmp_path}/b*.tar"]
    (tmp_path / "urls.txt").write_text("\r\n".join(lines))
    assert names(tmp_path, urls_file=f"{tmp_path}/urls.txt") == ["c.tar", "a/1.tar", "a/0.tar", "b.tar"]


def test_sizes_and_marks_are_those_of_the_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", *(f"many/{number:03d}.tar" for number in range(20)))
    files = list_files([f"{tmp_path}/a.tar", f"{tmp_path}/many/{{000..019}}.tar"], urls_file=None, s3=S3Config())
    for file in files:
        status = Path(file.url).stat()
        assert (file.info.num_bytes, file.info.mark) == (status.st_size, str(status.st_mtime_ns))
    assert len(files) == 21


def test_many_files_of_a_directory_cost_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{number:05d}.tar" for number in range(1000)))
    calls: list[str] = []
    original_list, original_find = LocalStorage.list, LocalStorage.find

    def watched_list(self: LocalStorage, prefix: str = "") -> object:
        calls.append(f"list {prefix}")
        return original_list(self, prefix)

    def watched_find(self: LocalStorage, name: str) -> object:
        calls.append(f"find {name}")
        return original_find(self, name)

    monkeypatch.setattr(LocalStorage, "list", watched_list)
    monkeypatch.setattr(LocalStorage, "find", watched_find)
    assert len(names(tmp_path, f"{tmp_path}/{{00000..00999}}.tar")) == 1000
    assert calls == ["list 00"]
    calls.clear()
    assert names(tmp_path, f"{tmp_path}/00007.tar") == ["00007.tar"]
    assert calls == ["find 00007.tar"]


def test_one_file_by_two_spellings_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/0.tar")
    with pytest.raises(ArtifactError, match=r"may be listed once, got '.*/a/\.\./a/0\.tar' again"):
        names(tmp_path, f"{tmp_path}/*/0.tar", f"{tmp_path}/a/../a/0.tar")


def test_hidden_files_are_found_by_name_and_by_no_pattern(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.tar" for number in range(10)), ".x.tar")
    assert names(tmp_path, f"{tmp_path}/*.tar") == [f"{number}.tar" for number in range(10)]
    assert names(tmp_path, f"{tmp_path}/{{.x,0,1,2,3,4,5,6,7,8,9}}.tar")[0] == ".x.tar"


def test_what_cannot_be_listed_is_named(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.tar" for number in range(10)))
    (tmp_path / "urls.txt").write_text(f"{tmp_path}/none/*.tar\n")
    (tmp_path / "empty.txt").write_text("# nothing yet\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    cases = [
        ({"urls": [f"{tmp_path}/{{0..12}}.tar"]}, r"10\.tar cannot be opened: no such file; check source\.urls"),
        ({"urls": [f"{tmp_path}/x*.tar"]}, r"must match a file, got '.*x\*\.tar'; check source\.urls"),
        ({"urls": [f"{tmp_path}/{{0..2.tar"]}, r"braces must be closed, got '.*\{0\.\.2\.tar'; check source\.urls"),
        ({"urls": [f"{tmp_path}/0.tar", f"{tmp_path}/*.tar"]}, r"listed once, got '.*0\.tar' again; list it once"),
        ({"urls": ["gs://bucket/0.tar"]}, "gs://bucket"),
        ({"urls_file": f"{tmp_path}/urls.txt"}, r"must match a file, got .*; check source\.urls_file"),
        ({"urls_file": f"{tmp_path}/empty.txt"}, r"source\.urls_file must name files, got none"),
        ({"urls_file": f"{tmp_path}/no.txt"}, r"urls_file '.*no\.txt' cannot be read: No such file"),
        ({"urls_file": f"{tmp_path}/binary.txt"}, r"urls_file '.*binary\.txt' cannot be read"),
    ]
    for fields, message in cases:
        with pytest.raises(ArtifactError, match=message):
            list_files(fields.get("urls", ()), urls_file=fields.get("urls_file"), s3=S3Config())
