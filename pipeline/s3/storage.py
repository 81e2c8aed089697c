"""An S3 bucket and prefix as a `Storage`, on s3fs: what is committed appears in one request, and whole.

The invariant is that of `pipeline.storage`; the parts are `requests` (what is retried), `download`, `reader`,
`upload` and `lock`. Nothing is cached: a listing costs one request for each 1,000 objects and is never stale.
"""

from __future__ import annotations

import contextlib
import re
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.config import S3Config
from pipeline.s3.download import head, info_of, receive, receive_all
from pipeline.s3.lock import S3Lock, hold_lock
from pipeline.s3.reader import open_reader
from pipeline.s3.removal import remove_objects
from pipeline.s3.requests import Answer, S3Requests
from pipeline.s3.staging import remove_dead_directories, staging_directory
from pipeline.s3.upload import abort_uploads, find_uploads, put, upload
from pipeline.storage import S3_SCHEME, ArtifactError, Buffer, FileInfo, StagingFullError, Storage, raise_full

BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,254}")


class S3Storage(Storage):
    """The objects below a prefix of a bucket."""

    def __init__(self, url: str, *, config: S3Config) -> None:
        super().__init__(url)
        bucket, _, base = self.url.removeprefix(S3_SCHEME).partition("/")
        if not url.startswith(S3_SCHEME) or not BUCKET.fullmatch(bucket):
            raise ArtifactError(f"open {url}: an S3 URL must be s3://bucket/prefix, got {url!r}; correct it")
        self.base = f"{base}/" if base else ""
        self.requests = S3Requests(bucket, config)

    def __repr__(self) -> str:
        return f"S3Storage({self.url!r})"

    def list(self, prefix: str = "") -> dict[str, FileInfo]:
        """See `Storage.list`."""
        found: dict[str, FileInfo] = {}
        marker: dict[str, str] = {}
        while True:
            page = self.requests.wait(
                self.requests.ask("list_objects_v2", doing="list", Prefix=self.base + prefix, **marker)
            )
            found.update(self._visible(page))
            if not page.get("IsTruncated"):
                return dict(sorted(found.items()))  # not all servers sort by the whole name
            marker = {"ContinuationToken": page["NextContinuationToken"]}

    def find(self, name: str) -> FileInfo | None:
        """See `Storage.find`."""
        try:
            return self.requests.wait(head(self.requests, self.base + name))
        except FileNotFoundError:
            return None

    def read_bytes(self, name: str, *, start: int = 0, end: int | None = None) -> bytes:
        """See `Storage.read_bytes`."""
        if end is not None and end <= start:
            self.requests.wait(head(self.requests, self.base + name))
            return b""
        return bytes(self.requests.wait(receive(self.requests, self.base + name, start=start, end=end)).data)

    def open(self, name: str) -> IO[bytes]:
        """See `Storage.open`."""
        return open_reader(self.requests, self.base + name)

    def map(self, name: str) -> Buffer:
        """See `Storage.map`."""
        return memoryview(self.requests.wait(receive_all(self.requests, self.base + name)).data).toreadonly()

    def write_bytes(self, name: str, data: bytes) -> FileInfo:
        """See `Storage.write_bytes`."""
        return self.requests.wait(put(self.requests, self.base + name, data))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """See `Storage.stage`; the local path is in a directory below TMPDIR."""
        try:
            with staging_directory() as directory:
                staged_path = directory / PurePosixPath(name).name
                yield staged_path
                self.requests.wait(upload(self.requests, self.base + name, staged_path))
        except OSError as error:
            place = f"stage {self.url_of(name)} in {tempfile.gettempdir()} on {socket.gethostname()}"
            action = "free some space there or set TMPDIR, and run the same command again"
            raise_full(error, doing=place, action=action, kind=StagingFullError)
            raise

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        self.remove_all([name])

    def remove_all(self, names: Iterable[str]) -> None:
        """See `Storage.remove_all`; a request for each, side by side: not every server knows the one for many."""
        self.requests.wait(remove_objects(self.requests, [self.base + name for name in names]))

    def find_staged(self) -> tuple[str, ...]:
        """See `Storage.find_staged`: the names of open uploads."""
        uploads = self.requests.wait(find_uploads(self.requests, self.base))
        return tuple(sorted(upload["Key"].removeprefix(self.base) for upload in uploads))

    def remove_staged(self) -> int:
        """See `Storage.remove_staged`: aborts and counts open uploads, removes local files of this machine's dead jobs.

        An upload of a live writer is aborted too, which is a failed attempt there: hold the lock before.
        """
        remove_dead_directories()
        return self.requests.wait(abort_uploads(self.requests, self.base))

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[threading.Event]:
        """See `Storage.exclusive`; the lock is the object `.lock`, renewed while it is held."""
        with hold_lock(self.requests, f"{self.base}.lock") as is_lost:
            yield is_lost

    def is_held(self) -> bool:
        """See `Storage.is_held`."""
        return S3Lock(self.requests, f"{self.base}.lock").is_held()

    def _visible(self, page: Answer) -> Iterator[tuple[str, FileInfo]]:
        """Yield (name, info) of a page's objects; folders and names with a part that starts with a dot are left out."""
        for entry in page.get("Contents", ()):
            name = entry["Key"][len(self.base) :]
            if name and not name.endswith("/") and not name.startswith(".") and "/." not in name:
                yield name, info_of(entry, num_bytes=entry["Size"])
