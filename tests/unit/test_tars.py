"""The tar reader: what tarfile reads of whole tars of every make, and an error for anything cut, damaged or odd."""

import bz2
import gzip
import io
import itertools
import lzma
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import webdataset
from toy_corpus import png

from pipeline.storage import ArtifactError
from pipeline.tars import READ_BYTES, read_members

Contents = list[tuple[str, bytes]]
NAMES = [
    "a.png",
    "a.json",
    "dir/b.png",
    "x" * 99 + ".p",
    "d/" * 60 + "long.png",
    "y" * 130 + ".png",
    "caf\xe9.png",
    "e",
]


class Stream:
    """A file with `read` only, which returns at most a few bytes at a time."""

    def __init__(self, data: bytes, *, piece_bytes: int) -> None:
        self._rest, self._piece_bytes = io.BytesIO(data), piece_bytes

    def read(self, num_bytes: int) -> bytes:
        return self._rest.read(min(num_bytes, self._piece_bytes))


def read(data: bytes) -> Contents:
    members = read_members(io.BytesIO(data), where="t.tar")
    return [(member.name, member.data) for member in members if member.data is not None]  # no links


def read_with_tarfile(data: bytes) -> Contents:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]  # type: ignore[union-attr]


def links(data: bytes) -> list[str]:
    return [member.name for member in read_members(io.BytesIO(data), where="t.tar") if member.data is None]


def refusal(data: bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        read(data)
    return str(caught.value)


def outcome(data: bytes) -> str:
    """What is wrong with a tar; nothing if it reads as a whole tar."""
    try:
        read(data)
    except ArtifactError as error:
        return str(error)
    return ""


def contents(names: list[str]) -> Contents:
    sizes = itertools.cycle([0, 1, 511, 512, 513, 5000])
    return [(name, bytes([65 + number]) * size) for number, (name, size) in enumerate(zip(names, sizes, strict=False))]


def make_tar(members: Contents, *, tar_format: int = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, pax_headers=fields.pop("pax_headers", None)) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header_of(name: str, *, kind: bytes = b"0", size: int = 0) -> bytearray:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return bytearray(info.tobuf(tarfile.GNU_FORMAT))


def mend_checksum(block: bytearray) -> bytearray:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: bytes, *, kind: bytes = b"x") -> bytes:
    return bytes(header_of("pax", kind=kind, size=len(records))) + padded(records)


def record(keyword: str, value: str) -> bytes:
    """A PAX record, its length found by trying."""
    return next(
        text
        for length in range(1000)
        if len(text := f"{length} {keyword}={value}\n".encode("utf-8", "surrogateescape")) == length
    )


@pytest.mark.parametrize(
    ("tar_format", "names"),
    [
        (tarfile.GNU_FORMAT, NAMES),
        (tarfile.PAX_FORMAT, NAMES),
        (tarfile.USTAR_FORMAT, [name for name in NAMES if len(name) < 100 or "/" in name]),
    ],
)
def test_members_are_those_of_tarfile(tar_format: int, names: list[str]) -> None:
    data = make_tar(contents(names), tar_format=tar_format, mtime=1700000000.25, uname="someone")
    assert read(data) == contents(names) == read_with_tarfile(data)


def test_names_that_are_not_utf8_are_surrogate_escaped() -> None:
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = contents(["caf\udce9.png", "\udcff" * 120 + ".png"])
        data = make_tar(members, tar_format=tar_format)
        assert read(data) == members == read_with_tarfile(data)


