"""One work unit, from its input files to its ledger record; no Ray in here.

The invariant: what a unit's files contain depends on its input, the spec and the weights, never on the worker, and its
record is written last, once its counts add up to what was read. Reading, decoding and cropping run in threads ahead of
the encoder where a worker has cores for them; the encoder sees full batches that straddle samples. A worker may hold
two units, so that one is committed (fsync, upload) while the next encodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.ahead import prepared_ahead
from pipeline.config import TokenizeConfig
from pipeline.ledger import LedgerRecord, Retried, index_name, rejects_name, shard_name, write_record
from pipeline.prepare import PreparedSample, prepare_sample
from pipeline.rejects import Counts, Reject, count, write_rejects
from pipeline.retry import RetryDetails, RetrySource, max_image_pixels_of
from pipeline.shards import ShardInfo, ShardSample, ShardWriter, check_written
from pipeline.sources.plan import KeyFormat, WorkUnit
from pipeline.sources.registry import make_source
from pipeline.sources.sample import InputSample, add_to_digest
from pipeline.storage import ArtifactError, open_storage
from tokenization.tokenizer import Tokenizer

SAMPLES_PER_GROUP = 16
NUM_GROUPS_AHEAD = 4
IMAGES_IN_A_ROW = 128
"""Images that a worker of one core prepares before it encodes them, batch after batch: the first batch after other work
finds the encoder's weights and code out of the caches."""
SWITCH_INTERVAL_S = 0.0005
"""How long a Python thread may keep the others waiting; with the default 5 ms, decoding would starve the encoder."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A unit that was committed: its record and the mark of the record's file."""

    record: LedgerRecord
    record_mark: str


@dataclass(kw_only=True)
class _Unit:
    """A unit under way: what was read of it, where its samples went, and the seconds it took."""

    unit: WorkUnit
    stem: str
    num_read: int = 0
    rejects: list[Reject] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def timed(self, stage_name: str) -> Iterator[None]:
        """Add the seconds that the body takes to a stage; may be used in several threads."""
        start = time.perf_counter()
        yield
        with self.lock:
            self.seconds[stage_name] += time.perf_counter() - start


