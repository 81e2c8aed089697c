"""PNG files to pixels: the chunks are read here; native code makes pixels of most inflated rows, Pillow's zip decoder
of the others and wherever something is wrong.

Pillow's own reader checks no checksum of the pixel data, refuses images for the size of their comments, and compares
the transparent colour of 1, 2, 4 and 16 bit images with rescaled pixels. Reading only the chunks that decide about
pixels avoids all that and saves a 64 px image 10 us of 76. Sixteen bits keep their high byte; of an animation the still
image is taken; gamma and colour profiles are not applied.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np
from isal import isal_zlib
from PIL import Image

from tokenization import native
from tokenization.image_rejection import check_num_pixels, undecodable

MAGIC = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33
_HEADER_STRUCT = struct.Struct(">I4sIIBBBBBI")
_CHUNK = struct.Struct(">I4s")
_CHUNKS_OF_PIXELS = frozenset((b"PLTE", b"tRNS", b"IDAT"))
_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGB_ALPHA: 4}
# First column and row, and the steps to the next ones, of each pass of an interlaced image; and of a plain one.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_ONE_PASS = ((0, 0, 1, 1),)
_MAX_NATIVE_PIXELS = 1 << 22
"""Native code holds the rows and the pixels beside the image, so that large ones are left to Pillow."""
_UNSET = 85
_INFLATED_BYTES = 1 << 20
# (bit depth, colour type): Pillow's mode, and its name for the layout of the bits.
_LAYOUTS = {
    (1, _GREY): ("1", "1"),
    (2, _GREY): ("L", "L;2"),
    (4, _GREY): ("L", "L;4"),
    (8, _GREY): ("L", "L"),
    (16, _GREY): ("I;16", "I;16B"),
    (8, _RGB): ("RGB", "RGB"),
    (16, _RGB): ("RGB", "RGB;16B"),
    (1, _PALETTE): ("P", "P;1"),
    (2, _PALETTE): ("P", "P;2"),
    (4, _PALETTE): ("P", "P;4"),
    (8, _PALETTE): ("P", "P"),
    (8, _GREY_ALPHA): ("LA", "LA"),
    (16, _GREY_ALPHA): ("RGBA", "LA;16B"),
    (8, _RGB_ALPHA): ("RGBA", "RGBA"),
    (16, _RGB_ALPHA): ("RGBA", "RGBA;16B"),
}

_Chunks = dict[bytes, bytes | memoryview]


class _Header(NamedTuple):
    """What the rest of the file depends on."""

    width: int
    height: int
    depth: int
    colour: int
    interlace: int


def open_png(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return a PNG's pixels as an image of mode L, LA, RGB or RGBA; its EXIF block, if any, is `info["exif"]`.

    What has an alpha channel may be on white already.

    Args:
        data: a whole file.
        max_pixels: largest width * height that is decoded.

    Raises:
        ImageRejectedError: reason `too_many_pixels`, `truncated` or `corrupt`.

    Source: W3C, Portable Network Graphics (third edition).
    """
    header = _read_header(data)
    check_num_pixels(header.width, header.height, max_pixels=max_pixels)
    chunks = _read_chunks(data)
    image = _rows_on_white(header, chunks) or _unpack_any(header, chunks)
    if b"eXIf" in chunks:
        image.info["exif"] = chunks[b"eXIf"]
    return image


def _read_header(data: bytes) -> _Header:
    if len(data) < _HEADER_END:
        raise undecodable("truncated", f"a PNG header must have {_HEADER_END} bytes, got {len(data)}")
    length, kind, width, height, depth, colour, compression, filtering, interlace, crc = _HEADER_STRUCT.unpack_from(
        data, len(MAGIC)
    )
    known = (length, kind, compression, filtering) == (13, b"IHDR", 0, 0) and (depth, colour) in _LAYOUTS
    if not known or interlace > 1 or width == 0 or height == 0 or zlib.crc32(data[12 : _HEADER_END - 4]) != crc:
        raise undecodable("corrupt", f"the PNG header must be as the standard says, got {data[8:_HEADER_END].hex()}")
    return _Header(width, height, depth, colour, interlace)


