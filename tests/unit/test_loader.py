"""The loader against brute force: what each batch holds, for every world size, mixture and resume point."""

import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from synthetic_shards import codes_of, damage_samples, fingerprint_of, write_shard_set

from pipeline.config import LoaderConfig, S3Config
from pipeline.ledger import read_manifest
from pipeline.loader import Batch, Loader, check_room, open_cache, open_parts
from pipeline.open_shards import NUM_THREADS
from pipeline.order import EpochOrder, SampleStream
from pipeline.shard_cache import ShardCache
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError, open_storage


def loaders(shards: Path, *, world_size: int, global_batch_size: int = 12, read_ahead_batches: int = 0) -> list[Loader]:
    config = LoaderConfig(shards=str(shards), shuffle_window_shards=2, seed=3, read_ahead_batches=read_ahead_batches)
    return [
        Loader(
            [ShardSet.open(shards)],
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


def test_a_label_that_is_too_large_is_told_with_the_sample_that_has_it(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7,))  # labels 0, 1, 2, 3, 0, 1, 2
    config = LoaderConfig(shards=str(shards), seed=3, read_ahead_batches=0)
    loader = Loader([ShardSet.open(shards)], config=config, global_batch_size=7, rank=0, world_size=1, num_classes=3)
    said = r"sample .*/00000\.tar:000000003: labels must be below model\.num_classes = 3, got 3; raise"
    with pytest.raises(ArtifactError, match=said):
        loader.batch(0)


def test_code_outside_of_the_codebook_is_an_error_that_names_the_sample(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(1,))
    shard = shards / "shards" / "00000.tar"
    data = bytearray(shard.read_bytes())
    codes_start = data.index(b"\x93NUMPY") + 128  # the header of a version 1 npy ends at a multiple of 64
    data[codes_start] = 16
    shard.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"sample 000000000 of .*00000\.tar: codes must be in \[0, 16\), got 16"):
        ShardSet.open(shards).read(0)


def replacing_loader(shards: Path, *, rank: int = 0, world_size: int = 1, on_damage: str = "replace") -> Loader:
    config = LoaderConfig(
        shards=str(shards), shuffle_window_shards=2, seed=3, on_damage=on_damage, read_ahead_batches=0
    )
    return Loader([ShardSet.open(shards)], config=config, global_batch_size=12, rank=rank, world_size=world_size)


def test_samples_are_named_by_shard_and_key(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5, 9))
    loader = loaders(shards, world_size=2)[1]
    batch = loader.batch(24)
    names = []
    for index in batch.sample_indices_B.tolist():
        shard, position = next((s, index - f) for s, f, n in ((0, 0, 7), (1, 7, 5), (2, 12, 9)) if f <= index < f + n)
        names.append(f"{shards}/shards/{shard:05d}.tar:{shard:05d}{position:04d}")
    assert loader.sample_names(batch) == names


def test_reading_ahead_changes_nothing_and_any_position_may_follow(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5, 9), num_views=3)
    batches = {}
    for depth in (0, 1, 3):
        config = LoaderConfig(shards=str(shards), shuffle_window_shards=2, seed=3, read_ahead_batches=depth)
        with Loader([ShardSet.open(shards)], config=config, global_batch_size=6, rank=0, world_size=1) as loader:
            positions = [0, 6, 12, 18, 6, 6, 100, 106, 1, 7, 0]
            batches[depth] = [loader.batch(p).codes_BT.tolist() for p in positions]
    assert batches[0] == batches[1] == batches[3]


def test_an_error_comes_with_the_batch_whose_it_is(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(24, 24))
    order = replacing_loader(shards).batch(0).sample_indices_B.tolist()
    config = LoaderConfig(shards=str(shards), shuffle_window_shards=1, seed=3, read_ahead_batches=3)
    in_order = EpochOrder((24, 24), seed=3, epoch=0, window_shards=1).sample_indices(np.arange(48)).tolist()
    damaged = next(place for place in range(12, 48) if in_order[place] < 24)
    damage_samples(shards, f"{in_order[damaged]:09d}")
    assert len(order) == 12
    with Loader([ShardSet.open(shards)], config=config, global_batch_size=12, rank=0, world_size=1) as loader:
        for position in (0, 12, 24, 36):
            if position <= damaged < position + 12:
                with pytest.raises(ArtifactError, match=f"{in_order[damaged]:09d}"):
                    loader.batch(position)
            else:
                assert loader.batch(position).sample_indices_B.tolist() == in_order[position : position + 12]


