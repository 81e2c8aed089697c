"""One S3 bucket, asked until it answers: what is retried, how long it waits, and what is said when it gives up.

The invariant: a caller sees an answer, `FileNotFoundError`, or a one-line `ArtifactError` with the next action, and
none of them carries a secret. All runs on s3fs's event loop, whose thread belongs to this process: a forked child makes
its own. s3fs and botocore retry nothing here, so that attempts are counted once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import s3fs
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    ConfigParseError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as EndpointError
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from pipeline.config import S3Config
from pipeline.storage import ArtifactError, StorageUnavailableError

logger = logging.getLogger(__name__)
Answer = dict[str, Any]
T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30
NUM_CONNECTIONS = 64
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 10.0
PROGRESS_BYTES = 1 << 16
"""An attempt that moved as much starts the count again; so a file takes a bounded number of attempts."""

S3_ERRORS = (OSError, BotoCoreError, aiohttp.ClientError, ResponseParserError)
"""What a request can fail with; s3fs turns a server's refusal into an OSError and keeps it as the cause."""
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
RETRIED_CODES = frozenset(
    {
        *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"),
        *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "OperationAborted", "ConditionalRequestConflict"),
    }
)
DENIED_CODES = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
)
CREDENTIALS_ERRORS = (
    *(NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound, TokenRetrievalError),
    SSOError,
)
ENVIRONMENT = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
"""Variables that name what botocore reads once, when a client is made, and where it looks without them."""
NEW_FILE_S = 10.0
"""A file that is younger may be half written: what was made of it is no answer yet."""


class S3RefusedError(ArtifactError):
    """A request that the server refused and that no retry can help.

    Attributes:
        code: the server's error code (`PreconditionFailed`, `InvalidRange`, `NoSuchUpload`, ...).
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(S3RefusedError, code=self.code), (str(self),)  # it crosses from a worker to its job


class BrokenBodyError(OSError):
    """A body ended before its length, or was not the range that was asked for; the request is sent again."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What a failed attempt means.

    Attributes:
        kind: what follows from it.
        cause: what was got, for messages: `503 SlowDown`, `ReadTimeoutError`.
        code: the server's error code; empty where no answer came.
    """

    kind: Literal["retry", "unreachable", "missing", "bucket", "denied", "credentials", "refused"]
    cause: str
    code: str = ""


class S3Requests:
    """The requests of one bucket; safe in threads, and made anew in a forked process."""

    def __init__(self, bucket: str, config: S3Config) -> None:
        self.bucket = bucket
        self.config = config
        self.has_bucket = False

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what a coroutine of this object returns; an interrupt of the waiting thread cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.file_system().loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def file_system(self) -> s3fs.S3FileSystem:
        """Return the s3fs of this process for this endpoint and today's environment and credentials files."""
        variables = tuple(os.environ.get(name) for name in ENVIRONMENT)
        environment = hash((variables, _marks()))
        return _file_system(self.config.endpoint_url, os.getpid(), environment)

    def attempts(self, doing: str, key: str) -> Attempts:
        """Return a count of attempts for one piece of work on one key."""
        url = f"s3://{self.bucket}/{key}" if key else f"s3://{self.bucket}"
        return Attempts(f"{doing} {url}", url=url, endpoint=self.endpoint(), max_attempts=self.config.max_attempts)

    def endpoint(self) -> str:
        """Return the endpoint's address for messages, without any user or password in it."""
        configured = self.config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
        parts = urlsplit(configured or os.environ.get("AWS_ENDPOINT_URL") or "")
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}" if host else "the AWS endpoint"

    async def send(self, method: str, **kwargs: Any) -> Answer:
        """Return the answer to one request that is sent once (`get_object`, `Key=...`); raises what s3fs raises."""
        file_system = self.file_system()
        await self._connect(file_system)
        answer: Answer = await file_system._call_s3(method, Bucket=self.bucket, **kwargs)
        return answer

    async def _connect(self, file_system: s3fs.S3FileSystem) -> None:
        """Make the client where there is none yet; that is where botocore refuses an endpoint, wherever it is set."""
        try:
            await file_system.set_session()
        except BotoCoreError:  # some of which are ValueErrors
            raise
        except ValueError as error:
            got = str(error).removeprefix("Invalid endpoint: ").rpartition("@")[2]  # without its password
            raise ArtifactError(
                f"open s3://{self.bucket}: an endpoint must begin with http:// or https://, got {got!r}; correct "
                "s3.endpoint_url, AWS_ENDPOINT_URL or the profile's endpoint_url"
            ) from None

    async def ask(self, method: str, *, doing: str, **kwargs: Any) -> Answer:
        """Return the answer to a request, sent until it comes.

        Args:
            method: botocore's name of the operation.
            doing: the verb for messages.
            **kwargs: botocore's parameters, `Bucket` apart.

        Raises:
            FileNotFoundError: the object is missing.
            S3RefusedError: the server refuses, and will again.
            ArtifactError: the bucket, the endpoint or the credentials cannot be used, or the attempts are exhausted.
        """
        attempts = self.attempts(doing, kwargs.get("Key", kwargs.get("Prefix", "")))
        while True:
            try:
                return await self.send(method, **kwargs)
            except S3_ERRORS as error:
                await attempts.wait_after(error)

    async def check_bucket(self) -> None:
        """Raise `ArtifactError` where the bucket is missing: the answer to a HEAD of an object does not say so."""
        if not self.has_bucket:
            await self.ask("head_bucket", doing="open")
            self.has_bucket = True


