"""One rank's file of a checkpoint: a safetensors file of fragments, written and read without torch.

A fragment is a contiguous run of elements of one flattened parameter, float32. `KIND/NAME` is the fragment of parameter
NAME in the state KIND (`weights`, `exp_avg`, `exp_avg_sq`, `ema`); every kind has the same fragments, and lies in one
region of the file, so that the weights alone are one read. The metadata entry `tensorar` holds the `FragmentLayout`.
Any safetensors reader opens the file; ours reads by ranges, from a map where the file is local.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.local_storage import LocalStorage
from pipeline.storage import ArtifactError, Buffer, Storage
from tokenization.config import Config
from tokenization.messages import reason_of

FloatArray = npt.NDArray[np.float32]

WEIGHTS = "weights"
EMA = "ema"
METADATA_KEY = "tensorar"
BLOCK_BYTES = 8 << 20
_LENGTH_BYTES = 8
_ELEMENT_BYTES = 4
_ALIGNMENT_BYTES = 64


class FragmentLayout(Config):
    """What a rank's file holds, in the order of the file: all fragments of the first kind, then of the second."""

    kinds: tuple[str, ...]
    """States that are kept, `weights` first."""
    fragments: dict[str, tuple[int, int]]
    """Parameter name to `[start, end)` in the flattened parameter; never empty."""

    @property
    def num_elements(self) -> int:
        """Elements of one kind."""
        return sum(end - start for start, end in self.fragments.values())


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """What was written: its size and hash."""

    num_bytes: int
    sha256: str


def header_of(layout: FragmentLayout) -> bytes:
    """Return the bytes before the data: the header's length as u64, and the header as safetensors wants it; pure."""
    header: dict[str, object] = {"__metadata__": {METADATA_KEY: layout.model_dump_json()}}
    offset = 0
    for kind in layout.kinds:
        for name, (start, end) in layout.fragments.items():
            after = offset + (end - start) * _ELEMENT_BYTES
            header[f"{kind}/{name}"] = {"dtype": "F32", "shape": [end - start], "data_offsets": [offset, after]}
            offset = after
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def write_fragments(path: Path, layout: FragmentLayout, arrays: Iterable[FloatArray]) -> WrittenFile:
    """Write a file and return its size and sha256, taken of the memory that was written.

    Args:
        path: where to; not fsynced.
        layout: of the file.
        arrays: float32, contiguous; one after the other they are the file's data.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for data in chain([memoryview(header_of(layout))], (array.data.cast("B") for array in arrays if array.size)):
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                num_bytes += _write_all(file.fileno(), block)
                digest.update(block)
    return WrittenFile(num_bytes=num_bytes, sha256=digest.hexdigest())


class FragmentFile:
    """A rank's file, opened: its layout, and its fragments by kind."""

    def __init__(self, storage: Storage, name: str) -> None:
        """Read the header.

        Args:
            storage: where the file is.
            name: its name there.

        Raises:
            ArtifactError: it is not a file of fragments.
        """
        self._storage, self._name = storage, name
        length = int.from_bytes(_read(storage, name, start=0, end=_LENGTH_BYTES), "little")
        self._data_start = _LENGTH_BYTES + length
        try:
            header = json.loads(bytes(_read(storage, name, start=_LENGTH_BYTES, end=self._data_start)))
            self.layout = FragmentLayout.model_validate_json(header["__metadata__"][METADATA_KEY])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"read {storage.url_of(name)}: it must be a rank's file of a checkpoint, got {type(error).__name__}: "
                f"{reason_of(error)}; verify the run and use another checkpoint"
            ) from error

    def read(self, kind: str) -> dict[str, tuple[int, FloatArray]]:
        """Return (start in the flattened parameter, values) by parameter name; values are read-only views.

        Costs nothing where the file is local (a map), else one ranged read of the kind's region.
        """
        num_bytes = self.layout.num_elements * _ELEMENT_BYTES
        start = self._data_start + self.layout.kinds.index(kind) * num_bytes
        values = np.frombuffer(_read(self._storage, self._name, start=start, end=start + num_bytes), dtype="<f4")
        found, offset = {}, 0
        for name, (first, end) in self.layout.fragments.items():
            found[name] = (first, values[offset : offset + end - first])
            offset += end - first
        return found


def check_coverage(shapes: dict[str, tuple[int, ...]], layouts: list[FragmentLayout], *, doing: str) -> None:
    """Check that every element of every parameter is in exactly one file, in every kind; pure.

    Raises:
        ArtifactError: one is in none or in two, naming the parameter.
    """
    kinds = {layout.kinds for layout in layouts if layout.fragments}
    if len(kinds) > 1:
        raise ArtifactError(f"{doing}: all ranks must hold the same states, got {sorted(kinds)}; start the run again")
    intervals: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for layout in layouts:
        for name, interval in layout.fragments.items():
            intervals[name].append(interval)
    for name, shape in shapes.items():
        end = 0
        for start, after in sorted(intervals[name]):
            end = after if start == end else -1  # a hole or an overlap, which nothing after it mends
        if end != prod(shape):
            raise ArtifactError(
                f"{doing}: every element of {name} {list(shape)} must be in one rank's file, got "
                f"{sorted(intervals[name])}; this is a fault of tensorar, report it"
            )


def _read(storage: Storage, name: str, *, start: int, end: int) -> Buffer:
    """Return the bytes `[start, end)` of a file, without a copy where it is local."""
    if isinstance(storage, LocalStorage):
        return storage.map(name)[start:end]
    return storage.read_bytes(name, start=start, end=end)


def _write_all(descriptor: int, data: memoryview) -> int:
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])
    return written