def test_closing_ends_the_threads(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5, 9))
    before = threading.active_count()
    with loaders(shards, world_size=1, read_ahead_batches=2)[0] as loader:
        loader.batch(0)
        assert threading.active_count() > before
    assert threading.active_count() == before


def mixture_loaders(sets: list[Path], *, weights: tuple[float, ...], world_size: int, batch: int = 12) -> list[Loader]:
    parts = tuple({"shards": str(path), "weight": weight} for path, weight in zip(sets, weights, strict=True))
    config = LoaderConfig(mixture=parts, shuffle_window_shards=2, seed=3, read_ahead_batches=0)
    shard_sets = open_parts(config, s3=S3Config())
    return [
        Loader(shard_sets, config=config, global_batch_size=batch, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1.0, 5.0, 2.5)])
def test_a_mixture_is_the_same_for_every_world_size_micro_batch_and_resume_point(
    tmp_path: Path, weights: tuple[float, ...]
) -> None:
    sizes = [(7, 5, 9), (3,), (4, 4)]
    sets = [
        write_shard_set(tmp_path / str(n), samples_per_shard=size, num_views=n + 1, first_sample=100 * n)
        for n, size in enumerate(sizes)
    ]
    whole = mixture_loaders(sets, weights=weights, world_size=1, batch=144)[0].batch(0)
    parts, indices = whole.parts_B.tolist(), whole.sample_indices_B.tolist()
    assert whole.counters_B.tolist() == list(range(144))
    for part, size in enumerate(map(sum, sizes)):
        own = [index for index, of in zip(indices, parts, strict=True) if of == part]
        for start in range(0, len(own) - size + 1, size):  # each whole epoch of the part
            assert sorted(own[start : start + size]) == list(range(size))
        share = weights[part] / sum(weights)
        assert all(abs(parts[:n].count(part) - n * share) <= 1 for n in range(145))
    for part, index, label, codes_T in zip(parts, indices, whole.labels_B, whole.codes_BT, strict=True):
        views = codes_of(100 * part + index, num_views=part + 1, codebook_size=16, num_codes=16)
        assert label == index % 4
        assert codes_T.tolist() in views.tolist()
    for world_size in (1, 2, 3, 6):
        ranks = mixture_loaders(sets, weights=weights, world_size=world_size, batch=6)
        for position in range(138):  # every resume point
            batches = [rank.batch(position) for rank in ranks]
            for field in ("codes_BT", "labels_B", "parts_B", "sample_indices_B", "counters_B"):
                wanted = getattr(whole, field)[position : position + 6]
                assert (joined(batches, field) == wanted).all()


def test_each_part_has_the_order_of_its_number_and_of_the_configs_seed_and_window(tmp_path: Path) -> None:
    sizes = [(7, 5, 9, 4), (3, 6, 2, 5)]
    sets = [write_shard_set(tmp_path / str(n), samples_per_shard=size, num_views=3) for n, size in enumerate(sizes)]
    parts = tuple({"shards": str(path), "weight": 1.0} for path in sets)
    config = LoaderConfig(mixture=parts, shuffle_window_shards=3, seed=2**40 + 11, read_ahead_batches=0)
    loader = Loader(open_parts(config, s3=S3Config()), config=config, global_batch_size=120, rank=0, world_size=1)
    batch = loader.batch(0)
    for part, size in enumerate(sizes):
        stream = SampleStream(np.array(size), num_views=3, seed=2**40 + 11, window_shards=3, part=part)
        expected = stream.draw(np.arange(60))
        own = np.flatnonzero(batch.parts_B == part)
        assert batch.sample_indices_B[own].tolist() == expected.indices_N.tolist()
        for place, index, view in zip(own, expected.indices_N.tolist(), expected.views_N.tolist(), strict=True):
            codes = codes_of(index, num_views=3, codebook_size=16, num_codes=16)
            assert batch.codes_BT[place].tolist() == codes[view].tolist()