class Attempts:
    """Counts the attempts of one request without progress, waits between them, and says why it gave up."""

    def __init__(self, doing: str, *, url: str, endpoint: str, max_attempts: int) -> None:
        self.doing = doing
        self.url = url
        self.is_bucket = url.count("/") == 2
        self.endpoint = endpoint
        self.max_attempts = max_attempts
        self.num_failed = 0

    async def wait_after(self, error: Exception, *, num_bytes: int = 0) -> None:
        """Return when the request may be sent again.

        Args:
            error: what the attempt failed with.
            num_bytes: what it moved all the same; from `PROGRESS_BYTES` on, the count starts again.

        Raises:
            FileNotFoundError, S3RefusedError, ArtifactError: as `S3Requests.ask`.
        """
        fault = classify(error)
        self.num_failed = 1 if num_bytes >= PROGRESS_BYTES else self.num_failed + 1
        is_early = fault.kind in ("denied", "credentials") and _is_credentials_file_new()
        may_pass = is_early or fault.kind in ("retry", "unreachable")
        if not may_pass or self.num_failed >= self.max_attempts:
            raise self.error_for(fault) from error
        wait_s = backoff_s(self.num_failed)
        logger.info(
            "s3 retry doing=%r attempt=%d max_attempts=%d cause=%r wait_s=%.2f",
            *(self.doing, self.num_failed, self.max_attempts, fault.cause, wait_s),
        )
        await asyncio.sleep(wait_s)

    def error_for(self, fault: Fault) -> Exception:
        """Return the error to raise: what was being done, the rule, what was got, and the next action."""
        bucket = self.url.split("/")[2]
        got = fault.cause
        match fault.kind:
            case "missing" if not self.is_bucket:
                return FileNotFoundError(errno.ENOENT, "no such object", self.url)
            case "bucket" | "missing":
                return ArtifactError(f"{self.doing}: bucket {bucket} must exist, got {got}; make it or correct the URL")
            case "denied" if fault.code.startswith("Expired"):
                return StorageUnavailableError(
                    f"{self.doing}: the credentials must allow it, got {got}; renew them (a running job sees a renewed "
                    "credentials file) and run again"
                )
            case "denied":
                return StorageUnavailableError(
                    f"{self.doing}: the credentials must allow it, got {got}; check the AWS access key and secret "
                    "(environment, profile or role), that they have not expired, the region and the bucket's policy"
                )
            case "credentials":
                return StorageUnavailableError(
                    f"{self.doing}: credentials must be in the standard chain, got {got}; set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, correct their file or give the machine a role"
                )
            case "unreachable":
                return StorageUnavailableError(
                    f"{self.doing}: {self.endpoint} must answer, got {got} in {self.num_failed} attempts; "
                    "check s3.endpoint_url and the network"
                )
            case "retry":
                return StorageUnavailableError(
                    f"{self.doing}: must succeed within s3.max_attempts = {self.max_attempts} attempts, got {got} from "
                    f"{self.endpoint}; run again later or raise s3.max_attempts"
                )
        return S3RefusedError(
            f"{self.doing}: {self.endpoint} must accept the request, got {got}; check the URL, region and endpoint",
            code=fault.code,
        )


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what all coroutines return, in order; after the first error the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def backoff_s(num_failed: int) -> float:
    """Return how long to wait after the n-th failure in a row (1, 2, ...): doubling, capped, with up to half jitter."""
    ceiling_s = min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2.0 ** min(num_failed - 1, 16))
    return ceiling_s * (0.5 + 0.5 * random.SystemRandom().random())  # the global generator belongs to the user


