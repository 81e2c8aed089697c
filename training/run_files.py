"""Copies a run's metrics and logs to its S3 storage, and back to a machine that has none of them.

They are written locally, below `local_run_dir`; a run_dir on a file system is that place itself and nothing is copied.
What a resume needs (metrics.jsonl, skipped_steps.jsonl) is there before the checkpoint of its step is; the rest follows
in the background. A copy that fails is a warning: the run is worth more than its logs. What cannot be brought back ends
the start: the next copy would replace it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.storage import ArtifactError, Storage, open_storage
from training.config import TrainConfig
from training.json_lines import parse_json_lines, read_json_lines
from training.metrics import METRICS, TENSORBOARD, rank_log_path
from training.run_dir import local_run_dir
from training.skipped import SKIPPED_STEPS

logger = logging.getLogger(__name__)

_RECORDS = (METRICS, SKIPPED_STEPS)


class RunFiles:
    """The files of one rank."""

    def __init__(self, config: TrainConfig, *, rank: int) -> None:
        """Find the places; where the storage has more of the rank's log it is brought back, so that it goes on.

        Args:
            config: of the run.
            rank: rank 0 has the metrics; every rank has a log.

        Raises:
            ArtifactError: the stored log cannot be read.
        """
        self.directory = local_run_dir(config.run_dir)
        """Where metrics and logs are written."""
        self.log = rank_log_path(self.directory, rank=rank)
        """The rank's log."""
        self._rank = rank
        self._storage = open_storage(config.run_dir, s3=config.s3) if "://" in config.run_dir else None
        self._copied: dict[str, tuple[int, int]] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run-files")
        self._pending: Future[None] | None = None
        self._has_records = False
        if self._storage is not None:
            self._bring_log(self._storage)

    def bring_records(self, *, step: int) -> None:
        """Bring back the metrics of a run that goes on after `step`, where the storage holds more of them; rank 0.

        Raises:
            ArtifactError: they cannot be read; they are not copied then either.
        """
        if self._storage is not None:
            for name in _RECORDS:
                self._bring_longer(self._storage, name=name, step=step)
        self._has_records = True

    def publish_records(self) -> None:
        """Copy what a resume needs; returns when it is there. To be called before a checkpoint is saved."""
        if self._has_records:  # else the stored ones may be newer, or not to be read now
            self._try(lambda storage: self._copy(storage, [self.directory / name for name in _RECORDS]))

    def publish(self) -> None:
        """Begin to copy everything else, unless the last copy still goes on."""
        if self._storage is not None and (self._pending is None or self._pending.done()):
            self._pending = self._pool.submit(self._publish_rest)

    def publish_log(self) -> None:
        """Copy this rank's log; returns when it is there."""
        self._try(lambda storage: self._copy(storage, [self.log]))

    def close(self) -> None:
        """Copy everything, and return when it is there."""
        self._pool.shutdown(wait=True)
        self._publish_rest()
        self.publish_records()

    def _publish_rest(self) -> None:
        events = (self.directory / TENSORBOARD).rglob("*") if self._rank == 0 else ()
        self._try(lambda storage: self._copy(storage, [self.log, *(path for path in events if path.is_file())]))

    def _try(self, work: Callable[[Storage], None]) -> None:
        if self._storage is None:
            return
        try:
            work(self._storage)
        except (ArtifactError, OSError) as error:
            logger.warning("metrics and logs of %s: %s; training goes on", self._storage, error)

    def _copy(self, storage: Storage, paths: list[Path]) -> None:
        """Copy the files that exist and have changed since they were last copied."""
        for path in paths:
            name = self._name(path)
            mark = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None
            if mark is not None and self._copied.get(name) != mark:
                with storage.stage(name) as staged_path:
                    shutil.copyfile(path, staged_path)  # a copy that does not grow while it is sent
                self._copied[name] = mark

    def _bring_log(self, storage: Storage) -> None:
        name = self._name(self.log)
        stored = storage.find(name)
        if stored is not None and stored.num_bytes > (self.log.stat().st_size if self.log.exists() else 0):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_bytes(storage.read_bytes(name))

    def _bring_longer(self, storage: Storage, *, name: str, step: int) -> None:
        """Take the stored file where it has more lines up to `step` than the local one: another machine wrote them."""
        if storage.find(name) is None:
            return
        data = storage.read_bytes(name)
        here = [line for line in read_json_lines(self.directory / name) if line["step"] <= step]
        there = [line for line in parse_json_lines(data.decode(), where=storage.url_of(name)) if line["step"] <= step]
        if len(there) > len(here):
            (self.directory / name).write_bytes(data)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.directory).as_posix()