def test_each_rank_has_the_shards_of_its_window_and_the_next_opened_from_another_one_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(2,) * 48)
    asked: list[list[int]] = []
    expect = ShardSet.expect

    def watched(self: ShardSet, shards: list[int]) -> None:
        asked.append(shards)
        expect(self, shards)

    monkeypatch.setattr(ShardSet, "expect", watched)
    for rank in (0, 1):
        config = LoaderConfig(shards=str(shards), shuffle_window_shards=24, seed=3, read_ahead_batches=0)
        loader = Loader([ShardSet.open(shards)], config=config, global_batch_size=8, rank=rank, world_size=2)
        for position in (0, 8, 48):  # two places
            loader.batch(position)
    of_first, of_second = asked[:2], asked[2:]
    assert len(of_first) == len(of_second) == 2
    order = EpochOrder((2,) * 48, seed=3, epoch=0, window_shards=24)
    windows = [order.shards_of_window(window).tolist() for window in range(2)]
    assert of_first[0] == windows[0] + windows[1]
    for one, other in zip(of_first, of_second, strict=True):
        assert other == one[NUM_THREADS:] + one[:NUM_THREADS]


def test_parts_of_two_tokenizers_are_refused_with_the_names_of_both(tmp_path: Path) -> None:
    sets = [
        write_shard_set(tmp_path / "one"),
        write_shard_set(tmp_path / "two", fingerprint=fingerprint_of("1" * 64)),
    ]
    with pytest.raises(
        ArtifactError, match=r"open mixture of .*/one and .*/two: all codes must come from one tokenizer"
    ):
        mixture_loaders(sets, weights=(1.0, 1.0), world_size=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of shards and mixture must be given, got neither"),
        ({"shards": "a", "mixture": [{"shards": "b", "weight": 1}]}, "got both; keep one"),
        ({"mixture": [{"shards": "b", "weight": 0}]}, "greater than 0"),
    ],
)
def test_a_loader_reads_shards_or_a_mixture(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig.model_validate(fields)


def test_codes_of_another_tokenizer_are_refused_at_open(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set")
    ShardSet.open(shards, fingerprint=fingerprint_of())
    with pytest.raises(ArtifactError, match="tokenize both sets with the same tokenizer"):
        ShardSet.open(shards, fingerprint=fingerprint_of("1" * 64))


def test_set_without_a_manifest_is_refused_at_open(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        ShardSet.open(tmp_path)


def test_a_cache_must_hold_what_all_sets_of_a_mixture_keep_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [write_shard_set(tmp_path / str(n), samples_per_shard=(2,) * 30) for n in range(2)]
    one = sum(path.stat().st_size for path in (sets[0] / "shards").iterdir()) // 30  # a shard and its index
    parts = tuple({"shards": str(path), "weight": 1.0} for path in sets)
    config = LoaderConfig(mixture=parts, shuffle_window_shards=2, read_ahead_batches=2)
    # Of each set four windows of two shards, and what lies between two ranks that are three batches of 6 apart.
    needed = 2 * (4 * 2 + 9) * one
    for max_bytes, free, is_here, message in (
        (needed, needed, True, None),
        (needed - 1, needed, True, "max_cache_gb must be at least"),
        (needed, needed - 1, True, "its disk must have room for"),
        (needed, needed - 1, False, None),
    ):
        cache = ShardCache(tmp_path / "cache", max_bytes=max_bytes)
        monkeypatch.setattr(cache, "disk_bytes", lambda free=free: free)
        storages = [open_storage(str(path)) for path in sets]  # as if on S3
        shard_sets = [ShardSet(each, read_manifest(each), cache=cache, window_shards=2) for each in storages]
        with nullcontext() if message is None else pytest.raises(ArtifactError, match=message):
            check_room(shard_sets, cache=cache, config=config, global_batch_size=6, is_here=is_here)


def test_only_sets_on_s3_have_a_cache_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    config = LoaderConfig(shards="unused", max_cache_gb=2.5, cache_dir=str(tmp_path / "cache"))
    assert open_cache(config, urls=["/sets/a", "sets/b"]) is None
    for urls in (["s3://bucket/a"], ["/sets/a", "s3://bucket/b"]):
        cache = open_cache(config, urls=urls)
        assert cache is not None
        assert (cache.directory, cache.max_bytes) == (tmp_path / "cache", 2_500_000_000)