def parse_time(text: str) -> datetime:
    """Return the time of a listing (ISO 8601) or of a header (RFC 9110).

    botocore's own parser takes three quarters of the time of a listing: 43 of 58 ms for 1,000 objects.
    """
    return datetime.fromisoformat(text) if text[:4].isdigit() else parsedate_to_datetime(text)


def classify(error: Exception) -> Fault:
    """Return what an error of `S3_ERRORS` means."""
    refusal = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(refusal, ClientError):
        return _classify_refusal(refusal)
    if isinstance(error, ConfigParseError):
        return Fault(kind="credentials", cause=f"{error.kwargs['path']}, which cannot be parsed")
    if isinstance(error, CREDENTIALS_ERRORS):
        return Fault(kind="credentials", cause=type(error).__name__)
    if isinstance(error, EndpointError):
        return Fault(kind="unreachable", cause=type(error).__name__)
    if isinstance(error, BrokenBodyError):
        return Fault(kind="retry", cause=str(error))
    # What is left of BotoCoreError is a mistake in the request or in the configuration.
    if isinstance(error, BotoCoreError) and not isinstance(error, (HTTPClientError, IncompleteReadError)):
        return Fault(kind="refused", cause=_named(error))
    return Fault(kind="retry", cause=type(error).__name__)


def _classify_refusal(refusal: ClientError) -> Fault:
    status = int(refusal.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(refusal.response.get("Error", {}).get("Code", ""))
    cause = f"{status} {code}" if code and code != str(status) else str(status)
    if status in RETRIED_STATUS or code in RETRIED_CODES:
        return Fault(kind="retry", cause=cause, code=code)
    if code == "NoSuchBucket":
        return Fault(kind="bucket", cause=cause, code=code)
    if code in ("NoSuchKey", "404"):
        return Fault(kind="missing", cause=cause, code=code)
    # A HEAD has no body, so that its code is its status; with 400 AWS answers it for an expired token.
    if status in (401, 403) or code in DENIED_CODES or code == "400" or code.startswith("Expired"):
        return Fault(kind="denied", cause=cause, code=code)
    code = {"412": "PreconditionFailed", "416": "InvalidRange", "501": "NotImplemented"}.get(code, code)
    return Fault(kind="refused", cause=cause, code=code)


class _Mark(NamedTuple):
    """What changes when a file is written again; all 0 where there is none.

    Its time alone does not: an empty file and what is then written into it may have the same.
    """

    path: str
    mtime_ns: int = 0
    num_bytes: int = 0
    inode: int = 0


def _marks() -> tuple[_Mark, ...]:
    """Return the marks of the files that botocore reads."""
    return tuple(_mark(os.environ.get(name, default)) for name, default in FILES.items())


def _mark(path: str) -> _Mark:
    path = os.path.expanduser(path)  # noqa: PTH111  (Path's own is an error where a user has no home)
    try:
        status = Path(path).stat()
    except OSError:
        return _Mark(path)
    return _Mark(path, status.st_mtime_ns, status.st_size, status.st_ino)


def _is_credentials_file_new() -> bool:
    """Whether a file that botocore reads was written a moment ago."""
    return any(time.time() - mark.mtime_ns / 1e9 < NEW_FILE_S for mark in _marks())


def _named(error: Exception) -> str:
    """Return the type of an error and the start of its text, on one line (an endpoint may carry a password: cut it)."""
    text = " ".join(str(error).split()).rpartition("@")[2]
    return f"{type(error).__name__} ({text[:160]})" if text else type(error).__name__


@lru_cache(maxsize=16)
def _file_system(endpoint_url: str | None, process: int, environment: int) -> s3fs.S3FileSystem:
    """Return a client of this process; both numbers are there to make another one after a fork or a new secret."""
    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
    file_system = s3fs.S3FileSystem(
        session=session,
        endpoint_url=endpoint_url,
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": NUM_CONNECTIONS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Content-MD5 guards what is written; many servers know no trailing checksums.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    file_system.retries = 1
    return file_system
