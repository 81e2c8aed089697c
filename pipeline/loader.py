"""Shards -> batches of codes: which sample comes when, and the reading of it.

Invariant: the order is a pure function of (seed, epoch), global batch n holds the same samples for every world size,
and the loader's whole state is one integer, the samples consumed so far. Within an epoch no sample is dropped or
repeated; a batch may straddle epochs. The shuffle is a permutation of shards and then one inside windows of
`shuffle_window_shards` shards, so that resuming anywhere opens O(window) shards, at the price of a local shuffle.
Small sets (<= 256 MB of codes) are remembered after their first read: about 30 us a sample then, nothing later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config import LoaderConfig
from pipeline.ledger import Manifest, read_manifest
from pipeline.philox import Int64Array, Purpose, permutation, random_words
from pipeline.shards import ShardReader, open_shard
from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.fingerprint import Fingerprint

NO_LABEL = -1
_MAX_CACHE_BYTES = 256 * 2**20
_MAX_OPEN_SHARDS = 64


class EpochOrder:
    """The order of one epoch: position in the epoch -> sample index; no I/O.

    A sample index counts the samples of the set in shard order.
    """

    def __init__(self, samples_per_shard: Sequence[int], *, seed: int, epoch: int, window_shards: int) -> None:
        """Plan the epoch in O(shards); windows are permuted when they are first asked for."""
        self._seed, self._epoch, self._window_shards = seed, epoch, window_shards
        counts = np.asarray(samples_per_shard, dtype=np.int64)
        self._shard_starts = np.concatenate(([0], np.cumsum(counts)))
        self._shard_order = permutation(len(counts), seed=seed, purpose=Purpose.SHARD_ORDER, stream=epoch)
        window_bounds = np.concatenate(([0], np.cumsum(counts[self._shard_order])))[::window_shards]
        self._window_starts = window_bounds[window_bounds < self._shard_starts[-1]]
        self._window = lru_cache(maxsize=2)(self._permute_window)

    def sample_indices(self, positions: Int64Array) -> Int64Array:
        """Return the sample index at each position of the epoch; `positions` in [0, samples of the set)."""
        windows = np.searchsorted(self._window_starts, positions, side="right") - 1
        result = np.empty_like(positions)
        for window in np.unique(windows):
            chosen = windows == window
            result[chosen] = self._window(int(window))[positions[chosen] - self._window_starts[window]]
        return result

    def _permute_window(self, window: int) -> Int64Array:
        shards = self._shard_order[window * self._window_shards : (window + 1) * self._window_shards]
        indices = np.concatenate([np.arange(self._shard_starts[s], self._shard_starts[s + 1]) for s in shards])
        first = int(self._window_starts[window])
        order = permutation(
            len(indices), seed=self._seed, purpose=Purpose.SAMPLE_ORDER, stream=self._epoch, first_counter=first
        )
        return indices[order]


def rank_slice(*, global_batch_size: int, rank: int, world_size: int) -> slice:
    """Return the contiguous run of a global batch that a rank reads.

    Raises:
        ValueError: the global batch does not divide by the world size.
    """
    if global_batch_size % world_size:
        raise ValueError(
            f"loader: global_batch_size must be a multiple of world_size {world_size}, got {global_batch_size}; "
            f"use {max(1, global_batch_size // world_size) * world_size}"
        )
    size = global_batch_size // world_size
    return slice(rank * size, (rank + 1) * size)


def draw_views(sample_indices: Int64Array, *, num_views: int, seed: int, epoch: int) -> Int64Array:
    """Return the view of each sample in this epoch, uniform in [0, num_views): a draw of (seed, epoch, sample)."""
    words = random_words(seed=seed, purpose=Purpose.VIEW, stream=epoch, counters=sample_indices)
    return (((words >> np.uint64(32)) * np.uint64(num_views)) >> np.uint64(32)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch; B samples of T codes."""

    codes_BT: Int64Array
    """Codes in raster order."""
    labels_B: Int64Array
    """Class labels; `NO_LABEL` (-1) where a sample has none."""
    sample_indices_B: Int64Array
    """Positions of the samples in the shard set."""
    counters_B: Int64Array
    """Positions in the stream of all samples ever consumed: unique over a run, the counters of noise draws."""
    position: int
    """Samples consumed over all ranks before this global batch."""


