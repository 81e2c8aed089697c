"""The shard format: fixed bytes, Energon's index, readable by webdataset, every changed byte of structure noticed."""

import dataclasses
import errno
import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from forbidden import forbidden

from pipeline.local_storage import LocalStorage
from pipeline.npy_codes import codes_of_npy, npy_of_codes
from pipeline.shards import (
    ShardReader,
    ShardSample,
    ShardWriter,
    WrittenShard,
    action_of_open,
    canonical_json,
    check_written,
    index_of,
    open_shard,
    read_shard,
)
from pipeline.storage import ArtifactError
from pipeline.ustar import member_bytes


def samples(num: int = 3) -> list[ShardSample]:
    return [
        ShardSample(
            key=f"00000{position:04d}",
            codes_VT=(np.arange(8, dtype=np.int32).reshape(2, 4) + 100 * position),
            metadata={"label": position, "caption": "naïve\nthing", "extra": {"b": 1, "a": [0.5, None]}},
        )
        for position in range(num)
    ]


def index_path(path: Path) -> Path:
    return path.with_name(path.name + ".idx")


def write(path: Path, *, codebook_size: int = 1024, num: int = 3) -> Path:
    with ShardWriter(path, codebook_size=codebook_size) as writer:
        for sample in samples(num):
            writer.add(sample)
        index_path(path).write_bytes(writer.close().index)
    return path


def reader_of(path: Path) -> ShardReader:
    return open_shard(LocalStorage(path.parent), path.name)


def odd_metadata(position: int) -> dict[str, Any]:
    return {
        "caption": 'naïve ☃ \n"q"' + "x" * (position * 37 % 900),
        "label": position % 5 if position % 2 else None,
        "width": 40,
        "height": 36,
        "source": f"s{position:04d}",
        "views": [{"box": [0.0, 1.5, 2, 3], "flip": False}],
        "extra": {"b": 1, "a": [0.5, None, 1e-7, 1e22]},
    }


# Raised only together with the version in the manifest: these bytes are the format. The hashes are of what the first
# writer made of these samples, which put them together with tarfile and np.lib.format.
@pytest.mark.parametrize(
    ("codebook_size", "num_views", "num_codes", "num_samples", "sha256_of_tar", "sha256_of_index"),
    [
        (1024, 2, 4, 3, "8da0c2334d59a5f91c2b31b8f9f465ba", "aa7ed55559a43874ce3884bfd24d76a0"),
        (16384, 10, 256, 40, "cea7328de58d32dc4ad69eff7767ee13", "0d9aa449d73321ea4c889adad80afb4c"),
        (65536, 1, 64, 17, "e9b3ef675d1cb4dae9f559f017d65ba6", "ac0bbb28c5a8bf38e55165679e013c16"),
        (65537, 1, 64, 9, "73a5182e430b296927cdb7a9c4262a9d", "cb590443da7f92d5a608b8825c79429f"),
    ],
)
def test_bytes_are_those_of_the_format(
    tmp_path: Path,
    codebook_size: int,
    num_views: int,
    num_codes: int,
    num_samples: int,
    sha256_of_tar: str,
    sha256_of_index: str,
) -> None:
    with ShardWriter(tmp_path / "a.tar", codebook_size=codebook_size) as writer:
        for position in range(num_samples):
            codes = np.arange(num_views * num_codes).reshape(num_views, num_codes) * (position + 7) % codebook_size
            metadata = odd_metadata(position)
            writer.add(ShardSample(key=f"{position:09d}", codes_VT=codes.astype(np.int32), metadata=metadata))
        written = writer.close()
    assert hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()[:32] == sha256_of_tar
    assert hashlib.sha256(written.index).hexdigest()[:32] == sha256_of_index


