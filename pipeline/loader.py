"""Shards -> batches of codes for one rank, at any position of a run.

Invariant: global batch n holds the same samples for every world size, and the loader's whole state is one integer, the
samples consumed so far: the mixture's turns, the order of each part and the choice of a replacement are functions of it
(`pipeline.mixture`, `pipeline.order`). A batch may straddle epochs. A thread reads `read_ahead_batches` ahead, others
open the shards of the next window, so a step waits for data only where storage is slower than training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from pipeline.config import LoaderConfig, S3Config
from pipeline.mixture import MixtureSchedule
from pipeline.open_shards import NUM_THREADS
from pipeline.order import DrawnSamples, Place, SampleStream, draw_replacements, rank_slice
from pipeline.philox import Int64Array
from pipeline.read_ahead import ReadAhead
from pipeline.sample_labels import NO_LABEL
from pipeline.shard_cache import GB, ShardCache, default_directory
from pipeline.shard_set import ReadSamples, ShardSet
from pipeline.storage import S3_SCHEME, ArtifactError

__all__ = ["NO_LABEL", "Batch", "Loader", "ShardSet", "check_room", "open_cache", "open_parts"]

MAX_REPLACEMENTS = 64
"""Samples that are tried in place of a damaged one before the run fails: its shard is then more hole than data."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch; B samples of T codes."""

    codes_BT: Int64Array
    """Codes in raster order."""
    labels_B: Int64Array
    """Class labels; `NO_LABEL` (-1) where a sample has none."""
    parts_B: Int64Array
    """Which shard set of the mixture each sample comes from; 0 without a mixture."""
    sample_indices_B: Int64Array
    """Positions of the samples in their shard sets; of a replaced sample, that of the one in its place."""
    counters_B: Int64Array
    """Positions in the stream of all samples ever consumed: unique over a run, the counters of noise draws."""
    position: int
    """Samples consumed over all ranks before this global batch."""
    num_replaced: int
    """Damaged samples that others stand for."""


class Loader:
    """Batches of one rank, addressed by the samples consumed before them."""

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        *,
        config: LoaderConfig,
        global_batch_size: int,
        rank: int,
        world_size: int,
        num_classes: int | None = None,
    ) -> None:
        """Check the batch shape; nothing is read yet.

        Args:
            shard_sets: the parts of `config`, in order, as `open_parts` returns them.
            config: order.
            global_batch_size: samples per step over all ranks.
            rank: in [0, world_size).
            world_size: ranks that share a global batch.
            num_classes: labels must be below it; none checks nothing.
        """
        if len(shard_sets) != len(config.parts):
            raise ValueError(f"loader: there must be a shard set for each part of the mixture, got {len(shard_sets)}")
        self._config, self._num_classes, self._rank = config, num_classes, rank
        self._slice = rank_slice(global_batch_size=global_batch_size, rank=rank, world_size=world_size)
        self._schedule = MixtureSchedule([part.weight for part in config.parts])
        self._parts = [
            _Part(shard_set, config=config, number=number, rank=rank) for number, shard_set in enumerate(shard_sets)
        ]
        self._ahead: ReadAhead[Batch] | None = None
        if config.read_ahead_batches:
            self._ahead = ReadAhead(self._read, step=global_batch_size, depth=config.read_ahead_batches)

    def batch(self, position: int) -> Batch:
        """Return this rank's part of the global batch that begins after `position` samples.

        Raises:
            ArtifactError: a sample is damaged and may not be replaced, or its label is not below `num_classes`.
        """
        return self._read(position) if self._ahead is None else self._ahead.take(position)

    def sample_names(self, batch: Batch) -> list[str]:
        """Return what a person finds each sample of a batch by: the URL of its shard and its key."""
        places = zip(batch.parts_B.tolist(), batch.sample_indices_B.tolist(), strict=True)
        return [self._parts[part].shard_set.sample_name(index) for part, index in places]

    def close(self) -> None:
        """End all threads and close the shards; only `sample_names` may be called then."""
        if self._ahead is not None:
            self._ahead.close()
        for part in self._parts:
            part.shard_set.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, position: int) -> Batch:
        size = self._slice.stop - self._slice.start
        turns = self._schedule.turns(position + self._slice.start, size)
        codes_BT = np.empty((size, self._parts[0].shard_set.codes_per_image), dtype=np.int64)
        labels_B, indices_B = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        num_replaced = 0
        for number, part in enumerate(self._parts):
            own = np.flatnonzero(turns.parts_N == number)
            if len(own):
                samples, indices_B[own] = part.read(turns.positions_N[own])
                if len(own) == size:
                    codes_BT = samples.codes_BT  # the largest copy of a step, saved
                else:
                    codes_BT[own] = samples.codes_BT
                labels_B[own] = samples.labels_B
                num_replaced += len(samples.damages)
                if self._num_classes is not None:
                    check_labels(
                        samples.labels_B, indices_B[own], shard_set=part.shard_set, num_classes=self._num_classes
                    )
        return Batch(
            codes_BT=codes_BT,
            labels_B=labels_B,
            parts_B=turns.parts_N,
            sample_indices_B=indices_B,
            counters_B=np.arange(position + self._slice.start, position + self._slice.stop, dtype=np.int64),
            position=position,
            num_replaced=num_replaced,
        )


def check_labels(labels_B: Int64Array, indices_B: Int64Array, *, shard_set: ShardSet, num_classes: int) -> None:
    """Raise ArtifactError naming the sample with the largest label where that is no class of the model."""
    if labels_B.max() >= num_classes:
        name = shard_set.sample_name(int(indices_B[labels_B.argmax()]))
        raise ArtifactError(
            f"read sample {name}: labels must be below model.num_classes = {num_classes}, got {labels_B.max()}; raise "
            "model.num_classes (a run that has begun keeps its own: in a new run_dir), or take another set"
        )


