"""The loader over damaged samples and shards that are not what the manifest says: told, or replaced and counted."""

from pathlib import Path

import numpy as np
import pytest
from synthetic_shards import codes_of, damage_samples, write_shard_set
from test_loader import joined, loaders, replacing_loader

from pipeline.config import LoaderConfig, S3Config
from pipeline.loader import Loader, open_parts
from pipeline.order import SampleStream, draw_replacements
from pipeline.storage import ArtifactError


def test_a_damaged_sample_ends_the_run_with_its_name(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5))
    damage_samples(shards, "000000003")
    with pytest.raises(ArtifactError, match=r"sample 000000003 of .*/00000\.tar: codes must be in \[0, 16\), got 16"):
        replacing_loader(shards, on_damage="fail").batch(0)


def test_a_damaged_sample_is_replaced_by_another_of_its_shard_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5, 9))
    whole = [replacing_loader(shards).batch(position) for position in range(0, 84, 12)]  # 4 epochs of 21
    damage_samples(shards, "000000003", "000000005")
    loader = replacing_loader(shards)
    batches = [loader.batch(position) for position in range(0, 84, 12)]
    assert sum(batch.num_replaced for batch in batches) == 8  # 2 samples in 4 epochs
    before, after = joined(whole, "sample_indices_B"), joined(batches, "sample_indices_B")
    assert set(before[before != after].tolist()) == {3, 5}
    assert set(after[before != after].tolist()) <= {0, 1, 2, 4, 6}
    assert not {3, 5} & set(after.tolist())
    assert joined(batches, "counters_B").tolist() == list(range(84))
    for index, label, codes_T in zip(after, joined(batches, "labels_B"), joined(batches, "codes_BT"), strict=True):
        assert label == index % 4
        assert codes_T.tolist() in codes_of(int(index), num_views=1, codebook_size=16, num_codes=16).tolist()
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 8
    assert all("/shards/00000.tar" in line and "codes must be in [0, 16), got 16" in line for line in lines)
    for world_size in (2, 3, 4):
        for position in range(72, -1, -24):
            parts = [replacing_loader(shards, rank=r, world_size=world_size).batch(position) for r in range(world_size)]
            assert joined(parts, "sample_indices_B").tolist() == after[position : position + 12].tolist()


def test_a_damaged_sample_is_replaced_by_the_view_that_was_drawn_for_it(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5, 9), num_views=3)
    positions = range(0, 252, 12)  # 12 epochs of 21
    whole = [replacing_loader(shards).batch(position) for position in positions]
    damage_samples(shards, "000000003", "000000005", num_views=3)
    batches = [replacing_loader(shards).batch(position) for position in positions]
    views_seen = set()
    of_whole = zip(joined(whole, "sample_indices_B").tolist(), joined(whole, "codes_BT").tolist(), strict=True)
    after = zip(joined(batches, "sample_indices_B").tolist(), joined(batches, "codes_BT").tolist(), strict=True)
    for (index, codes_T), (index_after, codes_after_T) in zip(of_whole, after, strict=True):
        view = codes_of(index, num_views=3, codebook_size=16, num_codes=16).tolist().index(codes_T)
        assert codes_after_T == codes_of(index_after, num_views=3, codebook_size=16, num_codes=16)[view].tolist()
        if index_after != index:
            views_seen.add(view)
    assert views_seen == {0, 1, 2}


def test_a_shard_without_a_whole_sample_ends_the_run(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(2, 5))
    damage_samples(shards, "000000000", "000000001")
    with pytest.raises(ArtifactError, match=r"sample 00000000[01] of .*/00000\.tar"):
        replacing_loader(shards).batch(0)


def swap(first: Path, second: Path) -> None:
    for one, other in ((first, second), (first.with_name(f"{first.name}.idx"), second.with_name(f"{second.name}.idx"))):
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)


def test_a_shard_of_another_size_than_the_manifests_is_refused(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(7, 5)) / "shards"
    others = write_shard_set(tmp_path / "others", samples_per_shard=(7, 5), num_views=99) / "shards"
    swap(shards / "00000.tar", others / "00000.tar")
    said = r"open shard .*/00000\.tar: it must have the manifest's 20480 bytes, got 40960; remove it and rerun"
    with pytest.raises(ArtifactError, match=said):
        loaders(tmp_path / "set", world_size=1)[0].batch(0)


def test_a_shard_of_another_unit_is_refused(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(5, 7, 7)) / "shards"
    swap(shards / "00001.tar", shards / "00002.tar")
    with pytest.raises(
        ArtifactError, match=r"open shard .*: its keys must begin 0000[12], got 0000[12]0000; remove it"
    ):
        loaders(tmp_path / "set", world_size=1)[0].batch(0)


def test_a_shard_whose_first_sample_is_damaged_is_open_to_the_others(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(9,))
    tar = shards / "shards" / "00000.tar"
    tar.write_bytes(b"x" + tar.read_bytes()[1:])
    batch = replacing_loader(shards).batch(0)
    assert set(batch.sample_indices_B.tolist()) == set(range(1, 9))


def test_a_replacement_is_the_first_whole_sample_of_its_documented_draws(tmp_path: Path) -> None:
    sets = [write_shard_set(tmp_path / str(n), samples_per_shard=(7, 5)) for n in range(2)]
    parts = tuple({"shards": str(path), "weight": 1.0} for path in sets)
    config = LoaderConfig(mixture=parts, shuffle_window_shards=2, seed=11, read_ahead_batches=0, on_damage="replace")
    for path in sets:
        damage_samples(path, *(f"{index:09d}" for index in (0, 2, 3, 6)))
    loader = Loader(open_parts(config, s3=S3Config()), config=config, global_batch_size=96, rank=0, world_size=1)
    batch = loader.batch(0)  # four epochs of each
    assert batch.num_replaced == 32
    for part in range(2):
        drawn = SampleStream(np.array((7, 5)), num_views=1, seed=11, window_shards=2, part=part).draw(np.arange(48))
        expected = []
        for index, epoch in zip(drawn.indices_N.tolist(), drawn.epochs_N.tolist(), strict=True):
            tried = draw_replacements(index, num_candidates=7, count=64, seed=11, epoch=epoch, part=part).tolist()
            expected.append(next(other for other in tried if other in (1, 4, 5)) if index in (0, 2, 3, 6) else index)
        assert batch.sample_indices_B[batch.parts_B == part].tolist() == expected
