"""JPEG files to pixels, and the damage that libjpeg hides: a missing end painted grey, lost restart markers.

A JPEG has no checksums, so a flipped bit inside the compressed data cannot be told from another picture. What can be
told is told here: each check looks at markers or at one pixel first, and costs an ordinary file microseconds.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from tokenization.image_rejection import check_num_pixels, undecodable

MAGIC = b"\xff\xd8\xff"
MAX_SCANS = 100
"""Scans of a progressive file; encoders write about ten, and each costs a pass over all pixels."""
_SCAN, _RESTART_INTERVAL, _END = 0xDA, 0xDD, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = frozenset(range(0xD0, 0xD9)) | {0x01}
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_SCAN_OR_INTERVAL = re.compile(rb"\xff[\xda\xdd]")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_OTHER_DATA = bytes(range(64))


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """Where a scan's compressed data lies in the file, and how many restart markers it must hold."""

    begin: int
    end: int
    num_restarts: int


def open_jpeg(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return a JPEG's pixels as stored, mode L, RGB or CMYK; four channels are inverted, as all who write them do.

    Args:
        data: a whole file; of several pictures in it (MPO) the first is taken.
        max_pixels: largest width * height that is decoded.

    Raises:
        ImageRejectedError: reason `too_many_pixels`, `too_many_scans`, `truncated` or `corrupt`.
        OSError, SyntaxError, ..: what Pillow raises on damaged files.
    """
    image = JpegImageFile(io.BytesIO(data))
    check_num_pixels(image.width, image.height, max_pixels=max_pixels)
    assert image.fp is not None
    if not image.tile or data.rfind(b"\xff\xd9", image.fp.tell()) < 0:
        raise undecodable("truncated", "a JPEG must have pixels and an end, got a file without")
    _check_markers(data)
    image.load()
    _check_end(data, image)
    return image


def _check_markers(data: bytes) -> None:
    """Refuse endless scans, and scans without the restart markers that the header promises.

    Source: ITU-T T.81, annexes A.2 and B.2.
    """
    # One pass over the bytes, 20 us for 60 KB; only what it finds suspicious is parsed.
    markers = _SCAN_OR_INTERVAL.findall(data)
    if len(markers) <= MAX_SCANS and b"\xff\xdd" not in markers:
        return
    for num_scans, scan in enumerate(_scans(data), start=1):
        if num_scans > MAX_SCANS:
            raise undecodable("too_many_scans", f"a JPEG must have at most {MAX_SCANS} scans, got more")
        if scan.num_restarts == 0:
            continue
        found = [marker[0] & 7 for marker in _RESTART.findall(data, scan.begin, scan.end)]
        # Some encoders write one more at the end.
        if len(found) - scan.num_restarts not in (0, 1) or found != [index % 8 for index in range(len(found))]:
            raise undecodable(
                "corrupt", f"scan {num_scans} must have {scan.num_restarts} restart markers in turn, got {len(found)}"
            )


def _check_end(data: bytes, image: JpegImageFile) -> None:
    """Refuse a file that was cut and closed again: its end is grey, and changes when other data is put there."""
    last = image.getpixel((image.width - 1, image.height - 1))
    channels = last if isinstance(last, tuple) else (last,)
    if not all(channel in (127, 128) for channel in channels):
        return
    end = max((scan.end for scan in _scans(data)), default=len(data))
    other = JpegImageFile(io.BytesIO(data[:end] + _OTHER_DATA + data[end:]))
    other.load()
    if other.tobytes() != image.tobytes():
        raise undecodable("truncated", "the JPEG data must be whole, got an end without pixels")


def _scans(data: bytes) -> Iterator[_Scan]:
    """Yield the scans of the first picture; damaged headers raise IndexError or ZeroDivisionError."""
    at, interval, frame = 2, 0, b""
    while (match := _MARKER.search(data, at)) is not None:
        marker, at = match[1][0], match.end()
        if marker == _END:
            return
        if marker in _BARE_MARKERS:
            continue
        stop = at + int.from_bytes(data[at : at + 2], "big")
        body, at = data[at + 2 : stop], stop
        if marker == _RESTART_INTERVAL:
            interval = int.from_bytes(body, "big")
        elif marker in _FRAMES:
            frame = body
        elif marker == _SCAN:
            after = _END_OF_SCAN.search(data, at)
            end = len(data) if after is None else after.start()
            num_units = _num_coded_units(frame, scan=body) if interval else 0
            yield _Scan(begin=at, end=end, num_restarts=_ceil_divide(num_units, interval) - 1 if interval else 0)
            at = end


def _num_coded_units(frame: bytes, *, scan: bytes) -> int:
    """Return the number of MCUs of a scan, from the bodies of its SOF and SOS segments."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    factors = {frame[at]: (frame[at + 1] >> 4, frame[at + 1] & 15) for at in range(6, 6 + 3 * frame[5], 3)}
    most_x, most_y = (max(pair[axis] for pair in factors.values()) for axis in (0, 1))
    if scan[0] > 1:
        return _ceil_divide(width, 8 * most_x) * _ceil_divide(height, 8 * most_y)
    x, y = factors[scan[1]]
    return _ceil_divide(_ceil_divide(width * x, most_x), 8) * _ceil_divide(_ceil_divide(height * y, most_y), 8)


def _ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)
