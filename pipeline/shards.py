"""The shard format, version 1: an uncompressed USTAR of `KEY.codes.npy` and `KEY.json`, and its `.tar.idx`.

The invariant: the same samples give the same bytes (no time, user or host; JSON with sorted keys). The index is
Energon's: little-endian u64 byte offsets of each sample and, last, of the end of the last one, so a sample is read with
one seek. A sample of 256 codes costs 2.5 KiB, most of it tar headers: the price of a format that everybody reads.
"""

from __future__ import annotations

import io
import json
import mmap
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.local_storage import sha256_of_file
from pipeline.storage import ArtifactError
from tokenization.config import Config

CODES_EXTENSION = "codes.npy"
JSON_EXTENSION = "json"
MAX_UINT16_CODEBOOK = 65536
TAR_BLOCK_BYTES = 512

Codes = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class ShardSample:
    """One tokenized sample.

    Attributes:
        key: digits, unique over the set.
        codes_VT: uint16 or int32 `(num_views, codes_per_image)`, raster order.
        metadata: `caption`, `label`, `width`, `height`, `source`, `views` and `extra`.
    """

    key: str
    codes_VT: Codes
    metadata: dict[str, Any]


class ShardInfo(Config):
    """What a shard must look like; part of its ledger record and of the manifest."""

    name: str
    """File name in `shards/`."""
    num_samples: int
    """Samples, at least 1."""
    bytes: int
    """Size of the tar in bytes."""
    sha256: str
    """Of the whole tar, hex."""


def index_path(path: Path) -> Path:
    """Return the path of a shard's index: `00000.tar` -> `00000.tar.idx`."""
    return path.with_name(path.name + ".idx")


def codes_dtype(codebook_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the dtype that codes of this codebook are stored in."""
    return np.uint16 if codebook_size <= MAX_UINT16_CODEBOOK else np.int32


class ShardWriter:
    """Writes samples, in the order they are added, as one tar; `close` before reading it."""

    def __init__(self, path: Path, *, codebook_size: int) -> None:
        """Create the tar.

        Args:
            path: a staged path; committing it is the caller's.
            codebook_size: decides the dtype of the codes.
        """
        self._tar = tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by `close`)
        self._dtype = codes_dtype(codebook_size)
        self._codebook_size = codebook_size
        self._offsets: list[int] = []

    @property
    def num_samples(self) -> int:
        """Samples added so far."""
        return len(self._offsets)

    def add(self, sample: ShardSample) -> None:
        """Append a sample.

        Raises:
            ValueError: a code is outside of the codebook, the codes are not `(views, T)`, or the key has other
                characters than digits.
        """
        codes_VT = sample.codes_VT
        if codes_VT.ndim != 2 or codes_VT.min() < 0 or codes_VT.max() >= self._codebook_size:
            raise ValueError(
                f"write sample {sample.key}: codes must be (views, T) in [0, {self._codebook_size}), got shape "
                f"{codes_VT.shape} in [{codes_VT.min()}, {codes_VT.max()}]; check the tokenizer"
            )
        if not (sample.key.isascii() and sample.key.isdigit()):
            raise ValueError(f"write sample: key must be digits, got {sample.key!r}; use Plan.key")
        self._offsets.append(self._tar.offset)
        self._add_member(f"{sample.key}.{CODES_EXTENSION}", _npy_bytes(codes_VT.astype(self._dtype)))
        self._add_member(f"{sample.key}.{JSON_EXTENSION}", canonical_json(sample.metadata))

    def close(self) -> bytes:
        """Finish the tar and return the content of its index."""
        self._offsets.append(self._tar.offset)
        self._tar.close()
        return struct.pack(f"<{len(self._offsets)}Q", *self._offsets)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._tar.close()

    def _add_member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # its defaults are mtime 0, mode 0644, uid and gid 0 and no names
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


class ShardReader:
    """Random access to the samples of one committed shard."""

    def __init__(self, path: Path, *, index: Path | None = None) -> None:
        """Map the tar and read its index.

        Args:
            path: the tar.
            index: its index where that does not stand beside it (both are staged).

        Raises:
            ArtifactError: one of the two is missing, or the index does not fit the tar.
        """
        self.path = path
        try:
            self._offsets = np.frombuffer((index or index_path(path)).read_bytes(), dtype="<u8").astype(np.int64)
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"open shard {path}: tar and index must be readable, got {error}; {_REDO}") from error
        if len(self._offsets) < 2 or (np.diff(self._offsets) <= 0).any() or self._offsets[-1] > len(self._data):
            raise ArtifactError(f"open shard {path}: its index must fit a tar of {len(self._data)} bytes; {_REDO}")

    @property
    def num_samples(self) -> int:
        """Samples in the shard."""
        return len(self._offsets) - 1

    def sample(self, position: int) -> ShardSample:
        """Return the sample at a position, in [0, num_samples).

        Raises:
            IndexError: no such position.
            ArtifactError: the bytes there are not a sample of ours.
        """
        if not 0 <= position < self.num_samples:
            raise IndexError(f"read {self.path}: position must be in [0, {self.num_samples}), got {position}")
        members = dict(self._members(int(self._offsets[position]), int(self._offsets[position + 1])))
        keys = {name.partition(".")[0] for name in members}
        key = keys.pop() if len(keys) == 1 else ""
        try:
            codes_VT = np.lib.format.read_array(io.BytesIO(members[f"{key}.{CODES_EXTENSION}"]), allow_pickle=False)
            metadata = json.loads(members[f"{key}.{JSON_EXTENSION}"])
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"read {self.path}: sample {position} must be codes and JSON of one key, got {error}; {_REDO}"
            ) from error
        return ShardSample(key=key, codes_VT=codes_VT, metadata=metadata)

    def _members(self, start: int, end: int) -> Iterator[tuple[str, bytes]]:
        while start < end:
            try:
                member = tarfile.TarInfo.frombuf(self._data[start : start + TAR_BLOCK_BYTES], "utf-8", "strict")
            except (tarfile.TarError, UnicodeError) as error:
                raise ArtifactError(
                    f"read {self.path}: a header must be at byte {start}, got {error}; {_REDO}"
                ) from error
            data_start = start + TAR_BLOCK_BYTES
            yield member.name, self._data[data_start : data_start + member.size]
            start = data_start + -(-member.size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


def read_shard(path: Path) -> Iterator[ShardSample]:
    """Yield the samples of a shard in order.

    Raises:
        ArtifactError: the shard or its index is missing or damaged.
    """
    reader = ShardReader(path)
    for position in range(reader.num_samples):
        yield reader.sample(position)


def describe_shard(path: Path, *, name: str, num_samples: int) -> ShardInfo:
    """Return the size and sha256 of a shard as it stands on disk, under the name it will have once committed."""
    return ShardInfo(name=name, num_samples=num_samples, bytes=path.stat().st_size, sha256=sha256_of_file(path))


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys and no spaces, as UTF-8: equal values give equal bytes; NaN is a ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _npy_bytes(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


_REDO = "remove it and rerun the tokenize job to rewrite it"
