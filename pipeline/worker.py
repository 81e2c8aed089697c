"""One work unit, from its input files to its ledger record; no Ray in here.

The invariant: what a unit's files contain depends on its input, the spec and the weights, never on the worker, and its
record is written last. Reading and cropping run in a thread ahead of the encoder, which sees full batches that
straddle samples; the thread buys little on one CPU core and hides the crops behind a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.config import RulesConfig, TokenizeConfig
from pipeline.ledger import LedgerRecord, record_path, rejects_path, shard_path, write_record
from pipeline.local_storage import local_path, remove, stage
from pipeline.reading import InputSample, add_to_digest, read_unit
from pipeline.rejects import RULE_STAGE, Reject, count, write_rejects
from pipeline.shards import ShardInfo, ShardReader, ShardSample, ShardWriter, describe_shard, index_path
from pipeline.sources import KeyFormat, WorkUnit, modification_mark
from pipeline.storage import ArtifactError
from tokenization.crops import make_views
from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError
from tokenization.tokenizer import Tokenizer

PREFETCHED_SAMPLES = 16
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """A sample ready to encode: its views as uint8 `(V, H, W, 3)` and the metadata that its shard will hold."""

    key: str
    images_VHWC: npt.NDArray[np.uint8]
    metadata: dict[str, Any]


class UnitTokenizer:
    """Tokenizes work units one after the other with one loaded tokenizer."""

    def __init__(self, config: TokenizeConfig, *, keys: KeyFormat, fingerprint_digest: str) -> None:
        """Load the tokenizer.

        Args:
            config: the job.
            keys: the widths that the plan chose.
            fingerprint_digest: of the tokenizer that the job was started with.

        Raises:
            ArtifactError: the weights that this process sees are others.
        """
        self._config, self._keys = config, keys
        self._run_dir = local_path(config.run_dir)
        self._tokenizer = Tokenizer.load(
            config.tokenizer,
            device="cuda" if config.cluster.gpus_per_worker > 0 else "cpu",
            num_threads=max(1, int(config.cluster.cpus_per_worker)),
        )
        digest = self._tokenizer.fingerprint.digest
        if digest != fingerprint_digest:
            raise ArtifactError(
                f"load tokenizer {config.tokenizer.weights}: fingerprint must be {fingerprint_digest} everywhere, "
                f"got {digest}; copy the same weights to all of them"
            )
        self._num_read = 0

    def num_read(self) -> int:
        """Return how many samples of the unit at hand were read so far; may be called from another thread."""
        return self._num_read

    def run(self, unit: WorkUnit) -> LedgerRecord:
        """Tokenize a unit, commit its shard, index and rejects, then its record; return the record.

        Raises:
            ArtifactError: the input is damaged as a whole; trying again will not help.
        """
        stem = self._keys.stem(unit.unit_index)
        remove(record_path(self._run_dir, stem))  # whatever it vouched for is about to be replaced
        self._num_read = 0
        seconds: defaultdict[str, float] = defaultdict(float)
        rejects: list[Reject] = []
        digest = hashlib.sha256()
        input_mark = modification_mark(unit)
        prepared = _in_thread(self._prepare(unit, rejects=rejects, digest=digest, seconds=seconds))
        with contextlib.closing(prepared):
            shard = self._write_shard(stem, self._encode(prepared, seconds=seconds), seconds=seconds)
        with _timed(seconds, "commit"):
            path = rejects_path(self._run_dir, stem)
            if rejects:
                write_rejects(path, rejects)
            else:
                remove(path)
        record = LedgerRecord(
            unit_index=unit.unit_index,
            unit=unit.name,
            unit_fingerprint=unit.fingerprint,
            input_mark=input_mark,
            input_sha256=digest.hexdigest(),
            fingerprint_digest=self._tokenizer.fingerprint.digest,
            counts=count(rejects, num_written=0 if shard is None else shard.num_samples),
            shard=shard,
            shard_mtime_ns=0 if shard is None else shard_path(self._run_dir, stem).stat().st_mtime_ns,
            seconds_of_stage={name: round(spent, 3) for name, spent in sorted(seconds.items())},
        )
        write_record(self._run_dir, stem, record)
        return record

    def _prepare(
        self, unit: WorkUnit, *, rejects: list[Reject], digest: hashlib._Hash, seconds: defaultdict[str, float]
    ) -> Iterator[PreparedSample]:
        """Yield the usable samples of a unit; the others are added to `rejects`."""
        samples = read_unit(unit)
        while True:
            with _timed(seconds, "read"):
                sample = next(samples, None)
                if sample is None:
                    return
                add_to_digest(digest, sample)
            with _timed(seconds, "crop"):
                key = self._keys.key(unit.unit_index, sample.position)
                prepared = prepare_sample(sample, key=key, config=self._config)
            self._num_read += 1
            if isinstance(prepared, Reject):
                rejects.append(prepared)
            else:
                yield prepared

    def _encode(self, prepared: Iterable[PreparedSample], *, seconds: defaultdict[str, float]) -> Iterator[ShardSample]:
        """Yield the samples with their codes; every batch but the last is full."""
        batch_size, num_views = self._config.tokenizer.batch_size, self._config.views.num_views
        waiting: deque[PreparedSample] = deque()
        images: list[npt.NDArray[np.uint8]] = []
        codes: list[npt.NDArray[np.int32]] = []
        end = object()
        for sample in chain(prepared, [end]):
            if isinstance(sample, PreparedSample):
                waiting.append(sample)
                images.extend(sample.images_VHWC)
            while len(images) >= (batch_size if sample is not end else 1):
                with _timed(seconds, "encode"):
                    codes.extend(self._tokenizer.encode(np.stack(images[:batch_size])))
                del images[:batch_size]
            while waiting and len(codes) >= num_views:
                done = waiting.popleft()
                yield ShardSample(key=done.key, codes_VT=np.stack(codes[:num_views]), metadata=done.metadata)
                del codes[:num_views]

    def _write_shard(
        self, stem: str, samples: Iterator[ShardSample], *, seconds: defaultdict[str, float]
    ) -> ShardInfo | None:
        """Commit the samples as shard and index and describe the shard; without a sample remove an older one."""
        path = shard_path(self._run_dir, stem)
        first = next(samples, None)
        if first is None:
            remove(path)
            remove(index_path(path))
            return None
        with stage(index_path(path)) as staged_index, stage(path) as staged_path:
            keys = []
            with ShardWriter(staged_path, codebook_size=self._tokenizer.codebook_size) as writer:
                for sample in chain([first], samples):
                    writer.add(sample)
                    keys.append(sample.key)
                staged_index.write_bytes(writer.close())
            with _timed(seconds, "commit"):
                _check_staged_shard(staged_path, index=staged_index, keys=keys)
                info = describe_shard(staged_path, name=path.name, num_samples=len(keys))
        return info


def prepare_sample(sample: InputSample, *, key: str, config: TokenizeConfig) -> PreparedSample | Reject:
    """Decode, check and crop one sample.

    Args:
        sample: as it was read.
        key: its key in the set.
        config: the job; its pixel limit, rules, views and image size are used.

    Returns:
        The sample ready to encode, or why it is dropped (stage `rule`) or rejected.
    """
    if sample.problem is not None:
        problem = sample.problem
        return Reject(key=key, source=sample.source, stage=problem.stage, reason=problem.reason, detail=problem.detail)
    try:
        image = decode_image(sample.data, max_pixels=config.max_image_pixels)
        broken = broken_rule(image.width, image.height, rules=config.rules)
        if broken is not None:
            detail = f"{image.width} x {image.height} px"
            return Reject(key=key, source=sample.source, stage=RULE_STAGE, reason=broken, detail=detail)
        views = make_views(image, config=config.views, image_size_px=config.tokenizer.image_size_px)
    except ImageRejectedError as error:
        return Reject(key=key, source=sample.source, stage=error.stage, reason=error.reason, detail=str(error))
    metadata = {
        "caption": sample.caption,
        "label": sample.label,
        "width": image.width,
        "height": image.height,
        "source": sample.source,
        "views": list(views.boxes),
        "extra": sample.extra,
    }
    return PreparedSample(key=key, images_VHWC=views.images_VHWC, metadata=metadata)


def broken_rule(width_px: int, height_px: int, *, rules: RulesConfig) -> str | None:
    """Return the name of the first rule that an image of this size breaks, or None."""
    short, long = sorted((width_px, height_px))
    if short < rules.min_side_px:
        return "min_side_px"
    if rules.max_aspect_ratio is not None and long > rules.max_aspect_ratio * short:
        return "max_aspect_ratio"
    return None


def _check_staged_shard(path: Path, *, index: Path, keys: list[str]) -> None:
    """Read a staged shard back and compare its keys, so that a write that went wrong is never committed."""
    reader = ShardReader(path, index=index)
    found = [reader.sample(position).key for position in range(reader.num_samples)]
    if found != keys:
        raise OSError(
            f"write shard {path}: {len(keys)} samples must read back, got {len(found)} others; check the disk"
        )


@contextlib.contextmanager
def _timed(seconds: defaultdict[str, float], stage_name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage_name] += time.perf_counter() - start


def _in_thread(values: Iterator[_T]) -> Generator[_T, None, None]:
    """Yield `values`, in order, from a thread that runs ahead; its error is raised here, closing this stops it."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=PREFETCHED_SAMPLES)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return

    def produce() -> None:
        try:
            for value in values:
                put("value", value)
                if stopped.is_set():
                    return
            put("end", None)
        except Exception as error:  # handed to the consumer
            put("error", error)

    thread = threading.Thread(target=produce, name="prepare", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()
