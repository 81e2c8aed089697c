"""The lock of an S3 directory: an object that one job makes, keeps renewing while it runs, and removes at its end.

The invariant: making it and taking it over are conditional writes (`If-None-Match`, `If-Match`), so that one of
several jobs wins. It is stale 60 s after the last renewal, by the server's clock alone, or at once where its process
was of this machine and is gone. Where a server ignores conditions the last writer wins, and each reads back who it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from pipeline.s3.requests import S3_ERRORS, S3RefusedError, S3Requests
from pipeline.s3.upload import put
from pipeline.storage import ArtifactError, DirectoryInUseError

logger = logging.getLogger(__name__)
RENEW_S = 10.0
STALE_S = 60.0
SETTLE_S = 2.0
MAX_ROUNDS = 5
REFUSES_CONDITIONS = ("NotImplemented", "InvalidArgument", "InvalidRequest")


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who holds a lock; the content of the object, with the number of renewals and the time.

    Attributes:
        host: for people.
        machine: the boot and the pid namespace, in which `pid` means something; empty where the system does not tell.
        pid: the process.
        started: when the process began, in clock ticks since boot; empty where the system does not tell.
        token: random; tells this holding from all others.
    """

    host: str
    machine: str
    pid: int
    started: str
    token: str


@dataclass(frozen=True, slots=True)
class _Found:
    holder: LockHolder
    mark: str
    age_s: float


@contextlib.contextmanager
def hold_lock(requests: S3Requests, key: str) -> Iterator[threading.Event]:
    """Hold the lock object `key` while the body runs, renewed by a thread every 10 s; removed at the end if still ours.

    Yields:
        What is set when another process has taken it over.

    Raises:
        DirectoryInUseError: another live process holds it.
        ArtifactError: the storage cannot be used.
    """
    lock = S3Lock(requests, key)
    lock.acquire()
    done = threading.Event()
    heartbeat = threading.Thread(target=lock.keep, args=(done,), name=f"renew {key}", daemon=True)
    heartbeat.start()
    try:
        yield lock.is_lost
    finally:
        done.set()
        heartbeat.join(timeout=RENEW_S)  # where the server does not answer, it may be amid its attempts
        lock.release()


