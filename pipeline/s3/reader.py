"""A seekable file over one S3 object, with read-ahead: for tars from start to end and for Parquet's jumps alike.

The invariant: all bytes come from the object as it was when it was opened (one ETag). A read that goes on where the
last block ended gets blocks that grow from 256 KiB to 8 MiB, the next one fetched while this one is used; a seek
elsewhere drops the read-ahead. So a tar costs one request for each 8 MiB, a Parquet footer one of 256 KiB; an open file
holds 16 MiB at most.
"""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO

from pipeline.s3.download import head, receive, receive_range
from pipeline.s3.requests import S3Requests

FIRST_BLOCK_BYTES = 256 << 10
LAST_BLOCK_BYTES = 8 << 20
BLOCK_GROWTH = 4
BUFFER_BYTES = 128 << 10


def open_reader(requests: S3Requests, key: str) -> IO[bytes]:
    """Return a buffered, seekable reader of an object.

    Raises:
        FileNotFoundError: it is missing.
    """
    return io.BufferedReader(S3Reader(requests, key), buffer_size=BUFFER_BYTES)


@dataclass(frozen=True, slots=True)
class _Block:
    start: int
    data: bytearray

    @property
    def end(self) -> int:
        return self.start + len(self.data)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A block on its way."""

    start: int
    end: int
    future: Future[_Block]


class S3Reader(io.RawIOBase):
    """The unbuffered file; one thread at a time (a `BufferedReader` around it sees to that)."""

    def __init__(self, requests: S3Requests, key: str) -> None:
        self.requests = requests
        self.key = key
        self.info = requests.wait(head(requests, key))
        self.position = 0
        self.block = _Block(start=0, data=bytearray())
        self.ahead: _Ahead | None = None
        self.next_block_bytes = FIRST_BLOCK_BYTES

    def __repr__(self) -> str:
        return f"S3Reader(s3://{self.requests.bucket}/{self.key})"

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self.position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`; asks the server nothing."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.info.num_bytes}[whence]
        if origin + position < 0:
            raise ValueError(f"seek {self!r}: a position must be 0 or more, got {origin + position}; correct the call")
        self.position = origin + position
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # every buffer has these operations
        """See `io.RawIOBase`; fills less than the buffer where a block ends."""
        target = memoryview(buffer).cast("B")
        if self.position >= self.info.num_bytes or not target:
            return 0
        if not self.block.start <= self.position < self.block.end:
            self._load(len(target))
        start = self.position - self.block.start
        num_bytes = min(len(target), len(self.block.data) - start)
        target[:num_bytes] = memoryview(self.block.data)[start : start + num_bytes]
        self.position += num_bytes
        return num_bytes

    def readall(self) -> bytes:
        """See `io.RawIOBase`; the rest of the object, by ranges in parallel."""
        start, end = self.position, self.info.num_bytes
        if start >= end:
            return b""
        self._drop_ahead()
        self.position = end
        return bytes(
            self.requests.wait(receive_range(self.requests, self.key, start=start, end=end, mark=self.info.mark))
        )

    def close(self) -> None:
        """See `io.RawIOBase`; drops what is on its way."""
        if not self.closed:
            self._drop_ahead()
            self.block = _Block(start=0, data=bytearray())
        super().close()

    def _load(self, num_wanted: int) -> None:
        """Make the block at `position` the current one; on a sequential read, ask for the one after it."""
        is_sequential = self.position == self.block.end
        ahead = self.ahead
        if ahead is not None and ahead.start <= self.position < ahead.end:
            self.ahead = None
            self.block = ahead.future.result()
            is_sequential = True
        else:
            self._drop_ahead()
            if not is_sequential:
                self.next_block_bytes = FIRST_BLOCK_BYTES
            start, end = self._range_for(num_wanted)
            self.block = self.requests.wait(self._fetch(start, end))
        if is_sequential:
            self._ask_ahead()

    def _range_for(self, num_wanted: int) -> tuple[int, int]:
        """Return the range to fetch for a read at `position`; near the end, all of the end, which is read backwards."""
        num_bytes = min(max(num_wanted, self.next_block_bytes), LAST_BLOCK_BYTES)
        end = min(self.position + num_bytes, self.info.num_bytes)
        start = self.position
        if end == self.info.num_bytes and end - start < FIRST_BLOCK_BYTES and start != self.block.end:
            start = max(0, end - FIRST_BLOCK_BYTES)
        return start, end

    def _ask_ahead(self) -> None:
        self.next_block_bytes = min(self.next_block_bytes * BLOCK_GROWTH, LAST_BLOCK_BYTES)
        start = self.block.end
        end = min(start + self.next_block_bytes, self.info.num_bytes)
        if start < end:
            loop = self.requests.file_system().loop
            self.ahead = _Ahead(start, end, asyncio.run_coroutine_threadsafe(self._fetch(start, end), loop))

    def _drop_ahead(self) -> None:
        if self.ahead is not None:
            self.ahead.future.cancel()
            self.ahead = None

    async def _fetch(self, start: int, end: int) -> _Block:
        received = await receive(self.requests, self.key, start=start, end=end, mark=self.info.mark)
        return _Block(start=start, data=received.data)
