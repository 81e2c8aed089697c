"""Work units as samples: `read_unit` reads what `sources.plan` planned.

The invariant: the same files give the same samples in the same order. A sample that cannot be used is handed over with
its problem, never passed by; a tar that is cut short is an error and not a shorter corpus (tarfile alone takes a cut
between two members, or inside a header, for the end).
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.sources import WorkUnit
from pipeline.storage import ArtifactError

MEMBER_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
TAR_BLOCK_BYTES = 512
_MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META_NAME = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a sample cannot be used: the stage that found it, a short reason to count by, and the detail."""

    stage: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class InputSample:
    """One sample as it was read.

    Attributes:
        position: place in its work unit, from 0; rejected samples count too.
        source: the input's own name: key in a tar, path below the root of a folder.
        data: bytes of the image file; empty if there is a problem.
        caption: the text, or None.
        label: the class, >= 0, or None.
        extra: the other fields of the input's JSON.
        problem: why it cannot be used, or None.
    """

    position: int
    source: str
    data: bytes = b""
    caption: str | None = None
    label: int | None = None
    extra: dict[str, Any]
    problem: Problem | None = None


def read_unit(unit: WorkUnit) -> Iterator[InputSample]:
    """Yield the samples of a work unit in order, those with a problem included.

    Raises:
        ArtifactError: a tar is cut short, damaged or compressed; samples yielded before must then not be committed.
    """
    if unit.kind == "webdataset":
        return _read_tar(Path(unit.paths[0]), num_classes=unit.num_classes)
    return _read_files(unit)


def content_digest(samples: Iterable[InputSample]) -> str:
    """Return the hex sha256 over all that was read of a unit, to tell a rewritten input from a touched one."""
    digest = hashlib.sha256()
    for sample in samples:
        add_to_digest(digest, sample)
    return digest.hexdigest()


def add_to_digest(digest: hashlib._Hash, sample: InputSample) -> None:
    """Update `digest` with one sample; `content_digest` is this over a whole unit."""
    problem = None if sample.problem is None else sample.problem.reason
    head = [sample.position, sample.source, sample.caption, sample.label, sample.extra, problem, len(sample.data)]
    digest.update(json.dumps(head, sort_keys=True).encode())
    digest.update(sample.data)


def _read_files(unit: WorkUnit) -> Iterator[InputSample]:
    for position, (path, source, label) in enumerate(zip(unit.paths, unit.sources, unit.labels, strict=True)):
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            problem = Problem(stage="read", reason="unreadable", detail=str(error.strerror))
            yield InputSample(position=position, source=_printable(source), extra={}, problem=problem)
            continue
        yield InputSample(position=position, source=_printable(source), data=data, label=label, extra={})


def _read_tar(path: Path, *, num_classes: int | None) -> Iterator[InputSample]:
    seen: set[str] = set()
    for position, (key, members) in enumerate(_grouped_members(path)):
        source = _printable(key)
        try:
            if key in seen:
                raise _UnusableSampleError("duplicate_key", "the key stands at two places of the tar")
            yield _make_sample(position, source, members, num_classes=num_classes)
        except _UnusableSampleError as error:
            problem = Problem(stage="read", reason=error.reason, detail=error.detail)
            yield InputSample(position=position, source=source, extra={}, problem=problem)
        seen.add(key)


def _grouped_members(path: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Yield (key, [(extension, data), ...]) by webdataset's rules: first dot splits, neighbours with one key belong."""
    key, members = "", list[tuple[str, bytes]]()
    for name, data in _members(path):
        match = _MEMBER_NAME.match(name)
        if match is None or _META_NAME.match(name):
            continue
        if members and match.group(1) != key:
            yield key, members
            members = []
        key = match.group(1)
        members.append((match.group(2).lower(), data))
    if members:
        yield key, members


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, data) of a tar's regular members; unlike tarfile alone, refuse a tar that is cut short."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield member.name, content.read()
            _check_end(file, offset=tar.offset, path=path)
    except (tarfile.TarError, OSError) as error:
        raise ArtifactError(
            f"read {path}: must be a whole, uncompressed tar, got {error}; fetch or write it again"
        ) from error


def _check_end(file: Any, *, offset: int, path: Path) -> None:
    """Check that zero blocks, and nothing else, follow the last member; tarfile takes a cut at a member for the end."""
    file.seek(offset)
    end = file.read(TAR_BLOCK_BYTES)
    if end != bytes(TAR_BLOCK_BYTES):
        raise ArtifactError(
            f"read {path}: a tar ends in zero blocks, got {len(end)} other bytes at {offset}; fetch or write it again"
        )
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise ArtifactError(f"read {path}: nothing may follow the end of a tar, got more data; split joined tars")


class _UnusableSampleError(Exception):
    """A sample of a tar that cannot be used; becomes its `Problem`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _make_sample(
    position: int, source: str, members: list[tuple[str, bytes]], *, num_classes: int | None
) -> InputSample:
    extensions = [extension for extension, _ in members]
    if len(set(extensions)) < len(extensions):
        raise _UnusableSampleError("duplicate_member", f"members {', '.join(extensions)}")
    images = [data for extension, data in members if extension in MEMBER_EXTENSIONS]
    if len(images) != 1:
        raise _UnusableSampleError("several_images" if images else "no_image", f"members {', '.join(extensions)}")
    texts = {extension: data for extension, data in members if extension in ("json", "txt", "cls")}
    fields = _parse_json(texts["json"]) if "json" in texts else {}
    if "txt" in texts:
        fields["caption"] = _parse_text(texts["txt"])
    if "cls" in texts:
        fields["label"] = _parse_class(texts["cls"])
    caption, label = fields.pop("caption", None), fields.pop("label", None)
    if not (caption is None or isinstance(caption, str)):
        raise _UnusableSampleError("bad_caption", f"caption must be text, got {caption!r:.100}")
    if label is not None and (type(label) is not int or label < 0):
        raise _UnusableSampleError("bad_label", f"label must be an integer >= 0, got {label!r:.100}")
    if label is not None and num_classes is not None and label >= num_classes:
        raise _UnusableSampleError("bad_label", f"label must be below {num_classes}, got {label}")
    return InputSample(position=position, source=source, data=images[0], caption=caption, label=label, extra=fields)


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(fields, ensure_ascii=False).encode()  # a lone surrogate passes the parser, but is no text
    except (ValueError, RecursionError) as error:
        raise _UnusableSampleError("bad_json", str(error)) from error
    if not isinstance(fields, dict):
        raise _UnusableSampleError("bad_json", f"must be an object, got {type(fields).__name__}")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _parse_text(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _UnusableSampleError("bad_caption", f"txt must be UTF-8: {error.reason}") from error


def _parse_class(data: bytes) -> int:
    try:
        return int(data.decode("ascii"))
    except ValueError as error:
        raise _UnusableSampleError("bad_label", f"cls must be an integer, got {data[:100]!r}") from error


def _printable(name: str) -> str:
    """Return a file name as text that UTF-8 can hold; bytes of another encoding are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