class _Part:
    """One shard set of a loader, in its order."""

    def __init__(self, shard_set: ShardSet, *, config: LoaderConfig, number: int, rank: int) -> None:
        self.shard_set = shard_set
        self._config, self._number, self._rank = config, number, rank
        self._stream = SampleStream(
            shard_set.samples_per_shard,
            num_views=shard_set.num_views,
            seed=config.seed,
            window_shards=config.shuffle_window_shards,
            part=number,
        )
        self._expected: Place | None = None

    def read(self, positions: Int64Array) -> tuple[ReadSamples, Int64Array]:
        """Return the samples at positions of the part's stream, damaged ones replaced, and their sample indices."""
        self._expect_shards(int(positions[0]))
        drawn = self._stream.draw(positions)
        samples = self.shard_set.try_read_batch(drawn.indices_N, views=drawn.views_N)
        indices = drawn.indices_N.copy()
        for place, error in sorted(samples.damages.items()):
            if self._config.on_damage == "fail":
                raise error
            indices[place] = self._replace(samples, drawn, place, error)
        return samples, indices

    def _replace(self, samples: ReadSamples, drawn: DrawnSamples, place: int, error: ArtifactError) -> int:
        """Put another sample of the same shard, which is open, in a damaged one's place; return its index."""
        damaged, view = int(drawn.indices_N[place]), drawn.views_N[place : place + 1]
        candidates = self.shard_set.samples_of_shard_with(damaged)
        tried = draw_replacements(
            damaged,
            num_candidates=len(candidates),
            count=MAX_REPLACEMENTS,
            seed=self._config.seed,
            epoch=int(drawn.epochs_N[place]),
            part=self._number,
        )
        for index in (candidates.start + tried).tolist():
            found = self.shard_set.try_read_batch(np.array([index], dtype=np.int64), views=view)
            if not found.damages:
                samples.codes_BT[place], samples.labels_B[place] = found.codes_BT[0], found.labels_B[0]
                logger.warning("replaced a damaged sample by %s: %s", self.shard_set.sample_name(index), error)
                return int(index)
        raise error

    def _expect_shards(self, position: int) -> None:
        """Have the shards of the window at a position of the stream, and of the one after it, opened in time."""
        place = self._stream.place(position)
        if place != self._expected:
            self._expected = place
            shards = self._stream.shards_from(place)
            # Each rank of a machine begins with others, so that they download different shards into their cache.
            self.shard_set.expect(np.roll(shards, -NUM_THREADS * self._rank).tolist())


def open_parts(config: LoaderConfig, *, s3: S3Config, cache: ShardCache | None = None) -> tuple[ShardSet, ...]:
    """Return the shard sets of a loader in the order of the mixture.

    Args:
        config: of the loader.
        s3: how S3 is reached.
        cache: for shards on S3; see `open_cache`.

    Raises:
        ArtifactError: a set cannot be used, or two are of different tokenizers.
    """
    sets = tuple(
        ShardSet.open(part.shards, s3=s3, cache=cache, window_shards=config.shuffle_window_shards)
        for part in config.parts
    )
    for other in sets[1:]:
        if other.fingerprint != sets[0].fingerprint:
            raise ArtifactError(
                f"open mixture of {sets[0].url} and {other.url}: all codes must come from one tokenizer, got "
                f"{sets[0].fingerprint.digest} and {other.fingerprint.digest}; tokenize both with the same tokenizer "
                f"section"
            )
    return sets


def open_cache(config: LoaderConfig, *, urls: Sequence[str]) -> ShardCache | None:
    """Return the cache for the shard sets at `urls`; None where all of them are local."""
    if not any(url.startswith(S3_SCHEME) for url in urls):
        return None
    directory = default_directory() if config.cache_dir is None else Path(config.cache_dir).expanduser()
    return ShardCache(directory, max_bytes=int(config.max_cache_gb * GB))


def check_room(
    shard_sets: Sequence[ShardSet],
    *,
    cache: ShardCache,
    config: LoaderConfig,
    global_batch_size: int,
    is_here: bool = True,
) -> None:
    """See that the cache has room for all that these sets keep open, so that no rank waits for another's shards.

    Args:
        shard_sets: those that are read side by side.
        cache: theirs.
        config: of their loader.
        global_batch_size: samples per step over all ranks.
        is_here: whether this machine has the cache's disk.

    Raises:
        ArtifactError: it has not.
    """
    # No rank begins a step before the others, but each reads ahead.
    samples_apart = (1 + config.read_ahead_batches) * global_batch_size
    needed = sum(shard_set.most_cached_bytes(samples_apart=samples_apart) for shard_set in shard_sets)
    if needed > cache.max_bytes:
        raise ArtifactError(
            f"open shard cache {cache.directory}: data.max_cache_gb must be at least {needed / GB:.3g}, for the "
            f"largest shards that may be open together, got {cache.max_bytes / GB:.3g}; raise it or lower "
            f"data.shuffle_window_shards"
        )
    if is_here and needed > (disk_bytes := cache.disk_bytes()):
        raise ArtifactError(
            f"open shard cache {cache.directory}: its disk must have room for {needed / GB:.3g} GB, the largest shards "
            f"that may be open together, got {disk_bytes / GB:.3g}; free some space, set data.cache_dir or lower "
            f"data.shuffle_window_shards"
        )
