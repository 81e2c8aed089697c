"""Objects of a bucket removed side by side: a checkpoint of 1,024 ranks has as many files, and reports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from pipeline.s3.requests import S3Requests, all_of

NUM_PARALLEL_REMOVALS = 32


async def remove_objects(requests: S3Requests, keys: Sequence[str]) -> None:
    """Return when the objects are gone; missing ones are fine.

    Raises:
        ArtifactError: one cannot be removed; others may be gone.
    """
    parallel = asyncio.Semaphore(NUM_PARALLEL_REMOVALS)

    async def remove(key: str) -> None:
        async with parallel:
            with contextlib.suppress(FileNotFoundError):
                await requests.ask("delete_object", doing="remove", Key=key)

    await all_of(remove(key) for key in keys)