def test_offsets_are_those_of_tarfile() -> None:
    data = make_tar(contents(NAMES), tar_format=tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [info.offset for info in tar]
    assert [member.offset for member in read_members(io.BytesIO(data), where="t.tar")] == expected


@pytest.mark.parametrize("piece_bytes", [1, 100, 512, 5001])
def test_a_stream_may_give_a_few_bytes_at_a_time(piece_bytes: int) -> None:
    data = make_tar(contents(NAMES))
    stream: Any = Stream(data, piece_bytes=piece_bytes)
    assert [(member.name, member.data) for member in read_members(stream, where="t.tar")] == contents(NAMES)


def test_members_may_straddle_and_exceed_what_is_read_at_once() -> None:
    members = [(f"{number}.bin", random.Random(number).randbytes(size)) for number, size in enumerate([300_001] * 9)]
    members += [("big.bin", random.Random(9).randbytes(2 * READ_BYTES + 77)), ("z.json", b"{}")]
    data = make_tar(members)
    assert read(data) == members
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = [info.offset for info in tar]
    assert [member.offset for member in read_members(io.BytesIO(data), where="t.tar")] == offsets


def test_a_tar_without_members_is_empty() -> None:
    assert read(bytes(10240)) == []
    assert "cut short at byte 0" in refusal(b"")


def test_webdataset_tars_read_the_same(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"d.v1/{number:09d}", "png": png(number), "json": {"n": number}, "cls": number})
    data = (tmp_path / "t.tar").read_bytes()
    assert read(data) == read_with_tarfile(data)
    assert len(read(data)) == 15


def test_img2dataset_tars_read_the_same() -> None:
    # img2dataset writes through webdataset's TarWriter: jpg, json and txt under 9 digits, mode 0444, user `bigdata`.
    members = [
        (f"{number:09d}.{extension}", f"{number}{extension}".encode() * 99)
        for number in range(5)
        for extension in ("jpg", "json", "txt")
    ]
    data = make_tar(members, mode=0o444, uname="bigdata", gname="bigdata", mtime=1700000000.0)
    assert read(data) == members == read_with_tarfile(data)


@pytest.mark.parametrize("tar_format", ["gnu", "oldgnu", "posix", "ustar", "v7"])
def test_tars_of_the_tar_command_read_the_same(tmp_path: Path, tar_format: str) -> None:
    tar_command = shutil.which("tar")
    if tar_command is None:
        pytest.skip("no tar command")
    root = tmp_path / "corpus"
    names = ["b.png", "sub/c.json"]
    names += [] if tar_format == "v7" else ["d/" * 60 + "long.png"]
    names += [] if tar_format in ("v7", "ustar") else ["y" * 130 + ".png", "caf\xe9.png"]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number]) * 700 * number)
    (root / "link").symlink_to("b.png")
    (root / "sub" / "hard.png").hardlink_to(root / "sub" / "c.json")
    command = [tar_command, f"--format={tar_format}", "-C", str(root), "-cf", str(tmp_path / "t.tar"), "."]
    subprocess.run(command, check=True)
    data = (tmp_path / "t.tar").read_bytes()
    assert read(data) == read_with_tarfile(data)
    assert len(read(data)) == len(names)
    with tarfile.open(tmp_path / "t.tar") as tar:
        expected = [info.name for info in tar if info.islnk() or info.issym()]
    assert (links(data), len(expected)) == (expected, 2)


def test_everything_but_plain_files_and_links_is_passed_by() -> None:
    blocks = [bytes(header_of(f"{kind!r}", kind=kind)) for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"V")]
    blocks += [bytes(header_of("old directory/", kind=b"\0"))]
    blocks += [bytes(header_of(f"{kind!r}.png", kind=kind, size=3)) + padded(b"abc") for kind in (b"\0", b"0", b"7")]
    data = b"".join(blocks) + bytes(1024)
    assert read(data) == [("b'\\x00'.png", b"abc"), ("b'0'.png", b"abc"), ("b'7'.png", b"abc")]
    assert read_with_tarfile(data) == read(data)
    assert links(data) == ["b'1'", "b'2'"]


def test_pax_fields_replace_those_of_the_header() -> None:
    fields = (
        record("path", "caf\xe9/\udcff.png") + record("size", "5") + record("mtime", "1.5") + record("comment", "=")
    )
    data = pax(record("comment", "by git"), kind=b"g") + pax(fields) + bytes(header_of("short", size=7))
    data += padded(b"hello") + bytes(header_of("next.json", size=2)) + padded(b"{}") + bytes(1024)
    assert read(data) == [("caf\xe9/\udcff.png", b"hello"), ("next.json", b"{}")] == read_with_tarfile(data)


