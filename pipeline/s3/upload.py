"""Local files into S3 objects: one PUT where small, parts where large; the object is there whole or not at all.

The invariant: an object appears, or changes, in the one request that ends its upload (the PUT, or the completion of the
parts). Each body carries its MD5, so that the server refuses what the network damaged. A killed process leaves an open
upload, which no listing or reader shows and `abort_uploads` removes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import math
import secrets
from pathlib import Path
from typing import Any

from pipeline.s3.download import info_of
from pipeline.s3.requests import S3RefusedError, S3Requests, all_of
from pipeline.storage import ArtifactError, FileInfo

logger = logging.getLogger(__name__)
PART_BYTES = 16 << 20
NUM_PARALLEL_PARTS = 3
MAX_PARTS = 10_000
TOKEN_FIELD = "tensorar-upload"
"""Metadata of an object that tells whose upload made it, where the answer to the completion was lost."""


def md5_of(data: bytes) -> str:
    """Return the MD5 as the `Content-MD5` header has it."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


async def put(requests: S3Requests, key: str, data: bytes, **conditions: str) -> FileInfo:
    """Write `data` as an object in one request and return its size and ETag.

    Args:
        requests: the bucket.
        key: the object.
        data: its whole content.
        **conditions: `IfNoneMatch` or `IfMatch`, as botocore names them.

    Raises:
        S3RefusedError: a condition does not hold (code `PreconditionFailed`), or the server refuses for good.
    """
    answer = await requests.ask("put_object", doing="write", Key=key, Body=data, ContentMD5=md5_of(data), **conditions)
    return info_of(answer, num_bytes=len(data))


async def upload(requests: S3Requests, key: str, path: Path) -> None:
    """Commit a local file as an object.

    Raises:
        ArtifactError: it could not be committed; the object is as before, unless the message says otherwise.
    """
    num_bytes = path.stat().st_size
    if num_bytes <= PART_BYTES:
        await put(requests, key, await asyncio.to_thread(path.read_bytes))
        return
    token = secrets.token_hex(16)
    begun = await requests.ask("create_multipart_upload", doing="write", Key=key, Metadata={TOKEN_FIELD: token})
    try:
        parts = await _send_parts(requests, key, path, upload_id=begun["UploadId"], num_bytes=num_bytes)
        await _complete(requests, key, upload_id=begun["UploadId"], parts=parts, token=token)
    except BaseException as error:
        await _abort(requests, key, begun["UploadId"])
        if isinstance(error, S3RefusedError) and error.code == "NoSuchUpload":
            raise ArtifactError(
                f"commit s3://{requests.bucket}/{key}: its upload must stay open until it is complete, got "
                f"{error.code}; another job removed it as a leftover: see that one job writes there, then run again"
            ) from error
        raise
    await _check_size(requests, key, num_bytes=num_bytes)


async def abort_uploads(requests: S3Requests, prefix: str) -> int:
    """Abort the open uploads of all keys that start with `prefix` and return how many there were."""
    uploads = await find_uploads(requests, prefix)
    return sum(await all_of(_abort(requests, upload["Key"], upload["UploadId"]) for upload in uploads))


async def find_uploads(requests: S3Requests, prefix: str) -> list[dict[str, Any]]:
    """Return the open uploads of all keys that start with `prefix`: dictionaries with `Key` and `UploadId`."""
    marker: dict[str, str] = {}
    uploads: list[dict[str, Any]] = []
    while True:
        page = await requests.ask("list_multipart_uploads", doing="list uploads of", Prefix=prefix, **marker)
        uploads += [upload for upload in page.get("Uploads", ()) if upload["Key"].startswith(prefix)]
        if not page.get("IsTruncated"):
            return uploads
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def part_bytes_for(num_bytes: int) -> int:
    """Return the size of all parts but the last: 16 MiB, or what keeps an object within 10,000 parts."""
    return max(PART_BYTES, math.ceil(num_bytes / MAX_PARTS))


async def _send_parts(
    requests: S3Requests, key: str, path: Path, *, upload_id: str, num_bytes: int
) -> list[dict[str, Any]]:
    part_bytes = part_bytes_for(num_bytes)
    parallel = asyncio.Semaphore(NUM_PARALLEL_PARTS)

    async def send(part_index: int) -> dict[str, Any]:
        async with parallel:
            data, md5 = await asyncio.to_thread(_read_part, path, part_index * part_bytes, part_bytes)
            answer = await requests.ask(
                "upload_part",
                doing="write",
                Key=key,
                UploadId=upload_id,
                PartNumber=part_index + 1,
                Body=data,
                ContentMD5=md5,
            )
            return {"PartNumber": part_index + 1, "ETag": answer["ETag"]}

    return await all_of(send(part_index) for part_index in range(math.ceil(num_bytes / part_bytes)))


def _read_part(path: Path, start: int, num_bytes: int) -> tuple[bytes, str]:
    """Return a part of a file and its MD5; in a thread, since both would hold up the requests of the others."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(num_bytes)
    return data, md5_of(data)


async def _complete(requests: S3Requests, key: str, *, upload_id: str, parts: list[dict[str, Any]], token: str) -> None:
    """Make the object visible; where the upload is gone, an earlier attempt may have done it: then it has our token."""
    try:
        await requests.ask(
            "complete_multipart_upload", doing="commit", Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
        )
    except ArtifactError as error:
        is_certain = isinstance(error, S3RefusedError) and error.code != "NoSuchUpload"
        if is_certain or not await _has_token(requests, key, token):
            raise


async def _has_token(requests: S3Requests, key: str, token: str) -> bool:
    try:
        answer = await requests.ask("head_object", doing="commit", Key=key)
    except FileNotFoundError:
        return False
    return bool(answer.get("Metadata", {}).get(TOKEN_FIELD) == token)


async def _check_size(requests: S3Requests, key: str, *, num_bytes: int) -> None:
    answer = await requests.ask("head_object", doing="check", Key=key)
    if answer["ContentLength"] != num_bytes:
        raise ArtifactError(
            f"check s3://{requests.bucket}/{key}: what was committed must have {num_bytes} bytes, "
            f"got {answer['ContentLength']}; see that one job writes there, then run again"
        )


async def _abort(requests: S3Requests, key: str, upload_id: str) -> bool:
    """Abort an open upload; whether it was open. What cannot be aborted is logged, since an error is on its way."""
    try:
        await requests.ask("abort_multipart_upload", doing="abort upload of", Key=key, UploadId=upload_id)
    except ArtifactError as error:
        if isinstance(error, S3RefusedError) and error.code == "NoSuchUpload":
            return False
        logger.warning("s3 upload left open url=s3://%s/%s cause=%s", requests.bucket, key, error)
        return False
    return True
