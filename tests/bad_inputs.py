"""Bad and odd image files, each with what must become of it: `BAD_INPUTS`, the same in every run.

`expected_reason` is None where the file must be accepted; else `expected_stage` says what rejects it. The pixel limit
that the outcomes hold for is the job's default; no file here is larger than a few megabytes.
"""

import gzip
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from image_files import (
    FORMATS,
    GREY,
    PALETTE,
    RGB,
    RGB_ALPHA,
    damage_png_checksum,
    encoded,
    exif_block,
    insert_png_chunk,
    jpeg_frame,
    noise_image,
    png_chunk,
    png_file,
    smooth_image,
    tiff_file,
)
from PIL import Image

MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class BadInput:
    """One file: `name` is unique and has no dots, `kind` groups files that are bad in the same way."""

    name: str
    data: bytes
    expected_reason: str | None
    kind: str

    @property
    def expected_stage(self) -> str | None:
        if self.expected_reason is None:
            return None
        return "crop" if self.expected_reason == "too_elongated" else "decode"


def not_images() -> Iterator[BadInput]:
    texts = {
        "html": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
        "json": json.dumps({"error": "not found", "status": 404}).encode(),
        "xml": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'><rect width='8' height='8'/></svg>",
        "csv": b"url,caption\nhttp://example.com/a.jpg,a cat\n",
        "utf16": "<html></html>".encode("utf-16"),
        "base64": b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ",
        "data_url": b"data:image/png;base64,iVBORw0KGgo=",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "bm_word": b"BMW builds cars and motorcycles, and this is no bitmap.",
        "p_word": b"P6x is not a pixmap",
        "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "xpm": b'/* XPM */\nstatic char *x[] = {"1 1 1 1", "a c #000", "a"};',
    }
    for name, text in texts.items():
        yield BadInput(f"text_{name}", text, "unknown_format", "text")
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.png"), encoded(noise_image(4, 4)))
    icon = encoded(noise_image(16, 16))
    others = {
        "gzip_of_png": gzip.compress(icon, mtime=0),
        "zip_of_png": zipped.getvalue(),
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "ico": struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 24, len(icon), 22) + icon,
        "ico_huge": struct.pack("<HHHBBBBHHIIIIIHH", 0, 1, 1, 0, 0, 0, 0, 1, 32, 40, 22, 40, 2**30, 2**30, 1, 32),
        "avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "jpeg_xl": b"\xff\x0a" + bytes(30),
        "jpeg_2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(30),
        "psd": b"8BPS\0\x01" + bytes(40),
        "mp4": b"\0\0\0\x20ftypisom" + bytes(40),
        "webm": b"\x1a\x45\xdf\xa3" + bytes(40),
        "riff_wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(30),
        "numpy": b"\x93NUMPY\x01\0" + bytes(40),
        "parquet": b"PAR1" + bytes(40),
        "elf": b"\x7fELF" + bytes(60),
        "mng": b"\x8aMNG\r\n\x1a\n" + bytes(40),
        "qoi": b"qoif" + struct.pack(">II", 4, 4) + b"\3\0" + bytes(20),
    }
    for name, data in others.items():
        yield BadInput(f"other_{name}", data, "unknown_format", "other_format")
    generator = np.random.default_rng(7)
    for index, size in enumerate((1, 2, 3, 8, 16, 100, 1000, 5000, 100_000)):
        yield BadInput(f"random_{index}", b"\0" + generator.bytes(size), "unknown_format", "random_bytes")
    yield BadInput("zeros", bytes(4096), "unknown_format", "random_bytes")
    yield BadInput("ones", b"\xff" * 4096, "unknown_format", "random_bytes")
    yield BadInput("empty", b"", "empty", "empty")


