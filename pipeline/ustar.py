"""Plain USTAR members, written always the same and read back strictly: what our own tars are made of.

The invariant: `read_member` takes only what `member_bytes` writes, so any changed byte of a header or of padding is
found without a checksum of the content. The bytes are those of tarfile's USTAR_FORMAT with a default TarInfo (mode
0644, no user, group or time), at a tenth of its time.
"""

from __future__ import annotations

TAR_BLOCK_BYTES = 512
MAX_NAME_BYTES = 100
TAR_RECORD_BYTES = 20 * TAR_BLOCK_BYTES
SIZE_FIELD = slice(124, 135)
CHECKSUM_FIELD = slice(148, 156)


def padding_bytes(size: int) -> int:
    """Return how many zero bytes follow a content of `size` bytes to fill its last block."""
    return -size % TAR_BLOCK_BYTES


def member_span(size: int) -> int:
    """Return how many bytes a member takes whose content has `size`: header, content and padding."""
    return TAR_BLOCK_BYTES + size + padding_bytes(size)


def member_bytes(name: str, content: bytes) -> bytes:
    """Return a whole member.

    Args:
        name: ASCII, 1 to `MAX_NAME_BYTES` characters.
        content: below 8 GiB.
    """
    return _header(name.encode("ascii"), size=len(content)) + content + bytes(padding_bytes(len(content)))


def end_of_tar(num_bytes: int) -> bytes:
    """Return what ends a tar whose members take `num_bytes`: two zero blocks, and more to fill a record of 20."""
    return bytes(2 * TAR_BLOCK_BYTES + -(num_bytes + 2 * TAR_BLOCK_BYTES) % TAR_RECORD_BYTES)


def read_member(data: memoryview) -> tuple[str, memoryview]:
    """Return name and content of the member that `data` begins with; the content is a part of `data`.

    Raises:
        ValueError: header or padding are not what `member_bytes` writes, or the data is too short.
    """
    header = bytes(data[:TAR_BLOCK_BYTES])
    name, digits = header[:MAX_NAME_BYTES].rstrip(b"\0"), header[SIZE_FIELD]
    if not digits.isdigit() or header != _header(name, size=int(digits, 8)):
        raise ValueError("a damaged header")
    end = TAR_BLOCK_BYTES + int(digits, 8)
    if data[end : end + padding_bytes(end)] != bytes(padding_bytes(end)):
        raise ValueError("damaged padding")
    return name.decode("ascii", "replace"), data[TAR_BLOCK_BYTES:end]


def _header(name: bytes, *, size: int) -> bytes:
    head = b"%b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00" % (name.ljust(MAX_NAME_BYTES, b"\0"), size)
    return b"%b%06o\x00 0%b" % (head, sum(head) + _SUM_OF_REST, _AFTER_TYPE)


_AFTER_TYPE = bytes(100) + b"ustar\x0000" + bytes(247)  # link name, magic, version, user, group, devices, prefix
_SUM_OF_REST = sum(b" " * 8 + b"0" + _AFTER_TYPE)  # the checksum counts its own field as spaces