class ShardSet:
    """A committed shard set with random access to its samples."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        """Use `ShardSet.open`."""
        self._storage, self.manifest = storage, manifest
        self.samples_per_shard = [shard.num_samples for shard in manifest.shards]
        self._starts = np.concatenate(([0], np.cumsum(self.samples_per_shard))).astype(np.int64)
        self._reader = lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._open_reader)
        self._cache: _Cache | None = None

    @classmethod
    def open(cls, path: str | Path, *, fingerprint: Fingerprint | None = None) -> ShardSet:
        """Return the shard set in `path`.

        Args:
            path: the `run_dir` of a finished tokenize job.
            fingerprint: of the tokenizer that the codes must come from; none accepts any.

        Raises:
            ArtifactError: no manifest, no samples, or another tokenizer's codes.
        """
        storage = open_storage(str(path))
        manifest = read_manifest(storage)
        if manifest.num_samples == 0:
            raise ArtifactError(f"open shard set {path}: it must hold samples, got 0; check its rejects/")
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise ArtifactError(
                f"open shard set {path}: tokenizer fingerprint must be {fingerprint.digest}, got "
                f"{manifest.fingerprint.digest}; tokenize both sets with the same tokenizer section"
            )
        return cls(storage, manifest)

    @property
    def url(self) -> str:
        """Where the set is, for messages."""
        return self._storage.url

    @property
    def num_samples(self) -> int:
        """Samples of the set."""
        return int(self.manifest.num_samples)

    @property
    def num_views(self) -> int:
        """Views of every sample."""
        return int(self.manifest.num_views)

    @property
    def codebook_size(self) -> int:
        """Codes of the tokenizer that wrote the set."""
        return int(self.manifest.fingerprint.network.codebook_size)

    @property
    def codes_per_image(self) -> int:
        """T, the codes of every view."""
        return int(self.manifest.codes_per_image)

    def read(self, sample_index: int) -> tuple[npt.NDArray[np.integer], int]:
        """Return the codes `(V, T)` and the label of one sample; `NO_LABEL` where it has none.

        Raises:
            ArtifactError: a code is not in the codebook, or the label is not a whole number >= 0.
        """
        shard = int(np.searchsorted(self._starts, sample_index, side="right")) - 1
        sample = self._reader(shard).sample(sample_index - int(self._starts[shard]))
        where = f"read sample {sample.key} of {self._storage.url_of(f'shards/{self.manifest.shards[shard].name}')}"
        codes_VT, label = sample.codes_VT, sample.metadata.get("label")
        if codes_VT.shape != (self.num_views, self.codes_per_image):
            wanted = f"({self.num_views}, {self.codes_per_image})"
            raise ArtifactError(f"{where}: codes must be (views, T) = {wanted}, got {codes_VT.shape}; tokenize again")
        if codes_VT.min() < 0 or codes_VT.max() >= self.codebook_size:
            bad = codes_VT.max() if codes_VT.max() >= self.codebook_size else codes_VT.min()
            raise ArtifactError(f"{where}: codes must be in [0, {self.codebook_size}), got {bad}; tokenize again")
        if label is not None and (not isinstance(label, int) or label < 0):
            raise ArtifactError(f"{where}: label must be a whole number >= 0, got {label!r}; mend the source")
        return codes_VT, NO_LABEL if label is None else label

    def read_batch(self, sample_indices: Int64Array, *, views: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the codes `(B, T)` of one view of each sample and the labels `(B,)`, both int64."""
        if self._cache is None:
            codes_VT, _ = self.read(int(sample_indices[0]))
            fits = codes_VT.nbytes * self.num_samples <= _MAX_CACHE_BYTES
            self._cache = _Cache(self.num_samples if fits else 0, like=codes_VT)
        return self._cache.read_batch(self, sample_indices, views=views)

    def _open_reader(self, shard: int) -> ShardReader:
        return open_shard(self._storage, f"shards/{self.manifest.shards[shard].name}")


