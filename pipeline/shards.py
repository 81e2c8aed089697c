"""The shard format, version 1: an uncompressed USTAR of `KEY.codes.npy` and `KEY.json`, and its `.tar.idx`.

The invariant: the same samples give the same bytes (no time, user or host; JSON with sorted keys), so a reader holds
every header and all padding against what the writer would have written. The index is Energon's: little-endian u64 byte
offsets of each sample and, last, of the end of the last one, so a sample is read with one seek. A sample of 256 codes
costs 2.5 KiB, most of it tar headers: the price of a format that everybody reads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.local_storage import sha256_of_file
from pipeline.npy_codes import Codes, codes_dtype, codes_of_npy, npy_of_codes
from pipeline.storage import ArtifactError, Buffer, Storage, next_action
from pipeline.ustar import (
    MAX_NAME_BYTES,
    SIZE_FIELD,
    TAR_BLOCK_BYTES,
    end_of_tar,
    member_bytes,
    member_span,
    read_member,
)

CODES_EXTENSION = "codes.npy"
JSON_EXTENSION = "json"
INDEX_EXTENSION = ".idx"
MAX_KEY_DIGITS = MAX_NAME_BYTES - len("." + CODES_EXTENSION)
"""What USTAR's name field has room for."""
REWRITE = "remove it and rerun the tokenize job to rewrite it"
"""What to do about a shard, or a file that speaks of it, that is damaged."""
_FLUSH_BYTES = 1 << 20
_SIZE = re.compile(rb"[0-7]{11}")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """What a shard must look like; part of its ledger record and of the manifest. A driver holds one for each unit.

    Attributes:
        name: file name in `shards/`.
        num_samples: samples, at least 1.
        bytes: size of the tar in bytes.
        sha256: of the whole tar, hex.
    """

    name: str
    num_samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """A shard as a `ShardWriter` wrote it.

    Attributes:
        index: content of its index.
        num_samples: samples in it.
        num_bytes: size of the tar.
        sha256: of the whole tar, hex.
    """

    index: bytes
    num_samples: int
    num_bytes: int
    sha256: str

    def info(self, name: str) -> ShardInfo:
        """Return what the ledger says of it, under the file name that it will have in `shards/`."""
        return ShardInfo(name=name, num_samples=self.num_samples, bytes=self.num_bytes, sha256=self.sha256)