def test_members_carry_no_time_user_or_group(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
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


@pytest.mark.parametrize(("name", "size"), [("1.json", 0), ("0" * 95 + ".json", 511), ("12.codes.npy", 512)])
def test_members_are_those_of_tarfile(name: str, size: int) -> None:
    theirs = io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size = size
        tar.addfile(member, io.BytesIO(b"x" * size))
        end = tar.offset
    assert member_bytes(name, b"x" * size) == theirs.getvalue()[:end]


@pytest.mark.parametrize("shape", [(1, 64), (10, 256), (144, 1), (123456, 1), (0, 5)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_codes_are_stored_as_numpy_saves_them(shape: tuple[int, int], dtype: type) -> None:
    codes = np.random.default_rng(0).integers(0, 60000, shape).astype(dtype)
    theirs = io.BytesIO()
    np.save(theirs, codes)
    assert npy_of_codes(codes) == theirs.getvalue()
    assert npy_of_codes(np.asfortranarray(codes)) == theirs.getvalue()
    read = codes_of_npy(theirs.getvalue())
    assert (read.dtype, read.shape) == (codes.dtype, codes.shape)
    np.testing.assert_array_equal(read, codes)
    assert read.flags.writeable


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros(4, np.uint16), np.zeros((2, 2), np.uint16, order="F")])
def test_an_npy_of_another_kind_is_refused(array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    with pytest.raises(ValueError, match="npy header"):
        codes_of_npy(buffer.getvalue())


def test_the_index_has_the_offset_of_each_sample_and_of_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    with tarfile.open(path) as tar:
        expected = [member.offset for member in tar if member.name.endswith(".codes.npy")]
        expected.append(tar.offset)  # where tarfile stopped: Energon's last entry
    offsets = struct.unpack("<4Q", Path(f"{path}.idx").read_bytes())
    assert list(offsets) == expected
    assert path.stat().st_size % 10240 == 0


def test_the_index_of_a_tar_is_found_in_its_headers(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar", codebook_size=65536) as writer:
        for position, sample in enumerate(samples(30)):
            writer.add(dataclasses.replace(sample, metadata=odd_metadata(position)))  # of 1 to 3 blocks
        writer.close()
    with tarfile.open(tmp_path / "a.tar") as tar:
        offsets = [member.offset for member in tar if member.name.endswith(".codes.npy")]
        offsets.append(tar.offset)
    assert index_of((tmp_path / "a.tar").read_bytes()) == struct.pack("<31Q", *offsets)


@pytest.mark.parametrize("num_samples", [1, 4, 1000])
def test_closing_returns_size_hash_and_number_of_samples(tmp_path: Path, num_samples: int) -> None:
    with ShardWriter(tmp_path / "a.tar", codebook_size=200000) as writer:
        for number, sample in enumerate(samples(num_samples)):
            assert (writer.num_samples, writer.num_bytes) == (number, 2048 * number)
            writer.add(sample)
        written = writer.close()
    content = (tmp_path / "a.tar").read_bytes()
    assert written == WrittenShard(
        index=struct.pack(f"<{num_samples + 1}Q", *range(0, 2048 * num_samples + 1, 2048)),
        num_samples=num_samples,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    info = written.info("00007.tar")
    assert (info.name, info.num_samples, info.bytes) == ("00007.tar", num_samples, len(content))


def test_a_write_that_went_wrong_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with ShardWriter(path, codebook_size=1024) as writer:
        for sample in samples():
            writer.add(sample)
        written = writer.close()
    check_written(path, written)
    whole = path.read_bytes()
    for wrong in (whole[:-512], whole[:700] + b"\x01" + whole[701:], b""):
        path.write_bytes(wrong)
        with pytest.raises(OSError, match=r"a\.tar.*check the disk"):
            check_written(path, written)


@pytest.mark.parametrize(("codebook_size", "dtype"), [(65536, np.uint16), (65537, np.int32)])
def test_samples_read_back_in_any_order(tmp_path: Path, codebook_size: int, dtype: type) -> None:
    path = write(tmp_path / "00000.tar", codebook_size=codebook_size)
    reader = reader_of(path)
    assert reader.num_samples == 3
    for position in (2, 0, 1):
        sample, written = reader.sample(position), samples()[position]
        assert sample.key == written.key
        assert sample.metadata == written.metadata
        assert sample.codes_VT.dtype == dtype
        np.testing.assert_array_equal(sample.codes_VT, written.codes_VT)
    assert [sample.key for sample in read_shard(LocalStorage(tmp_path), "00000.tar")] == [
        "000000000",
        "000000001",
        "000000002",
    ]
    with pytest.raises(IndexError, match=r"\[0, 3\), got 3"):
        reader.sample(3)


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == ["000000000", "000000001", "000000002"]
    np.testing.assert_array_equal(read[1]["codes.npy"], np.array([[100, 101, 102, 103], [104, 105, 106, 107]]))
    assert read[1]["codes.npy"].dtype == np.uint16
    assert read[1]["json"] == {"label": 1, "caption": "naïve\nthing", "extra": {"b": 1, "a": [0.5, None]}}


def test_a_sample_that_would_not_fit_the_format_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    good = samples(1)[0]
    codes = np.zeros((1, 2), dtype=np.uint16)
    with ShardWriter(tmp_path / "a.tar", codebook_size=1024) as writer:
        for bad in ([[0, 1024]], [[-1, 0]], [0, 1]):
            with pytest.raises(ValueError, match="codes must be"):
                writer.add(ShardSample(key="0", codes_VT=np.array(bad, dtype=np.int32), metadata={}))
        for key in ("a.b", "", "٣", "1" * 91):
            with pytest.raises(ValueError, match="key must be 1 to 90 digits"):
                writer.add(ShardSample(key=key, codes_VT=codes, metadata={}))
        with pytest.raises(ValueError, match="JSON"):
            writer.add(ShardSample(key="0", codes_VT=codes, metadata={"score": float("nan")}))
        writer.add(good)
        written = writer.close()
    with ShardWriter(tmp_path / "b.tar", codebook_size=1024) as writer:
        writer.add(good)
        assert writer.close() == written


def test_canonical_json_does_not_depend_on_insertion_order() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode() == canonical_json({"a": "ü", "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("inf"))


def test_canonical_json_is_that_of_the_json_module() -> None:
    for position in range(20):
        value = odd_metadata(position)
        theirs = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        assert canonical_json(value) == theirs.encode()


@pytest.mark.parametrize(
    "index",
    [b"", b"\0" * 8, struct.pack("<2Q", 512, 0), struct.pack("<2Q", 0, 1 << 63), struct.pack("<3Q", 0, 1000, 4096)],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, index: bytes) -> None:
    path = write(tmp_path / "00000.tar")
    whole_index = index_path(path).read_bytes()
    for wrong in (index, whole_index[:-1], whole_index + struct.pack("<Q", 10241), whole_index[8:]):
        with pytest.raises(ArtifactError, match=r"00000\.tar: its index must fit a tar of 10240 bytes"):
            ShardReader(path.read_bytes(), index=wrong, where="00000.tar")


def test_a_missing_tar_or_index_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    index_path(path).unlink()
    with pytest.raises(
        ArtifactError, match=r"open shard .*00000\.tar: tar and index must be readable.*00000\.tar\.idx"
    ):
        reader_of(path)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"open shard .*00000\.tar"):
        next(read_shard(LocalStorage(tmp_path), "00000.tar"))


@pytest.mark.parametrize(
    ("number", "action"),
    [
        (errno.ENOENT, "remove it and rerun the tokenize job to rewrite it"),
        (errno.EMFILE, "raise ulimit -n or lower data.shuffle_window_shards"),
        (errno.ENFILE, "raise ulimit -n or lower data.shuffle_window_shards"),
        (errno.ENOMEM, "raise ulimit -n or lower data.shuffle_window_shards"),
        (errno.EIO, "check the disk and run the same command again"),
    ],
)
def test_only_a_shard_that_is_missing_is_to_be_written_again(number: int, action: str) -> None:
    assert action_of_open(OSError(number, "said")) == action


def test_a_shard_that_may_not_be_read_is_left_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "00000.tar")
    monkeypatch.chdir(tmp_path)
    said = r"open shard \./00000\.tar: .* Permission denied.*; give the user of the job permission to read it$"
    with forbidden(path), pytest.raises(ArtifactError, match=said):
        open_shard(LocalStorage(Path()), path.name)


def test_every_changed_byte_of_structure_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar", num=2)
    whole, index = path.read_bytes(), index_path(path).read_bytes()
    reader = ShardReader(whole, index=index, where="w")
    assert reader.check_structure() == []
    num_json_bytes = len(canonical_json(samples()[0].metadata))
    contents = {*range(512, 512 + 144), *range(1536, 1536 + num_json_bytes)}
    contents |= {2048 + byte for byte in contents}
    for position in range(len(whole)):
        for flipped_bit in (0x01, 0x80):
            changed = bytearray(whole)
            changed[position] ^= flipped_bit
            problems = ShardReader(bytes(changed), index=index, where="w").check_structure()
            assert len(problems) == (0 if position in contents else 1), position
            if problems and position < 4096:
                assert f"sample {position // 2048} " in problems[0]
                with pytest.raises(ArtifactError, match=f"sample {position // 2048} "):
                    ShardReader(bytes(changed), index=index, where="w").sample(position // 2048)


def test_every_cut_and_every_addition_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar", num=4)
    whole, index = path.read_bytes(), index_path(path).read_bytes()
    assert len(whole) == 10240
    others = [whole[:cut] for cut in range(len(whole))]
    others += [whole + bytes(512), whole + whole, whole + bytes(10240), whole[:9000] + b"x" + whole[9001:]]
    for other in others:
        try:
            problems = ShardReader(other, index=index, where="w").check_structure()
        except ArtifactError as error:
            problems = [str(error)]
        assert len(problems) == 1, len(other)
        assert problems[0].endswith("remove it and rerun the tokenize job to rewrite it")


def test_an_index_that_passes_a_sample_by_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar", num=4)
    offsets = struct.unpack("<5Q", index_path(path).read_bytes())
    for wrong in (offsets[:2] + offsets[3:], offsets[:4], (0, 1024, *offsets[1:])):
        index = struct.pack(f"<{len(wrong)}Q", *wrong)
        assert len(ShardReader(path.read_bytes(), index=index, where="w").check_structure()) == 1


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff"])
def test_metadata_that_is_no_json_object_is_named(content: bytes) -> None:
    codes = member_bytes("7.codes.npy", npy_of_codes(np.zeros((1, 4), dtype=np.uint16)))
    data = codes + member_bytes("7.json", content)
    reader = ShardReader(data, index=struct.pack("<2Q", 0, len(data)), where="x.tar")
    with pytest.raises(ArtifactError, match=r"read shard x\.tar: sample 0 must be codes and JSON of one key"):
        reader.sample(0)


@pytest.mark.parametrize(
    "names", [("7.json", "7.codes.npy"), ("7.npy", "7.json"), ("7.codes.npy", "8.json"), ("a.codes.npy", "a.json")]
)
def test_members_of_two_keys_or_other_names_are_no_sample(names: tuple[str, str]) -> None:
    data = member_bytes(names[0], npy_of_codes(np.zeros((1, 4), dtype=np.uint16))) + member_bytes(names[1], b"{}")
    with pytest.raises(ArtifactError, match="sample 0 must be codes and JSON of one key"):
        ShardReader(data, index=struct.pack("<2Q", 0, len(data)), where="x.tar").sample(0)


def test_damaged_codes_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "00000.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[:600] + b"\xff" * 30 + whole[630:])
    with pytest.raises(ArtifactError, match=r"00000\.tar: sample 0 .*npy header"):
        reader_of(path).sample(0)
    assert reader_of(path).sample(1).key == "000000001"


def test_metadata_survives_as_plain_json(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path / "00000.tar")) as tar:
        content = tar.extractfile("000000002.json")
        assert content is not None
        assert json.load(content)["label"] == 2