class _Cache:
    """Samples read so far; with room for none it only gathers a batch."""

    def __init__(self, num_samples: int, *, like: npt.NDArray[np.integer]) -> None:
        self._codes_NVT = np.empty((num_samples, *like.shape), dtype=like.dtype)
        self._labels_N = np.empty(num_samples, dtype=np.int64)
        self._is_read_N = np.zeros(num_samples, dtype=bool)

    def read_batch(
        self, shard_set: ShardSet, sample_indices: Int64Array, *, views: Int64Array
    ) -> tuple[Int64Array, Int64Array]:
        if not len(self._is_read_N):
            samples = [shard_set.read(int(index)) for index in sample_indices]
            codes = np.stack([codes_VT[view] for (codes_VT, _), view in zip(samples, views, strict=True)])
            return codes.astype(np.int64), np.array([label for _, label in samples], dtype=np.int64)
        for index in np.unique(sample_indices[~self._is_read_N[sample_indices]]):
            self._codes_NVT[index], self._labels_N[index] = shard_set.read(int(index))
            self._is_read_N[index] = True
        return self._codes_NVT[sample_indices, views].astype(np.int64), self._labels_N[sample_indices]


class Loader:
    """Batches of one rank, addressed by the samples consumed before them."""

    def __init__(
        self,
        shard_set: ShardSet,
        *,
        config: LoaderConfig,
        global_batch_size: int,
        rank: int,
        world_size: int,
        num_classes: int | None = None,
    ) -> None:
        """Check the batch shape; nothing is read yet.

        Args:
            shard_set: where samples come from.
            config: order.
            global_batch_size: samples per step over all ranks.
            rank: in [0, world_size).
            world_size: ranks that share a global batch.
            num_classes: labels must be below it; none checks nothing.
        """
        self._shard_set, self._config, self._num_classes = shard_set, config, num_classes
        self._slice = rank_slice(global_batch_size=global_batch_size, rank=rank, world_size=world_size)
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def batch(self, position: int) -> Batch:
        """Return this rank's part of the global batch that begins after `position` samples.

        Raises:
            ArtifactError: a sample is damaged, or its label is not below `num_classes`.
        """
        counters = np.arange(position + self._slice.start, position + self._slice.stop, dtype=np.int64)
        epochs, positions = np.divmod(counters, self._shard_set.num_samples)
        indices, views = np.empty_like(counters), np.empty_like(counters)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._order(int(epoch)).sample_indices(positions[chosen])
            views[chosen] = draw_views(
                indices[chosen], num_views=self._shard_set.num_views, seed=self._config.seed, epoch=int(epoch)
            )
        codes_BT, labels_B = self._shard_set.read_batch(indices, views=views)
        self._check_labels(labels_B)
        return Batch(
            codes_BT=codes_BT, labels_B=labels_B, sample_indices_B=indices, counters_B=counters, position=position
        )

    def _order_of_epoch(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            self._shard_set.samples_per_shard,
            seed=self._config.seed,
            epoch=epoch,
            window_shards=self._config.shuffle_window_shards,
        )

    def _check_labels(self, labels_B: Int64Array) -> None:
        if self._num_classes is not None and labels_B.max() >= self._num_classes:
            raise ArtifactError(
                f"read shard set {self._shard_set.url}: labels must be below model.num_classes = {self._num_classes}, "
                f"got {labels_B.max()}; raise model.num_classes"
            )
