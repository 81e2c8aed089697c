"""Samples read in bulk are those read one by one, and what is damaged for the one is damaged for the other."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_shards import write_manifest_of

from pipeline.sample_blocks import SampleBlocks
from pipeline.shard_set import ShardSet
from pipeline.shards import ShardSample, ShardWriter, canonical_json, open_shard
from pipeline.storage import ArtifactError, open_storage


def metadata_of(number: int) -> dict[str, Any]:
    """Captions from nothing to several blocks, one longer than bulk reading takes; labels up to ten digits, or none."""
    caption = None if number % 7 == 0 else 'a {caption} with "label":1, ' * (200 if number == 40 else (number % 9) ** 2)
    label = None if number % 5 == 0 else 7**number % 10**10
    return {"caption": caption, "extra": {"label": 3, "n": [1, {"label": 2}]}, "label": label, "width": 30 * number}


def write_set(
    run_dir: Path, *, num_views: int, codes_per_side: int, codebook_size: int, samples_per_shard: tuple[int, ...]
) -> tuple[list[np.ndarray], list[int]]:
    """Write a set; return codes and labels of its samples."""
    (run_dir / "shards").mkdir(parents=True)
    draws, codes, labels, infos = np.random.default_rng(0), [], [], []
    dtype = np.uint16 if codebook_size <= 65536 else np.int32
    for shard, num_samples in enumerate(samples_per_shard):
        path = run_dir / "shards" / f"{shard:05d}.tar"
        with ShardWriter(path, codebook_size=codebook_size) as writer:
            for position in range(num_samples):
                metadata = metadata_of(len(codes))
                codes.append(draws.integers(0, codebook_size, (num_views, codes_per_side**2)).astype(dtype))
                labels.append(-1 if metadata["label"] is None else metadata["label"])
                writer.add(ShardSample(key=f"{shard:05d}{position:04d}", codes_VT=codes[-1], metadata=metadata))
            written = writer.close()
        path.with_name(f"{path.name}.idx").write_bytes(written.index)
        infos.append(written.info(path.name))
    write_manifest_of(run_dir, infos, num_views=num_views, codes_per_side=codes_per_side, codebook_size=codebook_size)
    return codes, labels


@pytest.mark.parametrize(
    ("num_views", "codes_per_side", "codebook_size"),
    [(1, 1, 16), (1, 4, 16), (1, 8, 65536), (1, 16, 16384), (10, 16, 16384), (3, 5, 16), (2, 24, 70000), (7, 9, 65536)],
)
def test_bulk_reading_gives_the_samples_that_were_written(
    tmp_path: Path, num_views: int, codes_per_side: int, codebook_size: int
) -> None:
    shape = {"num_views": num_views, "codes_per_side": codes_per_side, "codebook_size": codebook_size}
    codes, labels = write_set(tmp_path / "set", samples_per_shard=(41, 7, 30), **shape)
    shard_set = ShardSet.open(tmp_path / "set")
    draws = np.random.default_rng(1)
    for size in (1, 2, 17, 200):  # with repeats, from all shards
        indices, views = draws.integers(0, 78, size), draws.integers(0, num_views, size)
        codes_BT, labels_B = shard_set.read_batch(indices, views=views)
        assert codes_BT.dtype == labels_B.dtype == np.int64
        assert codes_BT.tolist() == [codes[i][v].tolist() for i, v in zip(indices, views, strict=True)]
        assert labels_B.tolist() == [labels[i] for i in indices]


def test_samples_whose_json_is_of_different_lengths_are_accepted_together(tmp_path: Path) -> None:
    write_set(tmp_path / "set", num_views=2, codes_per_side=4, codebook_size=16, samples_per_shard=(30,))
    reader = open_shard(open_storage(str(tmp_path / "set")), "shards/00000.tar")
    layout = SampleBlocks(num_views=2, codes_per_image=16, codebook_size=16)
    starts, ends, views = reader.byte_offsets[:-1] // 512, reader.byte_offsets[1:] // 512, np.arange(30) % 2
    assert len(set((ends - starts).tolist())) > 2
    blocks = reader.blocks[layout.block_numbers(starts, ends, views_B=views)]
    assert layout.decode(blocks, spans_B=ends - starts, views_B=views).is_read_B.all()


def test_a_sample_that_the_index_makes_too_long_is_damaged(tmp_path: Path) -> None:
    write_set(tmp_path / "set", num_views=1, codes_per_side=4, codebook_size=16, samples_per_shard=(3,))
    path = tmp_path / "set" / "shards" / "00000.tar.idx"
    offsets = np.frombuffer(path.read_bytes(), dtype="<u8").copy()
    offsets[-1] += 512  # one of the zero blocks that end the tar
    path.write_bytes(offsets.tobytes())
    batch = ShardSet.open(tmp_path / "set").try_read_batch(np.arange(3), views=np.zeros(3, dtype=np.int64))
    assert list(batch.damages) == [2]
    assert "sample 2 must be codes and JSON of one key, got more after them" in str(batch.damages[2])


def outcome(shard_set: ShardSet, index: int) -> tuple[list[int], int] | str:
    """Codes of view 1 and label by the reading of one sample, or its error."""
    try:
        codes_VT, label = shard_set.read(index)
        return codes_VT[1].tolist(), label
    except ArtifactError as error:
        return str(error)


def test_every_flipped_byte_is_found_as_by_the_reading_of_one_sample(tmp_path: Path) -> None:
    # view 1 of 2 fills its block, so that every byte that bulk reading leaves out belongs to another view
    write_set(tmp_path / "set", num_views=2, codes_per_side=8, codebook_size=70000, samples_per_shard=(6,))
    path = tmp_path / "set" / "shards" / "00000.tar"
    whole = path.read_bytes()
    offsets = np.frombuffer(path.with_name("00000.tar.idx").read_bytes(), dtype="<u8").tolist()
    start, draws = offsets[2], random.Random(0)
    structure = [*range(512 + 128), *range(512 + 128 + 256, offsets[3] - start)]  # all but the codes of view 0
    views = np.ones(6, dtype=np.int64)
    shard_set = ShardSet.open(tmp_path / "set")
    right, is_noticed = outcome(shard_set, 2), []
    for byte in structure[::3]:
        data = bytearray(whole)
        data[start + byte] ^= draws.randrange(1, 256)
        path.write_bytes(data)
        shard_set.close()
        batch, expected = shard_set.try_read_batch(np.arange(6), views=views), outcome(shard_set, 2)
        got = str(batch.damages[2]) if batch.damages else (batch.codes_BT[2].tolist(), int(batch.labels_B[2]))
        if isinstance(expected, str) and not batch.damages:  # text that is no JSON, without an effect on its label
            assert 2048 <= byte < 2048 + len(canonical_json(metadata_of(2)))
            expected = right
        assert got == expected
        assert batch.damages.keys() <= {2}
        is_noticed.append(bool(batch.damages))
    assert all(is_noticed[: (512 + 128) // 3])
    before_text = 2048 - 256  # and after the codes of view 1: padding, the header of the JSON
    assert all(is_noticed[-(-(512 + 128 + 256) // 3) : before_text // 3])


def test_samples_around_a_damaged_one_are_read(tmp_path: Path) -> None:
    codes, labels = write_set(
        tmp_path / "set", num_views=1, codes_per_side=4, codebook_size=16, samples_per_shard=(9, 9)
    )
    path = tmp_path / "set" / "shards" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"000010003.codes.npy")] = ord("x")
    path.write_bytes(data)
    batch = ShardSet.open(tmp_path / "set").try_read_batch(np.arange(18), views=np.zeros(18, dtype=np.int64))
    assert list(batch.damages) == [12]
    assert "00001.tar: sample 3 must be codes and JSON of one key" in str(batch.damages[12])
    whole = [i for i in range(18) if i != 12]
    assert batch.codes_BT[whole].tolist() == [codes[i][0].tolist() for i in whole]
    assert batch.labels_B[whole].tolist() == [labels[i] for i in whole]


@pytest.mark.parametrize(("label", "is_right"), [(3, True), (-1, False), (1.0, False), (True, False), ("3", False)])
def test_label_must_be_a_whole_number(tmp_path: Path, label: object, is_right: bool) -> None:
    (tmp_path / "set" / "shards").mkdir(parents=True)
    path = tmp_path / "set" / "shards" / "00000.tar"
    with ShardWriter(path, codebook_size=16) as writer:
        writer.add(ShardSample(key="000000", codes_VT=np.zeros((1, 16), dtype=np.uint16), metadata={"label": label}))
        written = writer.close()
    path.with_name(f"{path.name}.idx").write_bytes(written.index)
    write_manifest_of(tmp_path / "set", [written.info(path.name)], num_views=1, codes_per_side=4, codebook_size=16)
    batch = ShardSet.open(tmp_path / "set").try_read_batch(np.array([0]), views=np.array([0]))
    assert (list(batch.damages) == []) == is_right
    if not is_right:
        assert f"00000.tar: label must be a whole number >= 0, got {label!r}" in str(batch.damages[0])