def test_sizes_may_be_in_base_256() -> None:
    block = header_of("a.png", size=5)
    block[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data = bytes(mend_checksum(block)) + padded(b"hello") + bytes(1024)
    assert read(data) == [("a.png", b"hello")] == read_with_tarfile(data)


def test_checksums_of_signed_bytes_are_accepted() -> None:
    block = header_of("\xe9", size=5)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(memoryview(block).cast("b"))
    data = bytes(block) + padded(b"hello") + bytes(1024)
    assert read(data) == [("\xe9", b"hello")] == read_with_tarfile(data)


def test_every_cut_that_loses_content_is_found() -> None:
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = make_tar(contents(["a.png", "y" * 130, "z.json"]), tar_format=tar_format)
        end = len(data.rstrip(b"\0")) + -len(data.rstrip(b"\0")) % 512
        for cut in range(end + 512):
            assert "cut short at byte" in refusal(data[:cut]), cut
        for cut in range(end + 512, len(data)):  # nothing is lost, and yet half a block tells of a cut
            if cut % 512:
                assert "whole zero blocks" in refusal(data[:cut]), cut
            else:
                assert read(data[:cut]) == read(data)


def test_every_flipped_bit_of_a_header_is_found() -> None:
    data = make_tar([("a.png", b"hello"), ("dir/b.png", b"world")])
    for start in (0, 1024):
        for bit in range(512 * 8):
            flipped = bytearray(data)
            flipped[start + bit // 8] ^= 1 << bit % 8
            message = outcome(bytes(flipped))
            if message or bit // 8 not in range(148, 156):
                assert f"zero blocks at byte {start}, got" in message, bit
            else:  # a space is as good as a 0 before the checksum's digits, and as a NUL after them
                assert read(bytes(flipped)) == read(data), bit


@pytest.mark.parametrize(
    ("compress", "name"),
    [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")],
)
def test_a_compressed_tar_is_named(compress: Callable[[bytes], bytes], name: str) -> None:
    message = refusal(compress(make_tar([("a.png", random.Random(0).randbytes(2000))])))
    assert message == f"read t.tar: must be an uncompressed tar, got {name}; decompress it before tokenizing"


def test_a_short_compressed_tar_and_zstd_are_named() -> None:
    assert "got gzip" in refusal(gzip.compress(make_tar([("a.png", b"")])))
    assert "got zstd" in refusal(b"\x28\xb5\x2f\xfd" + bytes(600))
    behind_a_member = make_tar([("a.png", b"hello")])[:1024] + gzip.compress(b"x" * 100) + bytes(1024)
    assert "header or zero blocks at byte 1024, got a wrong checksum" in refusal(behind_a_member)


def test_what_is_no_tar_is_refused() -> None:
    for data in (random.Random(0).randbytes(10240), b"<html>" * 1000, b" " * 512, b"\xff" * 1024):
        assert "must be an uncompressed tar with a header or zero blocks at byte 0, got" in refusal(data)


def test_joined_tars_are_refused() -> None:
    data = make_tar([("a.png", b"hello")])
    assert refusal(data + data).endswith("nothing may follow the end of a tar, got more data; split joined tars")
    assert "split joined tars" in refusal(data + bytes(3 * READ_BYTES) + b"x")
    assert read(data + bytes(10240)) == [("a.png", b"hello")]


def test_what_cannot_be_read_exactly_is_refused(tmp_path: Path) -> None:
    end = bytes(1024)
    plain = bytes(header_of("a.png", size=5)) + padded(b"hello") + end
    long_name = bytes(header_of("././@LongLink", kind=b"L", size=4)) + padded(b"abc\0")
    sparse = record("GNU.sparse.major", "1")
    cases = {
        "type 'S'": bytes(header_of("a", kind=b"S")) + end,
        "type 'M'": bytes(header_of("a", kind=b"M", size=5)) + padded(b"hello") + end,
        "type '2' has no content, got 5 bytes": bytes(header_of("a", kind=b"2", size=5)) + padded(b"hello") + end,
        "a sparse member": pax(sparse) + plain,
        "one name or size for all members": pax(record("path", "b"), kind=b"g") + plain,
        "two names or sizes": long_name + pax(record("path", "b")) + plain,
        "a name or size that is none: {b'size': b'-5'}": pax(record("size", "-5")) + plain,
        "none: {b'path': b''}": pax(record("path", "/")) + plain,
        "none: {b'size': b'5/'}": pax(record("size", "5/")) + plain,
        "a record without a length": pax(b"x path=b\n") + plain,
        "a record that is not its 8 bytes long": pax(b"8 path=b\n") + plain,
        "a record that is not its 99 bytes long": pax(b"99 path=b\n") + plain,
        "more than its 3 bytes": bytes(header_of("././@LongLink", kind=b"L", size=3)) + padded(b"abcd") + plain,
        "no member after it": long_name + end,
        "above 1048576": bytes(header_of("a", kind=b"x", size=1 << 40)) + end,
        "cut short at byte 2048": bytes(header_of("a", size=1 << 62)) + end + bytes(512),
    }
    for expected, data in cases.items():
        message = refusal(data)
        assert expected in message, (expected, message)
        assert message.startswith("read t.tar: ")
        assert "\n" not in message


def test_number_fields_must_be_numbers() -> None:
    for field, expected in (
        (b"0x000000005\0", "for a number"),
        (b"00000000009\0", "base 8"),
        (b"-0000000005\0", "for a"),
    ):
        block = header_of("a.png", size=5)
        block[124:136] = field
        assert expected in refusal(bytes(mend_checksum(block)) + padded(b"hello") + bytes(1024))
    negative = header_of("a.png", size=5)
    negative[124:136] = b"\xff" * 12
    assert "for a number" in refusal(bytes(mend_checksum(negative)) + padded(b"hello") + bytes(1024))


def test_a_gnu_header_with_times_in_the_place_of_the_prefix_is_refused() -> None:
    block = header_of("a.png", size=5)  # magic "ustar  \0": bytes 345... are atime and ctime in incremental dumps
    block[345:357] = b"14371536201\0"
    assert "GNU incremental dump" in refusal(bytes(mend_checksum(block)) + padded(b"hello") + bytes(1024))


def test_a_file_that_cannot_be_read_is_an_artifact_error(tmp_path: Path) -> None:
    file: IO[bytes] = (tmp_path / "t.tar").open("wb")
    with file, pytest.raises(ArtifactError, match=r"read t\.tar: must be readable"):
        list(read_members(file, where="t.tar"))


@pytest.mark.parametrize("seed", range(8))
def test_headers_changed_at_random_read_as_in_tarfile_or_are_refused(seed: int) -> None:
    draw = random.Random(seed)
    tar_format = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[seed % 3]
    whole = make_tar(contents(["a.png", "d/" * 60 + "b.png", "caf\xe9.json"]), tar_format=tar_format)
    headers = [start for start in range(0, len(whole), 512) if whole[start + 257 : start + 262] == b"ustar"]
    fields = [(0, 100), (124, 136), (156, 157), (257, 265), (345, 500)]
    alphabet = b"\0\0 01234567/.xgLKSV\x80\xff"
    num_read = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            start = draw.choice(headers)
            first, last = draw.choice(fields)
            data[start + draw.randrange(first, last)] = draw.choice(alphabet)
            data[start : start + 512] = mend_checksum(data[start : start + 512])
        try:
            ours = read(bytes(data))
        except ArtifactError:
            continue
        num_read += 1
        assert ours == read_with_tarfile(bytes(data))
    assert num_read > 40


@pytest.mark.parametrize("seed", range(4))
def test_pax_headers_changed_at_random_read_as_in_tarfile_or_are_refused(seed: int) -> None:
    draw = random.Random(seed)
    fields = record("path", "caf\xe9/b.png") + record("size", "5") + record("comment", "x")
    whole = pax(fields) + bytes(header_of("short", size=5)) + padded(b"hello")
    whole += bytes(header_of("next.json", size=2)) + padded(b"{}") + bytes(1024)
    num_read = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 2)):
            data[512 + draw.randrange(len(fields))] = draw.choice(b"0123456789=\n x\0path/size")
        try:
            ours = read(bytes(data))
        except ArtifactError:
            continue
        num_read += 1
        assert ours == read_with_tarfile(bytes(data)), bytes(data[512:640])
    assert num_read > 40
