"""Which sample comes when, against brute force: one epoch, the stream of epochs, views, replacements and ranks."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from pipeline.order import EpochOrder, Place, SampleStream, draw_replacements, draw_views, rank_slice

SHARD_SETS = [(1,), (5,), (3, 1, 4), (3, 1, 4, 2), (2, 2, 2, 2, 2, 2, 2), (7, 1, 1, 9, 3)]


def order_of(samples_per_shard: tuple[int, ...], **changes: int) -> list[int]:
    settings = {"seed": 0, "epoch": 0, "window_shards": 2} | changes
    order = EpochOrder(samples_per_shard, **settings)
    return order.sample_indices(np.arange(sum(samples_per_shard))).tolist()


@pytest.mark.parametrize("samples_per_shard", SHARD_SETS)
@pytest.mark.parametrize("window_shards", [1, 2, 3, 100])
def test_an_epoch_holds_each_sample_once(samples_per_shard: tuple[int, ...], window_shards: int) -> None:
    for epoch in range(4):
        order = order_of(samples_per_shard, epoch=epoch, window_shards=window_shards)
        assert sorted(order) == list(range(sum(samples_per_shard)))


def test_order_changes_with_seed_and_epoch_and_nothing_else() -> None:
    sizes = (20, 20, 20)
    orders = [order_of(sizes, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert order_of(sizes, seed=2, epoch=1) == orders[2 * 3 + 1]


def test_only_the_shards_of_a_window_are_mixed() -> None:
    sizes = (10,) * 7
    order = order_of(sizes, window_shards=2)
    shards_of_window = [{index // 10 for index in order[start : start + 20]} for start in range(0, 70, 20)]
    assert [len(shards) for shards in shards_of_window] == [2, 2, 2, 1]
    assert set.union(*shards_of_window) == set(range(7))


def test_any_positions_may_be_asked_for_in_any_order() -> None:
    sizes = (7, 1, 1, 9, 3)
    whole = order_of(sizes)
    order = EpochOrder(sizes, seed=0, epoch=0, window_shards=2)
    for position in reversed(range(21)):
        assert order.sample_indices(np.array([position])).tolist() == [whole[position]]


def word_by_hand(counter: int, *, key: tuple[int, int], stream: int) -> int:
    """Philox4x32-10 on Python's integers; the low 64 bits of the result."""
    c0, c1, c2, c3 = counter & 0xFFFFFFFF, counter >> 32, stream & 0xFFFFFFFF, stream >> 32
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c1 << 32 | c0