class S3Lock:
    """One holding of a lock object."""

    def __init__(self, requests: S3Requests, key: str) -> None:
        self.requests = requests
        self.key = key
        self.url = f"s3://{requests.bucket}/{key}"
        self.holder = this_process()
        self.num_renewals = 0
        self.is_lost = threading.Event()

    def acquire(self) -> None:
        """Make the lock, or take over a stale one.

        Raises:
            DirectoryInUseError: another live process holds it.
        """
        for _ in range(MAX_ROUNDS):
            found = self.read()
            if found is None:
                condition = {"IfNoneMatch": "*"}
            elif is_stale(found.holder, age_s=found.age_s):
                logger.warning(
                    "s3 lock taken over url=%s host=%s pid=%d age_s=%.0f",
                    *(self.url, found.holder.host, found.holder.pid, found.age_s),
                )
                condition = {"IfMatch": f'"{found.mark}"'}
            else:
                raise self._held(found)
            if self._write(condition) and self._is_settled(is_takeover=found is not None):
                return
        raise DirectoryInUseError(
            f"lock {self.url}: one job at a time may write here, and several begin; begin one of them"
        )

    def keep(self, done: threading.Event) -> None:
        """Renew the lock until `done` is set or the lock is lost: then `is_lost` is set, and an error logged."""
        renewed = time.time()  # of the wall clock, which goes on while the machine is suspended
        while not done.wait(RENEW_S):
            began = time.time()
            try:
                is_ours = self.renew(done, age_s=began - renewed)
            except (ArtifactError, FileNotFoundError) as error:
                if not done.is_set():
                    age_s = time.time() - renewed
                    level = logging.ERROR if age_s > STALE_S else logging.WARNING
                    logger.log(level, "s3 lock not renewed url=%s for_s=%.0f cause=%s", self.url, age_s, error)
                continue
            if done.is_set():
                return  # what it found may be its own release
            if not is_ours:
                logger.error(
                    "s3 lock LOST url=%s: another job may write here at the same time; see that one of them stops, "
                    "then run tensorar verify",
                    self.url,
                )
                self.is_lost.set()
                return
            renewed = began

    def renew(self, done: threading.Event, *, age_s: float) -> bool:
        """Write the lock again, anew where somebody removed it, and whether it is still ours.

        Args:
            done: when set, a lock that is gone was released.
            age_s: since the last renewal; a lock that was stale and is gone may have been another job's in between.
        """
        self.num_renewals += 1
        for _ in range(MAX_ROUNDS):
            found = self.read()
            if found is None and (done.is_set() or age_s > STALE_S):
                return False
            if found is not None and found.holder.token != self.holder.token:
                return False
            if self._write({"IfNoneMatch": "*"} if found is None else {"IfMatch": f'"{found.mark}"'}):
                return True
        return False

    def release(self) -> None:
        """Remove the lock if it is still ours; trouble is logged, since the lock frees itself."""
        try:
            found = self.read()
            if found is not None and found.holder.token == self.holder.token:
                self.requests.wait(self.requests.ask("delete_object", doing="unlock", Key=self.key))
        except (ArtifactError, FileNotFoundError) as error:
            logger.warning("s3 lock not removed url=%s free_in_s=%.0f cause=%s", self.url, STALE_S, error)

    def is_held(self) -> bool:
        """Whether any live process holds it, this one or another."""
        found = self.read()
        return found is not None and not is_stale(found.holder, age_s=found.age_s)

    def read(self) -> _Found | None:
        """Return who holds the lock and how long ago it was renewed; None where nobody holds it."""
        try:
            return self.requests.wait(self._read())
        except FileNotFoundError:
            return None

    async def _read(self) -> _Found:
        attempts = self.requests.attempts("lock", self.key)
        while True:
            try:
                answer = await self.requests.send("get_object", Key=self.key)
                content = await answer["Body"].read()
            except S3_ERRORS as error:
                await attempts.wait_after(error)
                continue
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else datetime.now(UTC)
            age_s = (now - answer["LastModified"]).total_seconds()
            return _Found(holder=parse_holder(content), mark=answer["ETag"].strip('"'), age_s=age_s)

    def _write(self, condition: dict[str, str]) -> bool:
        """Write the lock under a condition; whether it is ours now."""
        content = {**asdict(self.holder), "renewals": self.num_renewals, "time": datetime.now(UTC).isoformat()}
        data = json.dumps(content).encode()
        try:
            self.requests.wait(put(self.requests, self.key, data, **condition))
        except FileNotFoundError:  # AWS's answer to If-Match where the object is gone
            return False
        except S3RefusedError as refused:
            if refused.code in REFUSES_CONDITIONS:
                self.requests.wait(put(self.requests, self.key, data))
                return True
            if refused.code != "PreconditionFailed":
                raise
            # An attempt whose answer was lost may have written it.
            found = self.read()
            return found is not None and found.holder.token == self.holder.token
        return True

    def _is_settled(self, *, is_takeover: bool) -> bool:
        """Whether the lock that was written stays ours: a server that ignores conditions lets the last writer win.

        Of `If-None-Match` a second write tells; nothing tells of `If-Match`, so that a takeover always waits.
        """
        if not is_takeover and self._refuses_a_second():
            return True
        time.sleep(SETTLE_S)
        found = self.read()
        return found is not None and found.holder.token == self.holder.token

    def _refuses_a_second(self) -> bool:
        """Whether the server refuses to make the lock while it is there; else it is written once more."""
        try:
            self.requests.wait(put(self.requests, self.key, json.dumps(asdict(self.holder)).encode(), IfNoneMatch="*"))
        except S3RefusedError as refused:
            if refused.code == "PreconditionFailed":
                return True
            if refused.code not in REFUSES_CONDITIONS:
                raise
        logger.warning("s3 lock url=%s: the server ignores conditional writes, the lock is best effort", self.url)
        return False

    def _held(self, found: _Found) -> DirectoryInUseError:
        holder = found.holder
        return DirectoryInUseError(
            f"lock {self.url}: one job at a time may write here, got one of host {holder.host}, pid {holder.pid}, seen "
            f"{max(found.age_s, 0):.0f} s ago; wait for it or stop it (a dead one's lock ends after {STALE_S:.0f} s)"
        )


def is_stale(holder: LockHolder, *, age_s: float) -> bool:
    """Whether a lock may be taken over: not renewed for 60 s, or held by a process of this machine that is gone."""
    if age_s > STALE_S:
        return True
    if not holder.machine or holder.machine != _machine():
        return False
    return _started(holder.pid) != holder.started


def this_process() -> LockHolder:
    """Return this process as a new holder, with a token of its own."""
    return LockHolder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        token=secrets.token_hex(16),
    )


def parse_holder(content: bytes) -> LockHolder:
    """Return who wrote a lock; unknown where it is not one of ours, so that only its age frees it."""
    try:
        fields = json.loads(content)
        return LockHolder(**{name: kind(fields[name]) for name, kind in _FIELDS.items()})
    except (ValueError, KeyError, TypeError):
        return LockHolder(host="unknown", machine="", pid=0, started="", token="")


_FIELDS = {"host": str, "machine": str, "pid": int, "started": str, "token": str}


def _machine() -> str:
    """Return the boot and the pid namespace: the same host name may stand for several containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process began, in ticks since boot; empty where there is no such process, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
