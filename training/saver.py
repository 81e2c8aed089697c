"""Checkpoints written while training goes on: copy the state to memory, go on, write and commit in a thread.

Invariant: a save either ends in a whole checkpoint or leaves only what the next run removes. No collective runs in the
background: each rank tells of its finished file by a small report beside it, and rank 0's thread waits for all reports,
writes the record and commits. A failure on any rank is raised on every rank, at the next save or at `close`. The price
is host memory for one copy of the rank's state; without `checkpoint.background` it is written from where it lies.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.config import Config
from tokenization.fingerprint import Fingerprint
from training.checkpoint import (
    RECORD,
    CheckpointRecord,
    FileRecord,
    RunState,
    SetRecord,
    checkpoint_name,
    commit_checkpoint,
    prepared_name,
    rank_file_name,
    remove_old_checkpoints,
)
from training.config import TrainConfig
from training.engine import Engine
from training.fragment_file import FloatArray, FragmentLayout, check_coverage, write_fragments
from training.fragments import Fragments, parameter_shapes
from training.ranks import Ranks

logger = logging.getLogger(__name__)

_FIRST_POLL_S = 0.02
_LONGEST_POLL_S = 1.0
_NUM_READ_THREADS = 16


class RankReport(Config):
    """What a rank says of its part of a save."""

    file: FileRecord | None
    """Its file; none after a failure."""
    layout: FragmentLayout | None
    error: str | None = None
    """Why it failed."""


class CheckpointWriter:
    """Writes a run's checkpoints; made, used and closed by every rank alike."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        ranks: Ranks,
        fingerprint: Fingerprint,
        training_sets: Sequence[SetRecord] = (),
    ) -> None:
        """Prepare.

        Args:
            config: of the run; enters the record, as the next two do.
            ranks: of the run.
            fingerprint: tokenizer of the codes.
            training_sets: what is trained on.
        """
        self._config, self._ranks = config, ranks
        self._fingerprint, self._training_sets = fingerprint, tuple(training_sets)
        self._storage = open_storage(config.run_dir, s3=config.s3)
        # In the names of the reports, so that none of a killed save is taken for one of ours.
        self._token = ranks.from_first(secrets.token_hex(4))
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._buffer = torch.empty(0)
        self._maker: threading.Thread | None = None

    def prepare(self, engine: Engine) -> None:
        """Begin to make the memory that states are copied to, once, so that the first save need not wait for it.

        Args:
            engine: after a step, which leaves the optimiser's states behind.
        """
        if self._config.checkpoint.background and self._maker is None:
            num_elements = _num_copied(Fragments(engine).layout)
            self._maker = threading.Thread(target=self._make_buffer, args=(num_elements,), name="buffer", daemon=True)
            self._maker.start()

    def save(self, engine: Engine, state: RunState) -> float:
        """Begin the checkpoint of `state` and return the seconds that training stood still for it.

        Waits for the save before it. In the background it returns when the state is copied to memory; else when the
        checkpoint is committed.

        Args:
            engine: after `state.step` steps.
            state: where the run is.

        Raises:
            ArtifactError: this save (in the foreground) or the one before it failed, on any rank.
        """
        began = time.perf_counter()
        self._join()
        fragments = Fragments(engine)
        write = _Write(self._config, storage=self._storage, ranks=self._ranks, token=self._token, state=state)
        record = self._record_of(engine, fragments, state) if self._ranks.is_first else None
        if self._config.checkpoint.background:
            arrays = [self._copied(fragments).numpy()]
            self._thread = threading.Thread(
                target=self._run, args=(write, fragments.layout, arrays, record), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._run(write, fragments.layout, _arrays_of(fragments), record)
            self._raise_together()
        stall_s = time.perf_counter() - began
        if self._ranks.is_first:
            logger.info("checkpoint step=%d stall_s=%.3f", state.step, stall_s)
        return stall_s

    def close(self) -> None:
        """Return when the last save is committed.

        Raises:
            ArtifactError: it failed, on any rank.
        """
        self._join()
        if self._maker is not None:
            self._maker.join()
        self._buffer = torch.empty(0)

    def _join(self) -> None:
        """Wait for the save that is under way on every rank, and raise what failed there."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._raise_together()

    def _raise_together(self) -> None:
        errors = self._ranks.gather(None if self._error is None else str(self._error))
        error, self._error = self._error, None
        if error is not None:
            raise error
        for rank, told in enumerate(errors):
            if told is not None:
                raise _rank_failed(self._storage, rank, told)

    def _copied(self, fragments: Fragments) -> Tensor:
        """Return the fragments in host memory, which is kept for the next save."""
        if self._maker is not None:
            self._maker.join()
        num_elements = _num_copied(fragments.layout)
        if self._buffer.numel() != num_elements:
            self._make_buffer(num_elements)
        fragments.copy_to(self._buffer)
        return self._buffer

    def _make_buffer(self, num_elements: int) -> None:
        has_cuda = torch.cuda.is_available()
        if has_cuda:
            torch.cuda.set_device(self._ranks.device)  # of this thread
        # Zeros, so that the system gives the memory now and not when it is first written to.
        self._buffer = torch.empty(num_elements, pin_memory=has_cuda).zero_()

    def _record_of(self, engine: Engine, fragments: Fragments, state: RunState) -> CheckpointRecord:
        """Return the record but for its files."""
        return CheckpointRecord(
            **state.model_dump(),
            optimizer_steps=fragments.optimizer_steps,
            world_size=self._ranks.world_size,
            zero_stage=self._config.engine.zero_stage,
            kinds=fragments.layout.kinds,
            shapes=parameter_shapes(engine),
            fingerprint=self._fingerprint,
            training_sets=self._training_sets,
            spec=self._config.model_dump(mode="json"),
            packages={name: _version(name) for name in ("torch", "deepspeed", "tensorar")},
            files=(),
        )

    def _run(
        self, write: _Write, layout: FragmentLayout, arrays: Iterable[FloatArray], record: CheckpointRecord | None
    ) -> None:
        try:
            write.write_file(layout, arrays)
            if record is not None:
                write.commit(record)
        except Exception as error:  # raised on every rank by `_raise_together`
            self._error = error


class _Write:
    """One save, as one rank does it, with no collective."""

    def __init__(self, config: TrainConfig, *, storage: Storage, ranks: Ranks, token: str, state: RunState) -> None:
        self._config, self._storage, self._ranks, self._token = config, storage, ranks, token
        self._step = state.step
        self._directory = prepared_name(storage, state.step)
        self._began = time.perf_counter()

    def write_file(self, layout: FragmentLayout, arrays: Iterable[FloatArray]) -> None:
        """Commit this rank's file, then its report; after a failure the report says so."""
        if self._ranks.is_first:
            # On S3 a damaged checkpoint of this step is no checkpoint from now on; elsewhere nothing is there.
            self._storage.remove(f"{self._directory}/{RECORD}")
        name = rank_file_name(self._ranks.rank)
        try:
            with self._storage.stage(f"{self._directory}/{name}") as staged_path:
                written = write_fragments(staged_path, layout, arrays)
        except Exception as error:
            self._report(RankReport(file=None, layout=None, error=str(error)))
            raise
        file = FileRecord(name=name, num_bytes=written.num_bytes, sha256=written.sha256)
        self._report(RankReport(file=file, layout=layout))

    def commit(self, record: CheckpointRecord) -> None:
        """Wait for every rank's report and commit the checkpoint; called by rank 0."""
        reports = self._wait_for_reports()
        layouts = [report.layout for report in reports if report.layout is not None]
        check_coverage(record.shapes, layouts, doing=f"save {self._storage.url_of(checkpoint_name(self._step))}")
        files = tuple(report.file for report in reports if report.file is not None)
        commit_checkpoint(self._storage, record.model_copy(update={"files": files}))
        checkpoint = self._config.checkpoint
        remove_old_checkpoints(
            self._storage,
            keep_latest=checkpoint.keep_latest,
            keep_every_n_steps=checkpoint.keep_every_n_steps,
            newest_step=self._step,
        )
        seconds, num_bytes = time.perf_counter() - self._began, sum(file.num_bytes for file in files)
        logger.info("checkpoint step=%d committed write_s=%.2f bytes=%d", self._step, seconds, num_bytes)

    def _report(self, report: RankReport) -> None:
        # Where the file is local, rank 0 may read the report and rename its directory before the write returns.
        with contextlib.suppress(FileNotFoundError):
            self._storage.write_json(self._report_name(self._ranks.rank), report.model_dump(mode="json"))

    def _read_report(self, rank: int) -> RankReport:
        return RankReport.model_validate_json(self._storage.read_bytes(self._report_name(rank)))

    def _report_name(self, rank: int) -> str:
        return f"{self._directory}/rank_{rank:05d}.{self._token}.json"

    def _wait_for_reports(self) -> list[RankReport]:
        """Return the report of every rank, in rank order.

        Raises:
            ArtifactError: a rank failed, or has not reported long after this one.
        """
        names = [self._report_name(rank) for rank in range(self._ranks.world_size)]
        deadline, pause_s = time.monotonic() + self._config.engine.step_timeout_s, _FIRST_POLL_S
        reports: dict[int, RankReport] = {}
        while True:
            listed = self._storage.list(f"{self._directory}/rank_")
            new = [rank for rank, name in enumerate(names) if name in listed and rank not in reports]
            with ThreadPoolExecutor(_NUM_READ_THREADS) as threads:
                reports |= zip(new, threads.map(self._read_report, new), strict=True)
            for rank in new:
                if (error := reports[rank].error) is not None:
                    raise _rank_failed(self._storage, rank, error)
            if len(reports) == len(names):
                return [reports[rank] for rank in range(len(names))]
            if time.monotonic() > deadline:
                missing = next(rank for rank in range(len(names)) if rank not in reports)
                raise ArtifactError(
                    f"save checkpoint {self._storage.url_of(self._directory)}: every rank must report its file within "
                    f"engine.step_timeout_s = {self._config.engine.step_timeout_s:g} s of rank 0, got none of rank "
                    f"{missing}; check that all ranks see one file system, or raise it"
                )
            time.sleep(pause_s)
            pause_s = min(_LONGEST_POLL_S, 1.5 * pause_s)


def _rank_failed(storage: Storage, rank: int, told: str) -> ArtifactError:
    """Return the error for a save that another rank could not do its part of; what it said names the next action."""
    return ArtifactError(f"save checkpoint in {storage}: rank {rank} failed: {told}")


def _num_copied(layout: FragmentLayout) -> int:
    return len(layout.kinds) * layout.num_elements


def _arrays_of(fragments: Fragments) -> Iterator[FloatArray]:
    """Yield the fragments as numpy arrays, one at a time in host memory."""
    for view in fragments.views():
        yield view.contiguous().cpu().numpy()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
