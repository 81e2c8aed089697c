"""Uncompressed tars of any make, read from a stream.

The invariant: what is yielded is what GNU tar and tarfile would extract, byte for byte, or it is an `ArtifactError`. A
tar must end in a zero block, so a cut at any byte that loses content is found; tarfile takes a cut between two members,
or inside a header, for the end. No seeking. A member costs 3 us, 8 with a PAX header; in tarfile seven times that.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, NamedTuple

from pipeline.storage import ArtifactError
from pipeline.ustar import TAR_BLOCK_BYTES, padding_bytes

READ_BYTES = 1 << 20
MAX_EXTENSION_BYTES = 1 << 20
_ZERO_BLOCK = bytes(TAR_BLOCK_BYTES)
_ADLER_MODULUS = 65521

_REGULAR_KINDS = b"0\x007"  # regular, regular before POSIX, contiguous
_LINK_KINDS = b"12"  # hard, symbolic
_SKIPPED_KINDS = b"3456V"  # devices, directories, pipes, volume labels: no content follows their headers
_EXTENSION_KINDS = b"LKxg"  # GNU long name, GNU long link, PAX header of the next member, PAX header of all that follow
_OLD_REGULAR_KIND = 0
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x1f\x9d": "compress",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


class Member(NamedTuple):
    """A regular file of a tar, or a link.

    Attributes:
        name: as stored; bytes that are not UTF-8 are surrogate-escaped, as tarfile does.
        data: the whole content; None for a link, hard or symbolic, which has none of its own.
        offset: byte offset of its first header.
    """

    name: str
    data: bytes | None
    offset: int


def read_members(file: IO[bytes], *, where: str) -> Iterator[Member]:
    """Yield the regular members and the links of a tar in order; directories and devices are passed by.

    Args:
        file: at the start of the tar; needs `read` only, which may return less than it was asked for.
        where: path or URL, for messages.

    Raises:
        ArtifactError: the tar is cut short, damaged, compressed, joined to another, or of a kind that cannot be read
            exactly (sparse members, volumes of a set); members yielded before must then not be trusted to be all.

    Source: POSIX.1-2017 pax, "ustar interchange format"; GNU tar manual, "Basic Tar Format".
    """
    stream = _Stream(file, where=where)
    while True:
        offset = stream.offset
        header = _read_header(stream)
        if header is None:
            break
        if header.kind in _EXTENSION_KINDS:
            header = _read_extended_header(stream, header)
        if header.kind in _REGULAR_KINDS:
            yield Member(header.name.decode("utf-8", "surrogateescape"), stream.take(header.size), offset)
        elif header.kind not in _LINK_KINDS + _SKIPPED_KINDS:
            raise stream.error(f"its members must be plain files, got type {chr(header.kind)!r} at byte {offset}")
        elif header.size:
            raise stream.error(f"a member of type {chr(header.kind)!r} has no content, got {header.size} bytes")
        elif header.kind in _LINK_KINDS:
            yield Member(header.name.decode("utf-8", "surrogateescape"), None, offset)
    stream.check_end()


class _Stream:
    """The bytes of a file in order, read in large pieces."""

    def __init__(self, file: IO[bytes], *, where: str) -> None:
        self._file, self._where = file, where
        self._buffer, self._next = b"", 0
        self._buffer_offset = 0

    @property
    def offset(self) -> int:
        """Byte offset of what is taken next."""
        return self._buffer_offset + self._next

    def take(self, num_bytes: int) -> bytes:
        """Return the next bytes and pass by the padding of their last block."""
        end = self._next + num_bytes
        padded_end = end + padding_bytes(num_bytes)
        if padded_end > len(self._buffer):
            self._fill(padded_end - self._next)
            return self.take(num_bytes)
        data = self._buffer[self._next : end]
        self._next = padded_end
        return data

    def check_end(self) -> None:
        """Check that nothing but whole zero blocks is left."""
        rest, num_left = self._buffer[self._next :], 0
        while rest:
            if rest.strip(b"\0"):
                raise self.error("nothing may follow the end of a tar, got more data", action="split joined tars")
            num_left += len(rest)
            rest = self._read()
        if num_left % TAR_BLOCK_BYTES:
            raise self.error(f"a tar ends in whole zero blocks, got {num_left % TAR_BLOCK_BYTES} bytes of its last")

    def error(self, problem: str, *, action: str = "fetch or write it again") -> ArtifactError:
        """Return the error that says what is wrong with this tar."""
        return ArtifactError(f"read {self._where}: {problem}; {action}")

    def error_at(self, offset: int, problem: str, *, found: bytes) -> ArtifactError:
        """Return the error that says what is wrong at a byte offset, where `found` begins, unless all is compressed."""
        compression = next((name for magic, name in _COMPRESSIONS.items() if found.startswith(magic)), None)
        if offset > 0 or compression is None:
            return self.error(problem)
        return self.error(f"must be an uncompressed tar, got {compression}", action="decompress it before tokenizing")

    def _fill(self, num_bytes: int) -> None:
        """Read on until `num_bytes` can be taken; never asks for what a header claims, which may be any number."""
        pieces = [self._buffer[self._next :]]
        num_read = len(pieces[0])
        while num_read < num_bytes:
            piece = self._read()
            if not piece:
                problem = f"must be a whole tar and end in zero blocks, got cut short at byte {self.offset + num_read}"
                raise self.error_at(self.offset, problem, found=b"".join(pieces))
            pieces.append(piece)
            num_read += len(piece)
        self._buffer_offset += self._next
        self._buffer, self._next = b"".join(pieces), 0

    def _read(self) -> bytes:
        try:
            return self._file.read(READ_BYTES)
        except OSError as error:
            raise self.error(f"must be readable, got {error}") from error


class _Header(NamedTuple):
    """What a header block says: the name as stored, the bytes of content and the type flag."""

    name: bytes
    size: int
    kind: int


def _read_header(stream: _Stream) -> _Header | None:
    """Return the next header block, parsed; None for the zero block that ends a tar."""
    block = stream.take(TAR_BLOCK_BYTES)
    if block == _ZERO_BLOCK:
        return None
    try:
        return _parse_header(block)
    except ValueError as error:
        offset = stream.offset - TAR_BLOCK_BYTES
        problem = f"must be an uncompressed tar with a header or zero blocks at byte {offset}, got {error}"
        raise stream.error_at(offset, problem, found=block) from error


def _parse_header(block: bytes) -> _Header:
    """Return the fields of a header block; a ValueError says what is wrong with it."""
    if not _checksum_fits(block):
        raise ValueError("a wrong checksum")
    name, kind = block[:100].partition(b"\0")[0], block[156]
    if kind == _OLD_REGULAR_KIND and name.endswith(b"/"):
        kind = ord("5")  # how directories were marked before POSIX
    if block[345] and kind not in _EXTENSION_KINDS:
        if block[257:263] != b"ustar\0":
            raise ValueError("fields of a GNU incremental dump or of an old format in place of the name prefix")
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _Header(name, _parse_number(block[124:136]), kind)


def _checksum_fits(block: bytes) -> bool:
    """Return whether the bytes of a header add up to its checksum."""
    wanted = _sum_by_checksum(block[148:156])
    # adler32 holds 1 + the sum of all bytes (mod 65521) in its low half: 20 times the speed of `sum`. The sum is below
    # twice the modulus, so this takes a wrong sum for right only if it is wrong by 65521: 257 or more changed bytes.
    if 0 <= wanted < _ADLER_MODULUS and zlib.adler32(block) & 0xFFFF == (wanted + 1) % _ADLER_MODULUS:
        return True
    return wanted in (sum(block), sum(block[148:156]) + sum(memoryview(block[:148] + block[156:]).cast("b")))


@lru_cache(maxsize=4096)  # the same few hundred in all headers of a tar
def _sum_by_checksum(field: bytes) -> int:
    """Return what a header with this checksum field must add up to; the checksum counts its own field as spaces."""
    return _parse_number(field) - 8 * ord(" ") + sum(field)


@lru_cache(maxsize=4096)
def _parse_number(field: bytes) -> int:
    """Return a number of a header: octal digits, or base 256 after a byte 0x80; empty is 0."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    if not digits.isdigit():
        raise ValueError(f"{digits!r} for a number")
    return int(digits, 8)


