"""The loader against brute force: which samples come when, for every world size and resume point."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from synthetic_shards import codes_of, fingerprint_of, write_shard_set

from pipeline.config import LoaderConfig
from pipeline.loader import Batch, Loader
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError


def loaders(shards: Path, *, world_size: int, global_batch_size: int = 12) -> list[Loader]:
    config = LoaderConfig(shards=str(shards), shuffle_window_shards=2, seed=3)
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