def cut_files() -> Iterator[BadInput]:
    """Files that end early: in the pixels, and in the header."""
    for kind in FORMATS:
        whole = encoded(noise_image(40, 30), kind)
        for percent in (30, 50, 70, 80, 90, 97):
            data = whole[: len(whole) * percent // 100]
            yield BadInput(f"cut_{kind.lower()}_{percent}", data, "truncated", "cut_pixels")
    photograph = encoded(smooth_image(160, 120), "JPEG", progressive=True)
    for percent in (20, 60, 95):
        data = photograph[: len(photograph) * percent // 100]
        yield BadInput(f"cut_progressive_{percent}", data, "truncated", "cut_pixels")
    for kind, sizes in (("PNG", (8, 20, 32)), ("WEBP", (12, 16, 29)), ("GIF", (7, 12, 14)), ("JPEG", (4, 19, 24))):
        for size in sizes:
            data = encoded(noise_image(9, 9), kind)[:size]
            yield BadInput(f"cut_{kind.lower()}_header_{size}", data, "truncated", "cut_header")
    yield BadInput("only_magic_gif", b"GIF89a", "truncated", "cut_header")
    yield BadInput("only_magic_tiff", b"II*\0", "truncated", "cut_header")
    yield BadInput("only_magic_jpeg", b"\xff\xd8\xff", "corrupt", "cut_header")


def damaged_files() -> Iterator[BadInput]:
    """Whole files with something wrong inside."""
    png, palette = encoded(noise_image(20, 20)), encoded(noise_image(20, 20).quantize(16), transparency=0)
    for kind in (b"IHDR", b"IDAT"):
        yield BadInput(f"checksum_{kind.decode()}", damage_png_checksum(png, kind), "corrupt", "png_checksum")
    for kind in (b"PLTE", b"tRNS"):
        yield BadInput(f"checksum_{kind.decode()}", damage_png_checksum(palette, kind), "corrupt", "png_checksum")
    text = insert_png_chunk(png, b"tEXt", b"a\0b")
    yield BadInput("checksum_tEXt", damage_png_checksum(text, b"tEXt"), None, "png_checksum")
    pieces = {
        "no_pixels": png_file(4, 4, depth=8, colour=GREY, rows=[])[:33] + png_chunk(b"IEND", b""),
        "few_rows": png_file(4, 4, depth=8, colour=GREY, rows=[bytes(4)] * 3),
        "unfinished": png[:-12],
    }
    for name, data in pieces.items():
        yield BadInput(f"png_{name}", data, None if name == "unfinished" else "truncated", "png_structure")
    wrong = {
        "no_palette": png_file(2, 1, depth=8, colour=PALETTE, rows=[b"\0\1"]),
        "short_palette": png_file(2, 1, depth=8, colour=PALETTE, rows=[b"\0\2"], before=((b"PLTE", bytes(6)),)),
        "ragged_palette": png_file(2, 1, depth=8, colour=PALETTE, rows=[b"\0\0"], before=((b"PLTE", bytes(7)),)),
        "depth_3": png_file(2, 1, depth=3, colour=GREY, rows=[b"\0"]),
        "colour_5": png_file(2, 1, depth=8, colour=5, rows=[b"\0\0"]),
        "no_width": png_file(0, 4, depth=8, colour=GREY, rows=[b""] * 4),
        "no_height": png_file(4, 0, depth=8, colour=GREY, rows=[]),
        "apple": png[:8] + png_chunk(b"CgBI", bytes(4)) + png[8:],
        "filter_9": png.replace(zlib.compress(b""), b"")[:33]
        + png_chunk(b"IDAT", zlib.compress(b"\x09" + bytes(60)))
        + png_chunk(b"IEND", b""),
        "key_of_3_bytes": insert_png_chunk(png, b"tRNS", bytes(3)),
        "not_zlib": png[:33] + png_chunk(b"IDAT", b"no zlib stream") + png_chunk(b"IEND", b""),
    }
    for name, data in wrong.items():
        yield BadInput(f"png_{name}", data, "corrupt", "png_structure")
    generator = np.random.default_rng(11)
    for index in range(6):
        data = png[:33] + generator.bytes(400 * index + 100)
        yield BadInput(f"png_header_then_random_{index}", data, "truncated", "random_after_header")
    for kind, size in (("GIF", 13), ("BMP", 14), ("TIFF", 8), ("JPEG", 2)):
        for index in range(3):
            whole = encoded(noise_image(20, 20), kind)
            data = whole[:size] + b"\0" + generator.bytes(len(whole))
            reason = {"GIF": "truncated", "TIFF": "corrupt"}.get(kind, "unknown_format")
            yield BadInput(f"{kind.lower()}_header_then_random_{index}", data, reason, "random_after_header")
    for kind in ("PNG", "JPEG", "GIF"):
        whole = encoded(noise_image(60, 60), kind)
        data = whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
        reason = "corrupt" if kind == "PNG" else "truncated"
        yield BadInput(f"zeroed_tail_{kind.lower()}", data, reason, "zeroed_tail")


def damaged_jpegs() -> Iterator[BadInput]:
    whole = encoded(smooth_image(160, 128), "JPEG", quality=90)
    restarts = encoded(smooth_image(160, 128), "JPEG", quality=90, restart_marker_blocks=8)
    frame = jpeg_frame(whole)
    scan = whole.index(b"\xff\xda")
    progressive = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    cases = {
        "restarts_whole": (restarts, None),
        "restarts_lost": (re.sub(rb"\xff[\xd0-\xd7]", b"", restarts), "corrupt"),
        "restart_lost": (restarts.replace(b"\xff\xd3", b"", 1), "corrupt"),
        "restarts_swapped": (restarts.replace(b"\xff\xd3", b"\xff\xd4", 1), "corrupt"),
        "cut_and_closed_30": (whole[: len(whole) * 3 // 10] + b"\xff\xd9", "truncated"),
        "cut_and_closed_60": (whole[: len(whole) * 6 // 10] + b"\xff\xd9", "truncated"),
        "cut_and_closed_95": (whole[: len(whole) * 95 // 100] + b"\xff\xd9", "truncated"),
        "grey_and_whole": (encoded(Image.new("RGB", (40, 40), (128, 128, 128)), "JPEG"), None),
        "headers_only": (whole[:scan] + b"\xff\xd9", "truncated"),
        "endless_scans": (progressive[:-2] + last_scan * 200 + b"\xff\xd9", "too_many_scans"),
        "twelve_bits": (whole[:frame] + b"\x0c" + whole[frame + 1 :], "unsupported_mode"),
        "two_components": (whole[: frame + 5] + b"\x02" + whole[frame + 6 :], "unsupported_mode"),
        "no_height": (whole[: frame + 1] + b"\0\0" + whole[frame + 3 :], "corrupt"),
        "no_tables": (re.sub(rb"\xff\xdb\x00\x43.{65}", b"", whole, flags=re.DOTALL), "corrupt"),
        "unclosed": (whole[:-2], "truncated"),
    }
    for name, (data, reason) in cases.items():
        yield BadInput(f"jpeg_{name}", data, reason, "jpeg_damage")


def bombs() -> Iterator[BadInput]:
    """Headers that promise more than `MAX_PIXELS`, with and without the data."""
    side = 2**31 - 1
    webp = encoded(noise_image(9, 9), "WEBP")
    lossless = encoded(noise_image(9, 9), "WEBP", lossless=True)
    gif = encoded(noise_image(9, 9), "GIF")
    local = gif.index(b",\0\0\0\0\x09\0\x09\0")
    bmp = encoded(noise_image(9, 9), "BMP")
    jpeg = encoded(noise_image(9, 9), "JPEG")
    frame = jpeg_frame(jpeg)
    tile = {273: (), 278: (), 279: (), 322: (60_000,), 323: (60_000,), 324: (0,), 325: (100,)}
    extended = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0" * 2
    files = {
        "png_20000": png_file(20_000, 20_000, depth=8, colour=RGB, rows=[bytes(60_000)]),
        "png_largest": png_file(side, side, depth=16, colour=RGB_ALPHA, rows=[]),
        "png_long": png_file(side, 1, depth=1, colour=GREY, rows=[bytes(1000)]),
        "png_with_data": png_file(12_000, 12_000, depth=1, colour=GREY, rows=[bytes(1500)] * 12_000),
        "gif_screen": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "gif_frame": gif[: local + 5] + b"\xff\xff\xff\xff" + gif[local + 9 :],
        "webp_extended": extended,
        "webp_lossy": webp[:26] + b"\xff\x3f\xff\x3f" + webp[30:],
        "webp_lossless": lossless[:21] + b"\xff\xff\xff\x0f" + lossless[25:],
        "bmp": bmp[:18] + struct.pack("<ii", 100_000, 100_000) + bmp[26:],
        "bmp_upside_down": bmp[:18] + struct.pack("<ii", 100_000, -100_000) + bmp[26:],
        "pnm": b"P6 100000 100000 255 " + bytes(300),
        "pnm_text": b"P3 100000 100000 255 0 0 0",
        "tiff": tiff_file(100_000, 100_000, bits=(8, 8, 8), photometric=2, strips=[bytes(300)]),
        "tiff_tile": tiff_file(10, 10, bits=(8,), photometric=1, strips=[bytes(100)], tags=tile, compression=8),
        "jpeg": jpeg[: frame + 1] + b"\xff\xdc\xff\xdc" + jpeg[frame + 5 :],
    }
    for name, data in files.items():
        yield BadInput(f"bomb_{name}", data, "too_many_pixels", "bomb")


def large_ancillaries() -> Iterator[BadInput]:
    """Small images beside large or damaged metadata, all good."""
    png = encoded(noise_image(12, 12))
    zeros = zlib.compress(bytes(80_000_000), 9)
    chunks = {
        "tEXt_2_MB": (b"tEXt", b"workflow\0" + b"x" * 2_000_000),
        "zTXt_bomb": (b"zTXt", b"Comment\0\0" + zeros),
        "iTXt_bomb": (b"iTXt", b"Comment\0\1\0\0\0" + zeros),
        "iCCP_bomb": (b"iCCP", b"profile\0\0" + zeros),
        "iCCP_damaged": (b"iCCP", b"profile\0\0not zlib"),
        "gAMA_zero": (b"gAMA", bytes(4)),
        "acTL_damaged": (b"acTL", bytes(3)),
        "fcTL_damaged": (b"fcTL", bytes(5)),
        "unknown": (b"abCd", b"?" * 100),
        "eXIf_damaged": (b"eXIf", b"MM\0*" + b"\xff" * 40),
    }
    for name, (kind, body) in chunks.items():
        yield BadInput(f"png_{name}", insert_png_chunk(png, kind, body), None, "metadata")
    for index, exif in enumerate(
        (b"Exif\0\0garbage", b"Exif\0\0MM\0*" + b"\xff" * 30, exif_block(6)[:20], exif_block(99))
    ):
        for kind in ("JPEG", "WEBP"):
            data = encoded(noise_image(12, 8), kind, exif=exif)
            yield BadInput(f"exif_{kind.lower()}_{index}", data, None, "metadata")
    for kind in ("JPEG", "WEBP", "TIFF"):
        data = encoded(noise_image(12, 8), kind, icc_profile=b"no profile" * 20)
        yield BadInput(f"icc_{kind.lower()}", data, None, "metadata")


def odd_sizes() -> Iterator[BadInput]:
    for width, height in ((1, 101), (101, 1), (300, 2), (1, 30_000), (60_000, 3)):
        image = Image.new("RGB", (width, height))
        yield BadInput(f"size_{width}x{height}", encoded(image), "too_elongated", "elongated")
    for kind in FORMATS:
        yield BadInput(f"one_pixel_{kind.lower()}", encoded(noise_image(1, 1), kind), None, "tiny")
    for width, height in ((1, 2), (3, 1), (100, 1), (1, 100)):
        yield BadInput(f"size_{width}x{height}", encoded(noise_image(width, height)), None, "tiny")


def odd_files() -> Iterator[BadInput]:
    """Rare but right: modes, several frames, neighbours in the same file."""
    image = smooth_image(24, 18)
    frames = [smooth_image(24, 18, seed=seed) for seed in range(3)]
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        data = encoded(image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode))
        yield BadInput(f"mode_png_{mode.replace(';', '_')}", data, None, "odd_mode")
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("1", "BMP"), ("P", "BMP"), ("1", "PPM")):
        yield BadInput(f"mode_{kind.lower()}_{mode}", encoded(image.convert(mode), kind), None, "odd_mode")
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        yield BadInput(f"frames_{kind.lower()}", data, None, "several_frames")
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = encoded(image, kind)
        yield BadInput(f"followed_by_zeros_{kind.lower()}", whole + bytes(1000), None, "trailing_data")
        yield BadInput(f"twice_{kind.lower()}", whole * 2, None, "trailing_data")
        yield BadInput(f"after_a_newline_{kind.lower()}", b"\n" + whole, "unknown_format", "leading_data")
        yield BadInput(
            f"after_a_header_{kind.lower()}", b"HTTP/1.1 200 OK\r\n\r\n" + whole, "unknown_format", "leading_data"
        )
    for kind in ("PNG", "JPEG"):
        mangled = encoded(image, kind).decode("utf-8", errors="replace").encode()
        yield BadInput(f"as_utf8_{kind.lower()}", mangled, "unknown_format", "mangled")
    yield BadInput("newlines_png", encoded(image).replace(b"\r\n", b"\n"), "unknown_format", "mangled")


def unsupported_tiffs() -> Iterator[BadInput]:
    grey, two = bytes(range(16)), bytes(32)
    float_format, signed = {339: (3,)}, {339: (2,)}
    cases = {
        "float32": tiff_file(2, 2, bits=(32,), photometric=1, strips=[grey], tags=float_format),
        "uint32": tiff_file(2, 2, bits=(32,), photometric=1, strips=[grey]),
        "int16": tiff_file(2, 2, bits=(16,), photometric=1, strips=[grey[:8]], tags=signed),
        "int8": tiff_file(2, 2, bits=(8,), photometric=1, strips=[grey[:4]], tags=signed),
        "lab": tiff_file(2, 2, bits=(8, 8, 8), photometric=8, strips=[grey[:12]]),
        "planes_16": tiff_file(2, 2, bits=(16,) * 3, photometric=2, strips=[grey[:8]] * 3, tags={284: (2,)}),
        "subsampled": tiff_file(2, 2, bits=(8, 8, 8), photometric=6, strips=[grey[:6]], tags={530: (2, 2)}),
        "eleven_samples": tiff_file(1, 1, bits=(8,) * 11, photometric=2, strips=[two]),
        "three_bits": tiff_file(2, 2, bits=(3,), photometric=1, strips=[grey]),
    }
    for name, data in cases.items():
        reason = "corrupt" if name == "eleven_samples" else "unsupported_mode"
        yield BadInput(f"tiff_{name}", data, reason, "unsupported_layout")


def wrong_extensions() -> Iterator[BadInput]:
    """Named as one format, being another; the name does not matter."""
    for told, kind in (
        ("jpg", "PNG"),
        ("png", "JPEG"),
        ("jpg", "WEBP"),
        ("png", "GIF"),
        ("webp", "TIFF"),
        ("jpg", "BMP"),
    ):
        yield BadInput(f"{told}_is_{kind.lower()}", encoded(smooth_image(20, 20), kind), None, "wrong_extension")


BAD_INPUTS: tuple[BadInput, ...] = (
    *not_images(),
    *cut_files(),
    *damaged_files(),
    *damaged_jpegs(),
    *bombs(),
    *large_ancillaries(),
    *odd_sizes(),
    *odd_files(),
    *unsupported_tiffs(),
    *wrong_extensions(),
)