def _read_extended_header(stream: _Stream, header: _Header) -> _Header:
    """Return the header that extension headers belong to, with their name and size; `header` is the first of them."""
    offset = stream.offset - TAR_BLOCK_BYTES
    fields: dict[bytes, bytes] = {}
    try:
        while header.kind in _EXTENSION_KINDS:
            if header.size > MAX_EXTENSION_BYTES:
                raise ValueError(f"{header.size} bytes of it, above {MAX_EXTENSION_BYTES}")
            data = stream.take(header.size + padding_bytes(header.size))
            if data[header.size :] != bytes(padding_bytes(header.size)):  # its size is too small; tarfile reads on
                raise ValueError(f"more than its {header.size} bytes")
            more_fields = _extension_fields(header.kind, data[: header.size])
            if more_fields:
                if fields.keys() & more_fields.keys():
                    raise ValueError("two names or sizes")
                fields |= more_fields
            following = _read_header(stream)
            if following is None:
                raise ValueError("no member after it")
            header = following
        if not fields:  # most hold a time
            return header
        size = int(fields[b"size"]) if b"size" in fields else header.size
        return _Header(fields.get(b"path", header.name), size, header.kind)
    except ValueError as error:
        raise stream.error(f"must have a valid extended header at byte {offset}, got {error}") from error


def _extension_fields(kind: int, data: bytes) -> dict[bytes, bytes]:
    """Return `path` and `size` as far as an extension header gives them; a ValueError says why it cannot be read."""
    if kind == ord("L"):
        return {b"path": data.partition(b"\0")[0]}
    if kind == ord("K"):
        return {}
    fields = {}
    for keyword, value in _pax_records(data).items():
        if keyword.startswith(b"GNU.sparse.") or keyword == b"SCHILY.realsize":
            raise ValueError("a sparse member")
        if keyword in (b"path", b"size"):
            fields[keyword] = value.rstrip(b"/") if keyword == b"path" else value  # as tarfile has it
    if not fields:
        return fields
    if kind == ord("g"):
        raise ValueError("one name or size for all members")
    if not fields.get(b"path", b"x") or not fields.get(b"size", b"0").isdigit():
        raise ValueError(f"a name or size that is none: {fields!r}")
    return fields


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of a PAX header, `LENGTH KEYWORD=VALUE` and a newline, LENGTH counting all; the last wins."""
    records = {}
    start = 0
    while start < len(data):
        space = data.find(b" ", start)
        digits = data[start:space]
        if space < 0 or not digits.isdigit() or len(digits) > len(str(MAX_EXTENSION_BYTES)):
            raise ValueError("a record without a length")
        end = start + int(digits)
        keyword, equals, value = data[space + 1 : end].partition(b"=")
        if end > len(data) or not equals or not keyword or not value.endswith(b"\n"):
            raise ValueError(f"a record that is not its {int(digits)} bytes long")
        records[keyword] = value[:-1]
        start = end
    return records
