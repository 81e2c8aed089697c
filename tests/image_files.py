"""Image files built byte by byte or by Pillow, for tests that need a file to be wrong or odd in one known way."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
TIFF_TYPE_BYTES = {1: 1, 3: 2, 4: 4}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_image(width: int, height: int, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth_image(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, as a photograph has."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((smooth + generator.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_file(
    width: int,
    height: int,
    *,
    depth: int,
    colour: int,
    rows: list[bytes],
    before: tuple[tuple[bytes, bytes], ...] = (),
    interlace: int = 0,
) -> bytes:
    """A PNG of these unfiltered rows, with other chunks (kind, body) before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = ((b"IHDR", header), *before, (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in chunks)


def insert_png_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """The same PNG with one more chunk after the header."""
    return png[:33] + png_chunk(kind, body) + png[33:]


def damage_png_checksum(png: bytes, kind: bytes) -> bytes:
    """The same PNG with one bit of the first such chunk's checksum flipped."""
    at = png.index(kind)
    checksum = at + 4 + int.from_bytes(png[at - 4 : at], "big")
    return png[:checksum] + bytes([png[checksum] ^ 1]) + png[checksum + 1 :]


def tiff_file(
    width: int,
    height: int,
    *,
    bits: tuple[int, ...],
    photometric: int,
    strips: list[bytes],
    tags: dict[int, tuple[int, ...]] | None = None,
    compression: int = 1,
    big_endian: bool = False,
) -> bytes:
    """A TIFF of one page: these strips, these tags (of 32 bits if above 65535) in addition or instead."""
    order = ">" if big_endian else "<"
    stored = [zlib.compress(strip) if compression == 8 else strip for strip in strips]
    values: dict[int, tuple[int, ...]] = {
        256: (width,),
        257: (height,),
        258: bits,
        259: (compression,),
        262: (photometric,),
        273: tuple(sum(map(len, stored[:index])) for index in range(len(stored))),
        277: (len(bits),),
        278: (height,),
        279: tuple(map(len, stored)),
    } | (tags or {})
    values = {tag: entry for tag, entry in values.items() if entry}
    kinds = {tag: 4 if tag in (273, 279, 324, 325) or max(entry) > 65535 else 3 for tag, entry in values.items()}
    sizes = {tag: len(entry) * TIFF_TYPE_BYTES[kinds[tag]] for tag, entry in values.items()}
    far = 8 + 2 + 12 * len(values) + 4
    pixels = far + sum(size for size in sizes.values() if size > 4)
    directory, outside = struct.pack(order + "H", len(values)), b""
    for tag, entry in sorted(values.items()):
        shifted = [value + pixels for value in entry] if tag in (273, 324) else entry
        packed = struct.pack(f"{order}{len(entry)}{'H' if kinds[tag] == 3 else 'I'}", *shifted)
        if len(packed) > 4:
            packed, outside = struct.pack(order + "I", far + len(outside)), outside + packed
        directory += struct.pack(order + "HHI", tag, kinds[tag], len(entry)) + packed.ljust(4, b"\0")
    magic = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(order + "I", 8)
    return magic + directory + struct.pack(order + "I", 0) + outside + b"".join(stored)


def jpeg_frame(jpeg: bytes) -> int:
    """Where the body of the SOF segment begins: precision, height, width, components."""
    return next(jpeg.index(marker) + 4 for marker in (b"\xff\xc0", b"\xff\xc2") if marker in jpeg)


def exif_block(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()
