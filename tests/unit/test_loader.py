"""The loader against brute force: which samples come when, for every world size and resume point."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from synthetic_shards import codes_of, fingerprint_of, write_shard_set

from pipeline.config import LoaderConfig
from pipeline.loader import Batch, EpochOrder, Loader, ShardSet, draw_views, rank_slice
from pipeline.storage import ArtifactError

SHARD_SETS = [(1,), (5,), (3, 1, 4), (2, 2, 2, 2, 2, 2, 2), (7, 1, 1, 9, 3)]


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
    c0, c1, c2, c3 = counter & 0xFFFFFFFF, counter >> 32, stream, 0
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


def test_views_are_uniform_and_fixed_per_seed_and_epoch() -> None:
    views = draw_views(np.arange(10_000), num_views=10, seed=0, epoch=0)
    counts = Counter(views.tolist())
    assert set(counts) == set(range(10))
    assert all(850 < count < 1150 for count in counts.values())
    assert draw_views(np.array([77]), num_views=10, seed=0, epoch=0)[0] == views[77]
    assert (draw_views(np.arange(10_000), num_views=10, seed=0, epoch=1) != views).any()


def loaders(shards: Path, *, world_size: int, global_batch_size: int = 12) -> list[Loader]:
    config = LoaderConfig(shards=str(shards), shuffle_window_shards=2, seed=3)
    return [
        Loader(
            ShardSet.open(shards),
            config=config,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            num_classes=4,
        )
        for rank in range(world_size)
    ]


def joined(batches: list[Batch], field: str) -> np.ndarray:
    return np.concatenate([getattr(batch, field) for batch in batches])


def test_global_batches_are_the_same_for_every_world_size_and_resume_point(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5, 9), num_views=3)
    positions = range(0, 12 * 12, 12)  # nearly seven epochs of 21; most batches straddle two
    whole = loaders(shards, world_size=1)[0]
    expected = {position: whole.batch(position) for position in positions}
    for world_size in (2, 3, 4, 6, 12):
        for position in reversed(positions):  # a fresh loader at any position: resuming needs no other state
            parts = [loader.batch(position) for loader in loaders(shards, world_size=world_size)]
            for field in ("codes_BT", "labels_B", "sample_indices_B", "counters_B"):
                assert joined(parts, field).tolist() == getattr(expected[position], field).tolist()


def test_each_sample_comes_once_per_epoch_with_its_own_codes_and_label(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5, 9), num_views=3)
    loader = loaders(shards, world_size=1)[0]
    batches = [loader.batch(position) for position in range(0, 84, 12)]  # 84 samples = 4 epochs of 21
    indices, labels, codes = (joined(batches, field) for field in ("sample_indices_B", "labels_B", "codes_BT"))
    for epoch in range(4):
        assert sorted(indices[21 * epoch : 21 * (epoch + 1)]) == list(range(21))
    assert joined(batches, "counters_B").tolist() == list(range(84))
    views_seen = set()
    for index, label, codes_T in zip(indices.tolist(), labels.tolist(), codes, strict=True):
        assert label == index % 4
        views = codes_of(index, num_views=3, codebook_size=16, num_codes=16)
        matching = [view for view in range(3) if (views[view] == codes_T).all()]
        assert matching
        views_seen.update(matching)
    assert views_seen == {0, 1, 2}


def test_batch_larger_than_the_set_repeats_it_epoch_by_epoch(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(3, 2))
    batch = loaders(shards, world_size=1)[0].batch(12)
    counts = Counter(batch.sample_indices_B.tolist())
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert sum(counts.values()) == 12


def test_samples_are_the_same_without_room_to_remember_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shard_set(tmp_path / "set", num_views=2)
    remembered = loaders(shards, world_size=1)[0].batch(48)
    monkeypatch.setattr("pipeline.loader._MAX_CACHE_BYTES", 0)
    read_again = loaders(shards, world_size=1)[0].batch(48)
    assert read_again.codes_BT.tolist() == remembered.codes_BT.tolist()
    assert read_again.labels_B.tolist() == remembered.labels_B.tolist()


def test_sample_without_a_label_has_label_minus_one(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", label=None)
    assert set(loaders(shards, world_size=1)[0].batch(0).labels_B.tolist()) == {-1}


@pytest.mark.parametrize(
    ("label", "message"), [(4, "labels must be below model.num_classes = 4, got 4"), ("cat", "'cat'")]
)
def test_label_that_the_model_does_not_have_is_an_error(tmp_path: Path, label: object, message: str) -> None:
    shards = write_shard_set(tmp_path / "set", label=label)
    with pytest.raises(ArtifactError, match=message):
        loaders(shards, world_size=1)[0].batch(0)


def test_code_outside_of_the_codebook_is_an_error_that_names_the_sample(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(1,))
    shard = shards / "shards" / "00000.tar"
    data = bytearray(shard.read_bytes())
    codes_start = data.index(b"\x93NUMPY") + 128  # the header of a version 1 npy ends at a multiple of 64
    data[codes_start] = 16
    shard.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"sample 000000000 of .*00000\.tar: codes must be in \[0, 16\), got 16"):
        ShardSet.open(shards).read(0)


def test_codes_of_another_tokenizer_are_refused_at_open(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set")
    ShardSet.open(shards, fingerprint=fingerprint_of())
    with pytest.raises(ArtifactError, match="tokenize both sets with the same tokenizer"):
        ShardSet.open(shards, fingerprint=fingerprint_of("1" * 64))


def test_set_without_a_manifest_is_refused_at_open(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        ShardSet.open(tmp_path)