def test_order_is_the_documented_one() -> None:
    samples_of_shard = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    shard_order = sorted(range(3), key=lambda shard: word_by_hand(shard, key=(11, 0x10), stream=2))
    expected: list[int] = []
    for window in (shard_order[:2], shard_order[2:]):
        samples = [sample for shard in window for sample in samples_of_shard[shard]]
        start = len(expected)
        places = sorted(range(len(samples)), key=lambda p: word_by_hand(start + p, key=(11, 0x11), stream=2))
        expected += [samples[place] for place in places]
    assert order_of((4, 3, 3), seed=11, epoch=2) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_a_global_batch_without_gap_or_overlap(world_size: int) -> None:
    slices = [rank_slice(global_batch_size=12, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [position for part in slices for position in range(12)[part]] == list(range(12))


def test_batch_that_does_not_divide_names_a_right_value() -> None:
    with pytest.raises(ValueError, match=r"multiple of world_size 5, got 12; use 10"):
        rank_slice(global_batch_size=12, rank=0, world_size=5)
    with pytest.raises(ValueError, match=r"multiple of world_size 5, got 3; use 5"):
        rank_slice(global_batch_size=3, rank=0, world_size=5)


def test_views_are_uniform_and_fixed_per_seed_and_epoch() -> None:
    views = draw_views(np.arange(10_000), num_views=10, seed=0, epoch=0)
    counts = Counter(views.tolist())
    assert set(counts) == set(range(10))
    assert all(850 < count < 1150 for count in counts.values())
    assert draw_views(np.array([77]), num_views=10, seed=0, epoch=0)[0] == views[77]
    assert (draw_views(np.arange(10_000), num_views=10, seed=0, epoch=1) != views).any()


def stream_of(samples_per_shard: tuple[int, ...], *, part: int = 0, num_views: int = 1) -> SampleStream:
    return SampleStream(np.array(samples_per_shard), num_views=num_views, seed=5, window_shards=2, part=part)


@pytest.mark.parametrize("samples_per_shard", SHARD_SETS)
def test_a_stream_is_one_epoch_after_the_other(samples_per_shard: tuple[int, ...]) -> None:
    size = sum(samples_per_shard)
    expected = [i for epoch in range(3) for i in order_of(samples_per_shard, seed=5, epoch=epoch)]
    for start in range(3 * size):  # from every position, in pieces of another length each
        drawn = stream_of(samples_per_shard).draw(np.arange(start, min(start + 1 + start % 9, 3 * size)))
        assert drawn.indices_N.tolist() == expected[start : start + len(drawn.indices_N)]
        assert drawn.epochs_N.tolist() == [p // size for p in range(start, start + len(drawn.indices_N))]


@pytest.mark.parametrize("part", [0, 3])
def test_each_sample_of_a_stream_has_the_view_of_its_epoch(part: int) -> None:
    drawn = stream_of((2, 1), part=part, num_views=10).draw(np.arange(4, 30))
    words = [
        word_by_hand(index, key=(5, 0x12), stream=part << 40 | position // 3)
        for position, index in enumerate(drawn.indices_N.tolist(), start=4)
    ]
    assert drawn.views_N.tolist() == [(word >> 32) * 10 >> 32 for word in words]


def test_parts_of_a_mixture_have_orders_of_their_own() -> None:
    sizes = (20, 20, 20)
    orders = [stream_of(sizes, part=part).draw(np.arange(60)).indices_N.tolist() for part in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(60)) for order in orders)
    views = [stream_of(sizes, part=part, num_views=7).draw(np.arange(60)).views_N.tolist() for part in range(2)]
    assert views[0] != views[1]


@pytest.mark.parametrize("samples_per_shard", SHARD_SETS)
def test_the_shards_from_a_place_on_are_those_of_its_window_and_the_next(samples_per_shard: tuple[int, ...]) -> None:
    size = sum(samples_per_shard)
    shard_of_sample = [shard for shard, count in enumerate(samples_per_shard) for _ in range(count)]
    stream = stream_of(samples_per_shard)
    shards = [shard_of_sample[i] for i in stream.draw(np.arange(3 * size)).indices_N.tolist()]
    places = [stream.place(position) for position in range(3 * size)]
    assert places == sorted(places)
    in_order = sorted(set(places))
    for place, after in pairwise(in_order):
        own, next_ones = ({s for s, at in zip(shards, places, strict=True) if at == p} for p in (place, after))
        found = stream.shards_from(place)
        assert len(found) == len(set(found))
        assert set(found[: len(own)]) == own
        assert set(found) == own | next_ones
    assert places[-1] == Place(epoch=2, window=-(-len(samples_per_shard) // 2) - 1)


def test_replacements_are_draws_of_the_sample_and_the_epoch() -> None:
    draws = [
        draw_replacements(sample, num_candidates=50, count=64, seed=1, epoch=epoch, part=part).tolist()
        for sample in (0, 1)
        for epoch in (0, 1)
        for part in (0, 1)
    ]
    assert len({tuple(draw) for draw in draws}) == 8
    assert all(0 <= candidate < 50 for draw in draws for candidate in draw)
    assert draw_replacements(1, num_candidates=50, count=64, seed=1, epoch=1, part=1).tolist() == draws[-1]
    words = [word_by_hand(7 * 64 + number, key=(1, 0x15), stream=3 << 40 | 9) for number in range(64)]
    drawn = draw_replacements(7, num_candidates=50, count=64, seed=1, epoch=9, part=3).tolist()
    assert drawn == [(word >> 32) * 50 >> 32 for word in words]
