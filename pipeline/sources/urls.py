"""The files behind `urls` or `urls_file`: braces and globs expanded, sizes and marks from few listings.

The invariant: the order of the spec is kept, a glob is sorted, and every file is there, once. One listing serves all
files of a directory, so 100,000 tars cost one pass over a directory or 100 requests; a handful is asked for by name, so
that one file of a huge directory costs no listing.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import braceexpand

from pipeline.config import S3Config
from pipeline.storage import ArtifactError, FileInfo, open_storage, split_url

MAX_FILES_ASKED_BY_NAME = 8


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of a corpus: where it lies, and what its listing says."""

    directory: str
    name: str
    info: FileInfo

    @property
    def url(self) -> str:
        """Its path or URL."""
        return f"{self.directory.rstrip('/')}/{self.name}"

    @property
    def base_name(self) -> str:
        """Its name without the folders that a pattern matched."""
        return self.name.rpartition("/")[2]


def list_files(urls: Sequence[str], *, urls_file: str | None, s3: S3Config) -> list[ListedFile]:
    """Return the files that a source names, in order; at least one.

    Args:
        urls: paths or `s3://` URLs with braces and globs.
        urls_file: a text file of such, read instead of `urls` where it is given.
        s3: how S3 is reached.

    Raises:
        ArtifactError: a file is missing or listed twice, or a pattern matches nothing.
    """
    field = "source.urls" if urls_file is None else "source.urls_file"
    entries = urls if urls_file is None else read_urls(urls_file, s3=s3)
    files = _look_up(list(_expand_braces(entries, field=field)), field=field, s3=s3)
    if not files:
        raise ArtifactError(f"plan source: {field} must name files, got none; add some")
    seen: set[str] = set()
    for file in files:
        url = os.path.normpath(file.url)  # "./x" is "x"
        if url in seen:
            raise ArtifactError(f"plan source: a file may be listed once, got {file.url!r} again; list it once")
        seen.add(url)
    return files


def read_urls(urls_file: str, *, s3: S3Config) -> list[str]:
    """Return the URLs of a text file, one a line; empty lines and those that begin with `#` are left out."""
    lines = (line.strip() for line in read_lines(urls_file, field="urls_file", s3=s3))
    return [line for line in lines if line and not line.startswith("#")]


def read_lines(url: str, *, field: str, s3: S3Config) -> list[str]:
    """Return the lines of a text file that a field of the source names.

    Raises:
        ArtifactError: it cannot be read, or is not UTF-8.
    """
    directory, name = split_url(url)
    try:
        return open_storage(directory, s3=s3).read_bytes(name).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ArtifactError(f"plan source: {field} {url!r} cannot be read: {reason}; check source.{field}") from error


def read_class_names(url: str | None, *, s3: S3Config) -> tuple[str, ...] | None:
    """Return the class names of a file with one a line, in label order; None where no file is named.

    Raises:
        ArtifactError: it holds none, or a blank line before the last name, so that a label would have no class.
    """
    if url is None:
        return None
    names = read_lines(url, field="class_names", s3=s3)
    while names and not names[-1].strip():
        names.pop()
    blank = next((number for number, name in enumerate(names, start=1) if not name.strip()), None)
    if not names or blank is not None:
        got = "none" if blank is None else f"none on line {blank}"
        raise ArtifactError(
            f"plan source: every line of class_names {url!r} must hold a class, label i on line i + 1, got {got}; "
            "mend the file"
        )
    return tuple(names)


def _expand_braces(urls: Iterable[str], *, field: str) -> Iterator[str]:
    for url in urls:
        try:
            yield from braceexpand.braceexpand(url) if "{" in url else (url,)
        except ValueError as error:
            raise ArtifactError(f"plan source: braces must be closed, got {url!r}; check {field}") from error


def _look_up(urls: list[str], *, field: str, s3: S3Config) -> list[ListedFile]:
    """Return the files behind exact URLs and globs; the exact ones of a directory share one listing."""
    names_of: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        if not glob.has_magic(url):
            directory, name = split_url(url)
            names_of[directory].append(name)
    infos = {directory: (directory, _infos(directory, names, s3=s3)) for directory, names in names_of.items()}
    del names_of
    files: list[ListedFile] = []
    for url in urls:
        if glob.has_magic(url):
            files.extend(_match(url, field=field, s3=s3))
            continue
        directory, name = split_url(url)
        directory, found = infos[directory]  # one string for all its files
        info = found.get(name) or open_storage(directory, s3=s3).find(name)  # listings leave out .hidden
        if info is None:
            raise ArtifactError(f"plan source: {url} cannot be opened: no such file; check {field}")
        files.append(ListedFile(directory, name, info))
    return files


def _infos(directory: str, names: list[str], *, s3: S3Config) -> dict[str, FileInfo]:
    storage = open_storage(directory, s3=s3)
    if len(names) <= MAX_FILES_ASKED_BY_NAME:
        return {name: info for name in names if (info := storage.find(name)) is not None}
    return storage.list(os.path.commonprefix(names))  # noqa: RUF071  (of characters, not of folders)


def _match(pattern: str, *, field: str, s3: S3Config) -> list[ListedFile]:
    """Return the files that a glob matches, sorted; `*` stays within one level, as in a shell."""
    fixed = pattern[: re.search(r"[*?[]", pattern).start()]  # type: ignore[union-attr]  # it has magic
    directory, prefix = split_url(fixed) if "/" in fixed else (".", fixed)
    levels = pattern[len(fixed) - len(prefix) :].split("/")
    rules = [re.compile(fnmatch.translate(level)) for level in levels]
    files = [
        ListedFile(directory, name, info)
        for name, info in open_storage(directory, s3=s3).list(prefix).items()
        if len(parts := name.split("/")) == len(rules)
        and all(rule.match(part) for rule, part in zip(rules, parts, strict=True))
    ]
    if not files:
        raise ArtifactError(f"plan source: a pattern must match a file, got {pattern!r}; check {field}")
    return files