def _read_chunks(data: bytes) -> _Chunks:
    """Return the bodies of the chunks that matter, checksums checked; IDAT is joined, and empty if there is none."""
    view = memoryview(data)
    pixels: list[memoryview] = []
    chunks: _Chunks = {}
    begin, end = _HEADER_END, len(data)
    while begin + 8 <= end:
        length, kind = _CHUNK.unpack_from(data, begin)
        stop = begin + 8 + length
        if kind in _CHUNKS_OF_PIXELS:
            if stop + 4 > end:
                raise undecodable("truncated", f"every PNG chunk must be whole, got {kind!r} cut by the file's end")
            if zlib.crc32(view[begin + 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
                raise undecodable("corrupt", f"the checksum of every PNG chunk must fit, got a wrong one of {kind!r}")
            if kind == b"IDAT":
                pixels.append(view[begin + 8 : stop])
            else:
                chunks[kind] = data[begin + 8 : stop]
        elif kind == b"eXIf":
            # Of no account if damaged: whoever reads the block sees that.
            chunks[kind] = data[begin + 8 : stop]
        elif kind == b"IEND":
            break
        begin = stop + 4
    chunks[b"IDAT"] = pixels[0] if len(pixels) == 1 else b"".join(pixels)
    return chunks


def _rows_on_white(header: _Header, chunks: _Chunks) -> Image.Image | None:
    """Return the RGB image of the usual kind of PNG, or None of another, or of one with something wrong."""
    num_channels = _CHANNELS[header.colour]
    is_usual = (header.depth, header.interlace) == (8, 0) and num_channels >= 3
    is_usual &= header.width * header.height <= _MAX_NATIVE_PIXELS
    library = native.library()
    if library is None or not is_usual or (num_channels == 3 and b"tRNS" in chunks):
        return None
    num_bytes = header.height * (1 + header.width * num_channels)
    try:
        rows = isal_zlib.decompressobj().decompress(chunks[b"IDAT"], num_bytes)
    except isal_zlib.error:  # type: ignore[misc]  # its stub calls it a variable
        return None
    if len(rows) < num_bytes:
        return None
    return native.png_rows_on_white(
        rows, width=header.width, height=header.height, num_channels=num_channels, library=library
    )


def _unpack_any(header: _Header, chunks: _Chunks) -> Image.Image:
    mode, layout = _LAYOUTS[header.depth, header.colour]
    image = _unpack(header, mode, layout, chunks[b"IDAT"])
    if mode == "P":
        return _apply_palette(image, chunks)
    if mode in ("1", "I;16") or (b"tRNS" in chunks and mode in ("L", "RGB")):
        return _scale_to_8_bits(image, header, chunks)
    return image


def _unpack(header: _Header, mode: str, layout: str, compressed: bytes | memoryview) -> Image.Image:
    last = header.width - 1, header.height - 1
    image = Image.new(mode, (header.width, header.height), _UNSET)
    unset = image.getpixel(last)
    try:
        image.frombytes(compressed, "zip", (layout, header.interlace))
    except ValueError as error:
        reason = "truncated" if "not enough" in str(error) else "corrupt"
        raise undecodable(reason, f"the pixels of a PNG must be whole zlib data, got: {error}") from error
    # Pillow takes a zlib stream that ends too soon for a whole image; the last pixel then is as it was.
    if header.interlace or image.getpixel(last) == unset:
        _check_num_bytes(header, compressed)
    return image


def _check_num_bytes(header: _Header, compressed: bytes | memoryview) -> None:
    bits = header.depth * _CHANNELS[header.colour]
    missing = 0
    for left, top, step_x, step_y in _PASSES if header.interlace else _ONE_PASS:
        columns, rows = (header.width - left - 1) // step_x + 1, (header.height - top - 1) // step_y + 1
        missing += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    inflate = zlib.decompressobj()
    while missing > 0 and compressed:
        missing -= len(inflate.decompress(compressed, _INFLATED_BYTES))
        compressed = inflate.unconsumed_tail
    if missing > 0:
        raise undecodable("truncated", f"a PNG's zlib data must hold all its rows, got {missing} bytes too few")


def _apply_palette(indices: Image.Image, chunks: _Chunks) -> Image.Image:
    """Return the RGB image, transparent entries already on white, which is the same as blending every pixel."""
    colours = np.frombuffer(chunks.get(b"PLTE", b"")[: 256 * 3], dtype=np.uint8)
    highest = int(np.asarray(indices).max())
    if len(colours) % 3 or highest >= len(colours) // 3:
        raise undecodable("corrupt", f"a PNG's colours must be in its palette, got {highest} of {len(colours) // 3}")
    blended = colours.reshape(-1, 3).astype(np.uint32)
    alphas = np.full(len(blended), 255, dtype=np.uint32)
    given = np.frombuffer(chunks.get(b"tRNS", b""), dtype=np.uint8)[: len(blended)]
    alphas[: len(given)] = given
    blended = (blended * alphas[:, None] + 255 * (255 - alphas[:, None]) + 127) // 255
    indices.putpalette(blended.astype(np.uint8).tobytes())
    return indices.convert("RGB")


def _scale_to_8_bits(image: Image.Image, header: _Header, chunks: _Chunks) -> Image.Image:
    """Return a grey or RGB image at 8 bits, with an alpha channel where the file names a transparent colour."""
    depth, channels = header.depth, _CHANNELS[header.colour]
    key = chunks.get(b"tRNS")
    if key is not None and len(key) != 2 * channels:
        raise undecodable("corrupt", f"a PNG's transparent colour must have {2 * channels} bytes, got {len(key)}")
    if image.mode == "1":
        image = image.convert("L")
    values = np.asarray(image)
    if image.mode == "I;16":
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if key is None:
        return image
    if depth == 16 and channels == 3:
        # The low bytes are what a little-endian reader takes for the high ones.
        low = np.asarray(_unpack(header, "RGB", "RGB;16L", chunks[b"IDAT"]))
        values = values.astype(np.uint16) << 8 | low
    # Samples below 8 bits were stretched to 0..255, and the colour with them.
    colour = np.frombuffer(key, dtype=">u2").astype(np.uint32) * (255 // (2**depth - 1) if depth < 8 else 1)
    matches = (values.reshape(header.height, header.width, channels) == colour).all(axis=-1)
    image.putalpha(Image.fromarray(np.where(matches, 0, 255).astype(np.uint8)))
    return image
