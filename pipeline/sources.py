"""Corpora as work units: `plan` lists and measures the files of a source, and opens none of them.

The invariant: the same files give the same plan, on any machine; shard i of the output is work unit i of the plan. A
moved corpus keeps its plan, a changed file changes its unit's fingerprint. A folder's plan holds one path per image
(millions, not billions); a plan of tars holds one path per tar.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand

from pipeline.config import ImageFolderSource, Source, WebDatasetSource
from pipeline.local_storage import local_path
from pipeline.storage import ArtifactError

FOLDER_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's list, so that the order of a tree is ImageFolder's."""
MIN_BYTES_PER_TAR_SAMPLE = 1024
"""A tar spends a header block and a data block on the smallest sample."""
MIN_UNIT_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """What one worker call does and one shard holds.

    Attributes:
        unit_index: its number, and that of its shard.
        name: what a person calls it.
        fingerprint: 16 hex digits over the names and sizes of its files.
        kind: the kind of source it comes from.
        paths: the files, as this machine opens them.
        sources: for folders, the path below the root of each file; empty for tars.
        labels: for folders, the class of each file; empty for tars.
        num_classes: labels must be below it; None if the classes are not known.
    """

    unit_index: int
    name: str
    fingerprint: str
    kind: str
    paths: tuple[str, ...]
    sources: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    num_classes: int | None = None


@dataclass(frozen=True, kw_only=True)
class KeyFormat:
    """How wide the keys and shard names of a set are.

    Attributes:
        unit_digits: width of the unit part of a key and of a shard name, >= 5.
        position_digits: width of the position part of a key. For tars it comes from an upper bound, file size / 1024.
    """

    unit_digits: int
    position_digits: int

    def key(self, unit_index: int, position: int) -> str:
        """Return the key of a sample: zero-padded unit index, then zero-padded position in the unit."""
        return f"{self.stem(unit_index)}{position:0{self.position_digits}d}"

    def stem(self, unit_index: int) -> str:
        """Return the digits that name a unit's shard, ledger record and rejects."""
        return f"{unit_index:0{self.unit_digits}d}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work units of a source, in order: `units[i].unit_index == i`; `class_names` in label order, if known."""

    units: tuple[WorkUnit, ...]
    keys: KeyFormat
    class_names: tuple[str, ...] | None


def plan(source: Source) -> Plan:
    """Return the work units of a source; lists and measures files, opens none but `class_names`.

    Raises:
        ArtifactError: nothing is found, a file or folder is missing, or a class folder is empty.
    """
    if isinstance(source, WebDatasetSource):
        return _plan_tars(source)
    return _plan_folder(source)


def modification_mark(unit: WorkUnit) -> str:
    """Return 16 hex digits over the modification times of a unit's files: equal means that none was written to."""
    return _digest([Path(path).stat().st_mtime_ns for path in unit.paths])


def _plan_tars(source: WebDatasetSource) -> Plan:
    paths = [path for url in source.urls for path in _expand(url)]
    for path, num_times in Counter(paths).most_common(1):
        if num_times > 1:
            raise ArtifactError(f"plan source: a tar may be listed once, got {path!r} {num_times} times; list it once")
    class_names = _read_class_names(source.class_names)
    sizes = [_size(path) for path in paths]
    units = tuple(
        WorkUnit(
            unit_index=unit_index,
            name=Path(path).name,
            fingerprint=_digest([[Path(path).name, size]]),
            kind="webdataset",
            paths=(path,),
            num_classes=None if class_names is None else len(class_names),
        )
        for unit_index, (path, size) in enumerate(zip(paths, sizes, strict=True))
    )
    return _make_plan(units, samples_per_unit=max(sizes) // MIN_BYTES_PER_TAR_SAMPLE, class_names=class_names)


def _plan_folder(source: ImageFolderSource) -> Plan:
    root = local_path(source.root)
    if not root.is_dir():
        raise ArtifactError(f"plan source: root must be a folder, got {source.root!r}; check source.root")
    class_names = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    files = [(path, label) for label, name in enumerate(class_names) for path in _images_of_class(root, name)]
    if not files:
        raise ArtifactError(f"plan source: {root} must hold class folders of images, got none; check source.root")
    units = []
    for unit_index, start in enumerate(range(0, len(files), source.samples_per_unit)):
        run = files[start : start + source.samples_per_unit]
        relative = tuple(path.relative_to(root).as_posix() for path, _ in run)
        unit = WorkUnit(
            unit_index=unit_index,
            name=f"files {start}..{start + len(run) - 1}",
            fingerprint=_digest([[name, path.stat().st_size] for name, (path, _) in zip(relative, run, strict=True)]),
            kind="image_folder",
            paths=tuple(str(path) for path, _ in run),
            sources=relative,
            labels=tuple(label for _, label in run),
            num_classes=len(class_names),
        )
        units.append(unit)
    return _make_plan(tuple(units), samples_per_unit=source.samples_per_unit, class_names=class_names)


def _make_plan(units: tuple[WorkUnit, ...], *, samples_per_unit: int, class_names: tuple[str, ...] | None) -> Plan:
    keys = KeyFormat(
        unit_digits=max(MIN_UNIT_DIGITS, len(str(len(units) - 1))),
        position_digits=len(str(max(1, samples_per_unit - 1))),
    )
    return Plan(units=units, keys=keys, class_names=class_names)


def _expand(url: str) -> list[str]:
    """Return the paths behind one entry of `urls`: braces first, then globs, each glob sorted."""
    paths: list[str] = []
    for pattern in braceexpand.braceexpand(str(local_path(url))):
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207 (takes absolute patterns)
        if not found:
            raise ArtifactError(f"plan source: a pattern must match a tar, got {pattern!r}; check source.urls")
        paths.extend(found)
    return paths


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise ArtifactError(f"plan source: {path} cannot be opened: {error.strerror}; check source.urls") from error


def _read_class_names(path: str | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        return tuple(local_path(path).read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise ArtifactError(
            f"plan source: class_names {path!r} cannot be read: {error.strerror}; check source.class_names"
        ) from error


def _images_of_class(root: Path, class_name: str) -> list[Path]:
    """Return a class's images in torchvision's order; an empty class is an error there and here."""
    images = [
        Path(directory) / name
        for directory, _, names in sorted(os.walk(root / class_name, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(FOLDER_EXTENSIONS)
    ]
    if not images:
        raise ArtifactError(
            f"plan source: every class folder must hold images, got none in {root / class_name}; remove it"
        )
    return images


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
