"""Which sample of a shard set comes when: index arithmetic, no I/O.

Invariant: the order is a pure function of (seed, part, epoch), and within an epoch no sample is dropped or repeated.
The shuffle is a permutation of shards and then one inside windows of `window_shards` shards, so that any position is
found in O(window), at the price of a local shuffle: about 0.2 us per sample of a window and of each shard of the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.philox import Int64Array, Purpose, permutation, random_words

_PART_SHIFT = 40
"""Epochs of a part take the low bits of a draw's stream, its number in the mixture the bits above them."""


class EpochOrder:
    """The order of one epoch: position in the epoch -> sample index.

    A sample index counts the samples of the set in shard order.
    """

    def __init__(
        self, samples_per_shard: npt.ArrayLike, *, seed: int, epoch: int, window_shards: int, part: int = 0
    ) -> None:
        """Plan the epoch in O(shards); windows are permuted when they are first asked for."""
        self._seed, self._window_shards = seed, window_shards
        self._stream = _stream(part=part, epoch=epoch)
        counts = np.asarray(samples_per_shard, dtype=np.int64)
        self._shard_starts = np.concatenate(([0], np.cumsum(counts)))
        self._shard_order = permutation(len(counts), seed=seed, purpose=Purpose.SHARD_ORDER, stream=self._stream)
        window_bounds = np.concatenate(([0], np.cumsum(counts[self._shard_order])))[::window_shards]
        self._window_starts = window_bounds[window_bounds < self._shard_starts[-1]]
        self._window = lru_cache(maxsize=2)(self._permute_window)

    @property
    def num_windows(self) -> int:
        """Windows of the epoch."""
        return len(self._window_starts)

    def window_of(self, position: int) -> int:
        """Return the window that holds a position of the epoch."""
        return int(np.searchsorted(self._window_starts, position, side="right")) - 1

    def shards_of_window(self, window: int) -> Int64Array:
        """Return the shards whose samples a window holds, at most `window_shards`."""
        return self._shard_order[window * self._window_shards : (window + 1) * self._window_shards]

    def sample_indices(self, positions: Int64Array) -> Int64Array:
        """Return the sample index at each position of the epoch; `positions` in [0, samples of the set)."""
        windows = np.searchsorted(self._window_starts, positions, side="right") - 1
        result = np.empty_like(positions)
        for window in np.unique(windows):
            chosen = windows == window
            result[chosen] = self._window(int(window))[positions[chosen] - self._window_starts[window]]
        return result

    def _permute_window(self, window: int) -> Int64Array:
        shards = self.shards_of_window(window)
        indices = np.concatenate([np.arange(self._shard_starts[s], self._shard_starts[s + 1]) for s in shards])
        first = int(self._window_starts[window])
        order = permutation(
            len(indices), seed=self._seed, purpose=Purpose.SAMPLE_ORDER, stream=self._stream, first_counter=first
        )
        return indices[order]


class Place(NamedTuple):
    """A window of an epoch."""

    epoch: int
    window: int


@dataclass(frozen=True, kw_only=True)
class DrawnSamples:
    """Samples of one set as they come, N of them."""

    indices_N: Int64Array
    """Sample indices."""
    views_N: Int64Array
    """The view of each."""
    epochs_N: Int64Array
    """The epoch of the set in which it is read."""


class SampleStream:
    """The endless order of one shard set: epoch after epoch, each in an order of its own."""

    def __init__(
        self, samples_per_shard: Int64Array, *, num_views: int, seed: int, window_shards: int, part: int = 0
    ) -> None:
        """Plan nothing yet.

        Args:
            samples_per_shard: `(shards,)`, each at least 1.
            num_views: views of every sample.
            seed: of all draws, in [0, 2^56).
            window_shards: shards whose samples are shuffled together.
            part: number of the set in its mixture; sets of one seed have independent orders.
        """
        self._samples_per_shard, self._num_views = samples_per_shard, num_views
        self._seed, self._window_shards, self._part = seed, window_shards, part
        self._num_samples = int(samples_per_shard.sum())
        self._order = lru_cache(maxsize=3)(self._order_of_epoch)

    def draw(self, positions: Int64Array) -> DrawnSamples:
        """Return the samples at positions of the stream, each at least 0."""
        epochs, in_epoch = np.divmod(positions, self._num_samples)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices[chosen] = self._order(epoch).sample_indices(in_epoch[chosen])
        views = draw_views(indices, num_views=self._num_views, seed=self._seed, epoch=epochs, part=self._part)
        return DrawnSamples(indices_N=indices, views_N=views, epochs_N=epochs)

    def place(self, position: int) -> Place:
        """Return the window that holds a position of the stream."""
        epoch, in_epoch = divmod(position, self._num_samples)
        return Place(epoch=epoch, window=self._order(epoch).window_of(in_epoch))

    def shards_from(self, place: Place) -> list[int]:
        """Return the shards of a window, then those of the window after it, which may be the next epoch's first."""
        order = self._order(place.epoch)
        after = (order, place.window + 1)
        if place.window + 1 == order.num_windows:
            after = (self._order(place.epoch + 1), 0)
        shards = [*order.shards_of_window(place.window).tolist(), *after[0].shards_of_window(after[1]).tolist()]
        return list(dict.fromkeys(shards))

    def _order_of_epoch(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            self._samples_per_shard,
            seed=self._seed,
            epoch=epoch,
            window_shards=self._window_shards,
            part=self._part,
        )


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


def draw_views(
    sample_indices: Int64Array, *, num_views: int, seed: int, epoch: int | Int64Array, part: int = 0
) -> Int64Array:
    """Return the view of each sample in an epoch, or in one of its own, in [0, num_views).

    It is a draw of (seed, part, epoch, sample).
    """
    if num_views == 1:
        return np.zeros_like(sample_indices)
    words = random_words(
        seed=seed, purpose=Purpose.VIEW, stream=_stream(part=part, epoch=0) | epoch, counters=sample_indices
    )
    return _below(num_views, words)


def draw_replacements(
    sample_index: int, *, num_candidates: int, count: int, seed: int, epoch: int, part: int = 0
) -> Int64Array:
    """Return `count` draws in [0, num_candidates) that say which samples are tried in place of a damaged one."""
    counters = np.arange(sample_index * count, (sample_index + 1) * count, dtype=np.int64)
    words = random_words(
        seed=seed, purpose=Purpose.REPLACEMENT, stream=_stream(part=part, epoch=epoch), counters=counters
    )
    return _below(num_candidates, words)


def _below(bound: int, words: npt.NDArray[np.uint64]) -> Int64Array:
    """Return each word's upper half as a uniform draw in [0, bound), bound up to 2^32."""
    return (((words >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def _stream(*, part: int, epoch: int) -> int:
    return part << _PART_SHIFT | epoch
