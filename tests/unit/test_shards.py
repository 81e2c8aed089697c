"""The shard format: fixed bytes, Energon's index, readable by webdataset, damage noticed."""

import hashlib
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipeline.shards import ShardReader, ShardSample, ShardWriter, canonical_json, index_path, read_shard
from pipeline.storage import ArtifactError


def samples(num: int = 3) -> list[ShardSample]:
    return [
        ShardSample(
            key=f"00000{position:04d}",
            codes_VT=(np.arange(8, dtype=np.int32).reshape(2, 4) + 100 * position),
            metadata={"label": position, "caption": "naïve\nthing", "extra": {"b": 1, "a": [0.5, None]}},
        )
        for position in range(num)
    ]


def write(path: Path, *, codebook_size: int = 1024, num: int = 3) -> Path:
    with ShardWriter(path, codebook_size=codebook_size) as writer:
        for sample in samples(num):
            writer.add(sample)
        index_path(path).write_bytes(writer.close())
    return path


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    # Raised only together with the version in the manifest: these bytes are the format.
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == "ccb45172b3ed8fda"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["000000000.codes.npy", "000000000.json"]
    described = {
        (member.mtime, member.mode, member.uid, member.gid, member.uname, member.gname, member.type)
        for member in members
    }
    assert described == {(0, 0o644, 0, 0, "", "", tarfile.REGTYPE)}
    assert path.read_bytes()[257:265] == b"ustar\x0000"


def test_the_index_has_the_offset_of_each_sample_and_of_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    with tarfile.open(path) as tar:
        expected = [member.offset for member in tar if member.name.endswith(".codes.npy")]
        expected.append(tar.offset)  # where tarfile stopped: Energon's last entry
    offsets = struct.unpack("<4Q", Path(f"{path}.idx").read_bytes())
    assert list(offsets) == expected
    assert path.stat().st_size % 10240 == 0


@pytest.mark.parametrize(("codebook_size", "dtype"), [(65536, np.uint16), (65537, np.int32)])
def test_samples_read_back_in_any_order(tmp_path: Path, codebook_size: int, dtype: type) -> None:
    reader = ShardReader(write(tmp_path / "00000.tar", codebook_size=codebook_size))
    assert reader.num_samples == 3
    for position in (2, 0, 1):
        sample, written = reader.sample(position), samples()[position]
        assert sample.key == written.key
        assert sample.metadata == written.metadata
        assert sample.codes_VT.dtype == dtype
        np.testing.assert_array_equal(sample.codes_VT, written.codes_VT)
    assert [sample.key for sample in read_shard(reader.path)] == ["000000000", "000000001", "000000002"]
    with pytest.raises(IndexError, match=r"\[0, 3\), got 3"):
        reader.sample(3)


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == ["000000000", "000000001", "000000002"]
    np.testing.assert_array_equal(read[1]["codes.npy"], np.array([[100, 101, 102, 103], [104, 105, 106, 107]]))
    assert read[1]["codes.npy"].dtype == np.uint16
    assert read[1]["json"] == {"label": 1, "caption": "naïve\nthing", "extra": {"b": 1, "a": [0.5, None]}}


def test_a_sample_that_would_not_fit_the_format_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar", codebook_size=4) as writer:
        for codes in ([[0, 4]], [[-1, 0]], [0, 1]):
            with pytest.raises(ValueError, match="codes must be"):
                writer.add(ShardSample(key="0", codes_VT=np.array(codes, dtype=np.int32), metadata={}))
        with pytest.raises(ValueError, match="key must be digits"):
            writer.add(ShardSample(key="a.b", codes_VT=np.zeros((1, 2), dtype=np.uint16), metadata={}))


def test_canonical_json_does_not_depend_on_insertion_order() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode() == canonical_json({"a": "ü", "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("inf"))


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    index = index_path(path)
    offsets = list(struct.unpack("<4Q", index.read_bytes()))
    index.write_bytes(struct.pack("<4Q", offsets[0], offsets[0] + 1024, *offsets[2:]))
    with pytest.raises(ArtifactError, match=r"00000\.tar.*one key"):
        ShardReader(path).sample(0)
    index.write_bytes(struct.pack("<2Q", 512, 0))
    with pytest.raises(ArtifactError, match="index must fit"):
        ShardReader(path)
    index.write_bytes(struct.pack("<4Q", *offsets))
    whole = path.read_bytes()
    path.write_bytes(whole[: offsets[-1] - 1])
    with pytest.raises(ArtifactError, match="index must fit"):
        ShardReader(path)
    path.write_bytes(whole[:600] + b"\xff" * 50 + whole[650:])
    with pytest.raises(ArtifactError, match="sample 0"):
        ShardReader(path).sample(0)
    index.unlink()
    with pytest.raises(ArtifactError, match=r"00000\.tar"):
        ShardReader(path)


def test_metadata_survives_as_plain_json(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path / "00000.tar")) as tar:
        content = tar.extractfile("000000002.json")
        assert content is not None
        assert json.load(content)["label"] == 2