class UnitTokenizer:
    """Tokenizes work units with one loaded tokenizer; `run` may be called from two threads."""

    def __init__(
        self, config: TokenizeConfig, *, keys: KeyFormat, fingerprint_digest: str, directory: str | None = None
    ) -> None:
        """Load the tokenizer.

        Args:
            config: the job.
            keys: the widths that the plan chose.
            fingerprint_digest: of the tokenizer that the job was started with.
            directory: what the spec's relative paths start from, where this machine has it; None leaves it.

        Raises:
            ArtifactError: the weights that this process sees are others.
            RuntimeError: the network does not run here.
        """
        if directory is not None and Path(directory).is_dir():
            os.chdir(directory)
        self._config, self._keys = config, keys
        num_threads = max(1, int(config.cluster.cpus_per_worker))
        self._storage = open_storage(config.run_dir, s3=config.s3)
        self._source = RetrySource(make_source(config.source, s3=config.s3))
        self._tokenizer = Tokenizer.load(
            config.tokenizer,
            device="cuda" if config.cluster.gpus_per_worker > 0 else "cpu",
            num_threads=num_threads,
        )
        digest = self._tokenizer.fingerprint.digest
        if digest != fingerprint_digest:
            raise ArtifactError(
                f"load tokenizer {config.tokenizer.weights}: fingerprint must be {fingerprint_digest} everywhere, "
                f"got {digest}; copy the same weights to all of them"
            )
        self._run_once()
        # On one core with the encoder a thread only takes turns with it, and each turn costs both.
        has_own_core = config.cluster.gpus_per_worker > 0 or num_threads > 1
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare") if has_own_core else None
        self._encoder = threading.Lock()
        self._running: dict[int, _Unit] = {}
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def _run_once(self) -> None:
        """Encode a blank image: what the network lacks, memory or a compiler, shows here, where no unit is to blame."""
        tokenizer = self._config.tokenizer
        blank_NHWC = np.zeros((1, tokenizer.image_size_px, tokenizer.image_size_px, 3), dtype=np.uint8)
        try:
            self._tokenizer.encode(blank_NHWC)
        except Exception as error:  # of any kind: torch's, the compiler's, the driver's
            reason = next(iter(str(error).strip().splitlines()), "")
            raise RuntimeError(
                f"encode a first batch: tokenizer {tokenizer.weights} must run with batch_size {tokenizer.batch_size}, "
                f"dtype {tokenizer.dtype}, compile_mode {tokenizer.compile_mode}, got {type(error).__name__}: "
                f"{reason}; mend that or change the setting"
            ) from error

    def num_read(self) -> int:
        """Return how many samples of the units at hand were read so far; may be called from another thread."""
        return sum(under_way.num_read for under_way in list(self._running.values()))

    def run(self, unit: WorkUnit) -> Finished:
        """Tokenize a unit, commit its shard, index and rejects, then its record.

        Raises:
            ArtifactError: the input is damaged as a whole; trying again will not help.
            RuntimeError: a sample that was read is neither in the shard nor among the rejects, or is there twice.
        """
        under_way = _Unit(unit=unit, stem=self._keys.stem(unit.unit_index))
        self._running[unit.unit_index] = under_way
        try:
            return self._run(under_way)
        finally:
            del self._running[unit.unit_index]

    def _run(self, under_way: _Unit) -> Finished:
        unit, stem = under_way.unit, under_way.stem
        with self._prepared(under_way) as prepared:
            shard, mark = self._write_shard(under_way, self._encode(under_way, prepared))
        if under_way.rejects:
            with under_way.timed("commit"):
                write_rejects(self._storage, rejects_name(stem), under_way.rejects)
        record = LedgerRecord(
            unit_index=unit.unit_index,
            unit=unit.name,
            unit_fingerprint=unit.fingerprint,
            input_mark=unit.mark,
            input_sha256=under_way.digest.hexdigest(),
            fingerprint_digest=self._tokenizer.fingerprint.digest,
            counts=_counts(under_way, num_written=0 if shard is None else shard.num_samples),
            shard=shard,
            shard_mark=mark,
            seconds_of_stage={name: round(spent, 3) for name, spent in sorted(under_way.seconds.items())},
            retried=_retried(unit, keys=self._keys),
        )
        return Finished(record=record, record_mark=write_record(self._storage, stem, record).mark)

    def _prepared(self, under_way: _Unit) -> AbstractContextManager[Iterator[PreparedSample | Reject]]:
        """Return a context with the samples of a unit, prepared in threads ahead of it where it has cores for them."""
        samples = self._read(under_way)
        if self._threads is None:
            groups = iter(lambda: list(islice(samples, SAMPLES_PER_GROUP)), [])
            return contextlib.nullcontext(one for group in groups for one in self._prepare(under_way, group))
        return prepared_ahead(
            samples,
            lambda group: self._prepare(under_way, group),
            threads=self._threads,
            group_size=SAMPLES_PER_GROUP,
            num_groups_ahead=NUM_GROUPS_AHEAD,
        )

    def _read(self, under_way: _Unit) -> Iterator[InputSample]:
        samples = self._source.read(under_way.unit)
        while True:
            with under_way.timed("read"):
                sample = next(samples, None)
                if sample is None:
                    return
                add_to_digest(under_way.digest, sample)
            under_way.num_read += 1
            yield sample

    def _prepare(self, under_way: _Unit, samples: list[InputSample]) -> list[PreparedSample | Reject]:
        unit, limit = under_way.unit, max_image_pixels_of(under_way.unit, config=self._config)
        with under_way.timed("crop"):
            return [
                prepare_sample(
                    sample,
                    key=self._keys.key(unit.unit_index, sample.position),
                    config=self._config,
                    max_image_pixels=limit,
                )
                for sample in samples
            ]

    def _encode(self, under_way: _Unit, prepared: Iterable[PreparedSample | Reject]) -> Iterator[ShardSample]:
        """Yield the usable samples with their codes; every batch but the last is full. Rejects are put aside."""
        batch_size, num_views = self._config.tokenizer.batch_size, self._config.views.num_views
        in_a_row = batch_size * (1 if self._threads is not None else max(1, IMAGES_IN_A_ROW // batch_size))
        waiting: deque[PreparedSample] = deque()
        images: list[npt.NDArray[np.uint8]] = []
        codes: list[npt.NDArray[np.int32]] = []
        for sample in chain(prepared, [None]):
            if isinstance(sample, Reject):
                under_way.rejects.append(sample)
                continue
            if sample is not None:
                waiting.append(sample)
                images.extend(sample.images_VHWC)
            while images and (sample is None or len(images) >= in_a_row):
                with under_way.timed("encode"):
                    codes.extend(self._tokenizer.encode(np.stack(images[:in_a_row])))
                del images[:in_a_row]
            while waiting and len(codes) >= num_views:
                done = waiting.popleft()
                yield ShardSample(key=done.key, codes_VT=np.stack(codes[:num_views]), metadata=done.metadata)
                del codes[:num_views]

    def _write_shard(self, under_way: _Unit, samples: Iterator[ShardSample]) -> tuple[ShardInfo | None, str]:
        """Commit the samples as index and shard; return what the shard is and its mark, or none without a sample."""
        name = shard_name(under_way.stem)
        with contextlib.ExitStack() as staged:
            with self._encoder:  # one unit encodes while the other is committed
                first = next(samples, None)
                if first is None:
                    return None, ""
                staged_path = staged.enter_context(self._storage.stage(name))
                with ShardWriter(staged_path, codebook_size=self._tokenizer.codebook_size) as writer:
                    for sample in chain([first], samples):
                        writer.add(sample)
                    written = writer.close()
            with under_way.timed("commit"):
                check_written(staged_path, written)
                self._storage.write_bytes(index_name(under_way.stem), written.index)
                staged.close()  # commits the shard
        committed = self._storage.find(name)
        if committed is None:
            raise OSError(f"write shard {self._storage.url_of(name)}: it must be there once committed, got nothing")
        return written.info(name=name.rpartition("/")[2]), committed.mark


def _counts(under_way: _Unit, *, num_written: int) -> Counts:
    """Return where the samples of a unit went, having compared their sum with what was read."""
    counts = count(under_way.rejects, num_written=num_written)
    if counts.num_read != under_way.num_read:
        raise RuntimeError(
            f"tokenize unit {under_way.stem} ({under_way.unit.name}): every sample that was read must be written, "
            f"dropped or rejected, got {counts.num_read} of {under_way.num_read}; this is a defect of tensorar, report "
            "it"
        )
    return counts


def _retried(unit: WorkUnit, *, keys: KeyFormat) -> Retried | None:
    if not isinstance(unit.details, RetryDetails):
        return None
    planned = unit.details.planned
    return Retried(
        keys=planned.keys,
        rejected_by_reason=planned.rejected_by_reason,
        inputs={keys.stem(of_input.unit_index): of_input.fingerprint for of_input, _ in unit.details.picks},
    )
