"""Ranges of S3 objects, whatever the network does: a broken or short body goes on from the byte where it stopped.

The invariant: all bytes that a caller gets of one object carry one ETag, so an object that is replaced while it is read
is an error and never a mixture. Every request names a range, so that the answer says how long it must be.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from pipeline.s3.requests import S3_ERRORS, Answer, BrokenBodyError, S3RefusedError, S3Requests, all_of
from pipeline.storage import ArtifactError, FileInfo

RECEIVE_BYTES = 1 << 18
RANGE_BYTES = 8 << 20
NUM_PARALLEL_RANGES = 4
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes of an object and what it was when they were read."""

    data: bytearray
    info: FileInfo


def info_of(answer: Answer, *, num_bytes: int) -> FileInfo:
    """Return what the headers of an answer say of an object whose size is known."""
    return FileInfo(num_bytes=num_bytes, mark=str(answer.get("ETag", "")).strip('"'))


async def head(requests: S3Requests, key: str, *, doing: str = "read") -> FileInfo:
    """Return size and ETag of an object.

    Raises:
        FileNotFoundError: it is missing.
        ArtifactError: its bucket is, or cannot be used.
    """
    try:
        answer = await requests.ask("head_object", doing=doing, Key=key)
    except FileNotFoundError:
        await requests.check_bucket()
        raise
    return info_of(answer, num_bytes=int(answer["ContentLength"]))


async def receive(
    requests: S3Requests, key: str, *, start: int = 0, end: int | None = None, mark: str = ""
) -> Received:
    """Return the bytes `[start, end)` of an object; fewer where it ends before, none from its end on.

    Args:
        requests: the bucket.
        key: the object.
        start: first byte.
        end: the byte after the last one, above `start`; the object's end without it.
        mark: the ETag that the object must have; that of the first answer without it.

    Raises:
        FileNotFoundError: the object is missing.
        ArtifactError: it was replaced, or the attempts are exhausted.
    """
    download = _Download(requests, key, start=start, end=end, mark=mark)
    attempts = requests.attempts("read", key)
    while True:
        num_before = len(download.data)
        try:
            return Received(data=download.data, info=await download.attempt())
        except S3_ERRORS as error:
            try:
                await attempts.wait_after(error, num_bytes=len(download.data) - num_before)
            except S3RefusedError as refused:
                if refused.code == "InvalidRange" and not download.data:
                    return Received(data=download.data, info=await head(requests, key))
                if refused.code == "PreconditionFailed":
                    raise download.replaced() from error
                raise


async def receive_all(requests: S3Requests, key: str) -> Received:
    """Return a whole object: its first 8 MiB tell its size, the others come four at a time."""
    first = await receive(requests, key, end=RANGE_BYTES)
    num_bytes = first.info.num_bytes
    if num_bytes <= RANGE_BYTES:
        return first
    rest = await receive_range(requests, key, start=RANGE_BYTES, end=num_bytes, mark=first.info.mark)
    whole = bytearray(num_bytes)
    whole[:RANGE_BYTES] = first.data
    whole[RANGE_BYTES:] = rest
    return Received(data=whole, info=first.info)


async def receive_range(requests: S3Requests, key: str, *, start: int, end: int, mark: str) -> bytearray:
    """Return the bytes `[start, end)`, which the object has, in ranges of 8 MiB, four at a time."""
    whole = bytearray(end - start)
    parallel = asyncio.Semaphore(NUM_PARALLEL_RANGES)

    async def fill(at: int) -> None:
        async with parallel:
            until = min(at + RANGE_BYTES, end)
            received = await receive(requests, key, start=at, end=until, mark=mark)
            whole[at - start : until - start] = received.data

    await all_of(fill(at) for at in range(start, end, RANGE_BYTES))
    return whole


class _Download:
    """The bytes of one range that have come so far, and how to ask for the next ones."""

    def __init__(self, requests: S3Requests, key: str, *, start: int, end: int | None, mark: str) -> None:
        self.requests = requests
        self.key = key
        self.start = start
        self.end = end
        self.mark = mark
        self.data = bytearray()

    async def attempt(self) -> FileInfo:
        """Ask for what is missing and append what comes; return the object's size and ETag when nothing is missing."""
        begin = self.start + len(self.data)
        wanted = f"bytes={begin}-" if self.end is None else f"bytes={begin}-{self.end - 1}"
        condition = {"IfMatch": f'"{self.mark}"'} if self.mark else {}
        answer = await self.requests.send("get_object", Key=self.key, Range=wanted, **condition)
        body = answer["Body"]
        try:
            info = self._checked(answer, begin=begin)
            await self._append(body, num_bytes=min(self.end or info.num_bytes, info.num_bytes) - self.start)
        finally:
            body.close()  # after a whole body this gives the connection back; before, it drops it
        return info

    def replaced(self) -> ArtifactError:
        """Return the error for an object that is no longer what its first bytes came from."""
        return ArtifactError(
            f"read s3://{self.requests.bucket}/{self.key}: it must stay as it is while it is read, got another ETag "
            f"than {self.mark!r}; find out what wrote it, then run again"
        )

    def _checked(self, answer: Answer, *, begin: int) -> FileInfo:
        """Return size and ETag of the object, which must be the one before, from an answer that starts at `begin`."""
        content_range = CONTENT_RANGE.fullmatch(str(answer.get("ContentRange", "")))
        if content_range is None and begin > 0:
            raise ArtifactError(
                f"read s3://{self.requests.bucket}/{self.key}: {self.requests.endpoint()} must honour byte ranges, "
                f"got an answer without Content-Range; use a server that does"
            )
        if content_range is not None and int(content_range[1]) != begin:
            raise BrokenBodyError(f"a body that starts at byte {content_range[1]}, not {begin}")
        info = info_of(answer, num_bytes=int(content_range[3] if content_range else answer["ContentLength"]))
        if self.mark and info.mark != self.mark:
            raise self.replaced()
        self.mark = info.mark
        return info

    async def _append(self, body: Any, *, num_bytes: int) -> None:
        while len(self.data) < num_bytes and (received := await body.read(RECEIVE_BYTES)):
            self.data += received
        if len(self.data) < num_bytes:
            raise BrokenBodyError(f"a body that ends after {len(self.data)} of {num_bytes} bytes")
        del self.data[num_bytes:]