class ShardWriter:
    """Writes samples, in the order they are added, as one tar; `close` before reading it."""

    def __init__(self, path: Path, *, codebook_size: int) -> None:
        """Create the tar.

        Args:
            path: a staged path; committing it is the caller's.
            codebook_size: decides the dtype of the codes.
        """
        self._file = path.open("wb")
        self._dtype = codes_dtype(codebook_size)
        self._codebook_size = codebook_size
        self._offsets: list[int] = []
        self._digest = hashlib.sha256()
        self._waiting = bytearray()
        self._num_flushed = 0

    @property
    def num_samples(self) -> int:
        """Samples added so far."""
        return len(self._offsets)

    @property
    def num_bytes(self) -> int:
        """Size of the tar so far; `close` adds 1 to 11 KiB."""
        return self._num_flushed + len(self._waiting)

    def add(self, sample: ShardSample) -> None:
        """Append a sample; about 12 us with one view of 64 codes.

        Raises:
            ValueError: a code is outside of the codebook, the codes are not `(views, T)`, the key has other characters
                than digits or more than 90 of them, or the metadata is not JSON; nothing was appended then.
        """
        codes_VT = sample.codes_VT
        if codes_VT.ndim != 2 or codes_VT.min() < 0 or codes_VT.max() >= self._codebook_size:
            raise ValueError(
                f"write sample {sample.key}: codes must be (views, T) in [0, {self._codebook_size}), got shape "
                f"{codes_VT.shape} in [{codes_VT.min()}, {codes_VT.max()}]; check the tokenizer"
            )
        if not (sample.key.isascii() and sample.key.isdigit() and len(sample.key) <= MAX_KEY_DIGITS):
            raise ValueError(
                f"write sample: key must be 1 to {MAX_KEY_DIGITS} digits, got {sample.key!r}; use KeyFormat.key"
            )
        codes = npy_of_codes(codes_VT.astype(self._dtype))
        metadata = canonical_json(sample.metadata)
        self._offsets.append(self.num_bytes)
        self._waiting += member_bytes(_codes_name(sample.key), codes)
        self._waiting += member_bytes(_metadata_name(sample.key), metadata)
        # In large pieces: hashing lets go of the interpreter's lock, and each time another thread may keep it for 5 ms.
        if len(self._waiting) >= _FLUSH_BYTES:
            self._flush()

    def close(self) -> WrittenShard:
        """Finish the tar and return what was written."""
        self._offsets.append(self.num_bytes)
        self._waiting += end_of_tar(self.num_bytes)
        self._flush()
        self._file.close()
        return WrittenShard(
            index=np.array(self._offsets, dtype="<u8").tobytes(),
            num_samples=len(self._offsets) - 1,
            num_bytes=self._num_flushed,
            sha256=self._digest.hexdigest(),
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._file.write(self._waiting)
        self._digest.update(self._waiting)
        self._num_flushed += len(self._waiting)
        self._waiting = bytearray()


def check_written(path: Path, written: WrittenShard) -> None:
    """Read a staged shard back, so that a write that went wrong is never committed.

    Raises:
        OSError: it is not what was written; trying again may help.
    """
    sha256 = sha256_of_file(path)
    if sha256 != written.sha256:
        raise OSError(
            f"write shard {path}: {written.num_bytes} bytes with sha256 {written.sha256[:8]}.. must "
            f"read back, got {path.stat().st_size} with {sha256[:8]}..; check the disk"
        )


def index_of(tar: Buffer) -> bytes:
    """Return the index of a tar that is known to be a shard's, from the sizes in its headers; about 2 us a sample."""
    data = memoryview(tar)
    offsets, end = [], 0
    while size := _SIZE.match(data, end + SIZE_FIELD.start):  # the zeros that end a tar are no size
        offsets.append(end)
        end += member_span(int(size.group(), 8))
    return np.array([*offsets[::2], end], dtype="<u8").tobytes()


class ShardReader:
    """Random access to the samples of one shard."""

    def __init__(self, data: Buffer, *, index: bytes, where: str) -> None:
        """Read the index.

        Args:
            data: the whole tar; mapped, only what is asked for is read.
            index: the content of its index.
            where: path or URL, for messages.

        Raises:
            ArtifactError: the index does not fit the tar.
        """
        self.where = where
        self._data = memoryview(data)
        whole = len(index) - len(index) % 8
        self._offsets = np.frombuffer(index[:whole], dtype="<u8").astype(np.int64)
        if (
            len(index) != whole
            or len(self._offsets) < 2
            or self._offsets[0] != 0
            or (np.diff(self._offsets) <= 0).any()
            or (self._offsets % TAR_BLOCK_BYTES).any()
            or self._offsets[-1] > len(self._data)
        ):
            raise ArtifactError(f"open shard {where}: its index must fit a tar of {len(self._data)} bytes; {REWRITE}")

    @property
    def num_samples(self) -> int:
        """Samples in the shard."""
        return len(self._offsets) - 1

    @property
    def num_bytes(self) -> int:
        """Size of the tar."""
        return len(self._data)

    @property
    def byte_offsets(self) -> npt.NDArray[np.int64]:
        """Where each sample starts and, last, where the last one ends: `(num_samples + 1,)`, multiples of 512."""
        return self._offsets

    @property
    def blocks(self) -> npt.NDArray[np.uint8]:
        """The tar as blocks, uint8 `(N, 512)`; a view of the data."""
        num_blocks = len(self._data) // TAR_BLOCK_BYTES
        whole = np.frombuffer(self._data, dtype=np.uint8, count=num_blocks * TAR_BLOCK_BYTES)
        return whole.reshape(num_blocks, TAR_BLOCK_BYTES)

    def sample(self, position: int) -> ShardSample:
        """Return the sample at a position, in [0, num_samples); about 12 us.

        Raises:
            IndexError: no such position.
            ArtifactError: the bytes there are not a sample as `ShardWriter` writes it, headers and padding included.
        """
        try:
            contents = self._contents(position)
            metadata = json.loads(str(contents.metadata, "utf-8"))
            if not isinstance(metadata, dict):
                raise ValueError(f"{type(metadata).__name__} for an object in its JSON")
            return ShardSample(key=contents.key, codes_VT=codes_of_npy(contents.codes), metadata=metadata)
        except ValueError as error:
            raise self._damaged(position, error) from error

    def check_structure(self) -> list[str]:
        """Return what is wrong with headers, names, padding and the end of the tar, one line each.

        Contents are not looked at, and after the first damaged sample no other.
        """
        problems: list[str] = []
        try:
            for position in range(self.num_samples):
                self._contents(position)
        except ValueError as error:
            problems.append(str(self._damaged(position, error)))
        end = int(self._offsets[-1])
        if self._data[end:] != end_of_tar(end):
            got = f"{len(self._data) - end} {'other bytes' if any(self._data[end:]) else 'of them'}"
            wanted = f"{len(end_of_tar(end))} zero bytes must follow its last sample at byte {end}"
            problems.append(f"read shard {self.where}: {wanted}, got {got}; {REWRITE}")
        return problems

    def _contents(self, position: int) -> _Contents:
        """Return the contents of a sample's members; a ValueError says where it is not what the writer writes."""
        if not 0 <= position < self.num_samples:
            raise IndexError(f"read {self.where}: position must be in [0, {self.num_samples}), got {position}")
        start, end = int(self._offsets[position]), int(self._offsets[position + 1])
        codes_name, codes = read_member(self._data[start:end])
        start += member_span(len(codes))
        metadata_name, metadata = read_member(self._data[start:end])
        key = codes_name.partition(".")[0]
        if not key.isdigit() or codes_name != _codes_name(key) or metadata_name != _metadata_name(key):
            raise ValueError(f"{codes_name!r} and {metadata_name!r}")
        if start + member_span(len(metadata)) != end:
            raise ValueError("more after them")
        return _Contents(key, codes, metadata)

    def _damaged(self, position: int, problem: object) -> ArtifactError:
        return ArtifactError(
            f"read shard {self.where}: sample {position} must be codes and JSON of one key, got {problem}; {REWRITE}"
        )


class _Contents(NamedTuple):
    """A sample's key and the contents of its members."""

    key: str
    codes: memoryview
    metadata: memoryview


def open_shard(storage: Storage, name: str) -> ShardReader:
    """Return a reader of a committed shard: mapped where it is local, downloaded where it is not.

    Args:
        storage: the shard set.
        name: `shards/00000.tar`; its index stands beside it.

    Raises:
        ArtifactError: tar or index is missing, or they do not fit.
    """
    where = storage.url_of(name)
    try:
        data, index = storage.map(name), storage.read_bytes(name + INDEX_EXTENSION)
    except OSError as error:
        action = action_of_open(error)
        raise ArtifactError(f"open shard {where}: tar and index must be readable, got {error}; {action}") from error
    return ShardReader(data, index=index, where=where)


def action_of_open(error: OSError) -> str:
    """Return what to do about a shard that could not be opened: only one that is missing is to be written again."""
    if isinstance(error, FileNotFoundError):
        return REWRITE
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return "raise ulimit -n or lower data.shuffle_window_shards"
    return next_action(error, otherwise="check the disk and run the same command again")


def read_shard(storage: Storage, name: str) -> Iterator[ShardSample]:
    """Yield the samples of a shard in order.

    Args:
        storage: the shard set.
        name: `shards/00000.tar`.

    Raises:
        ArtifactError: the shard or its index is missing or damaged.
    """
    reader = open_shard(storage, name)
    for position in range(reader.num_samples):
        yield reader.sample(position)


_encode_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys and no spaces, as UTF-8: equal values give equal bytes; NaN is a ValueError."""
    return _encode_json(value).encode()


def _codes_name(key: str) -> str:
    return f"{key}.{CODES_EXTENSION}"


def _metadata_name(key: str) -> str:
    return f"{key}.{JSON_EXTENSION}"
