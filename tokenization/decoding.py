"""The bytes of an image file to upright RGB pixels on white, or an `ImageRejectedError`; nothing else comes out.

The format is told by the first bytes, never by a name, and only the seven formats below are looked at. Pixels are taken
as stored: colour profiles are not applied, as LlamaGen does not apply them. Safe to call from several threads at once.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

from tokenization import jpeg, png, tiff
from tokenization.image_rejection import ImageRejectedError, check_num_pixels, undecodable

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "PNM", "TIFF")
"""What may be decoded; formats that start other programs (EPS) or rarely hold photographs stay out."""
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".jfif",
    ".jpe",
)
"""How the names of such files end, in small letters."""
_EXIF_ORIENTATION = 0x0112
_TRANSPOSITIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255)
_BMP_HEADER_SIZES = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
# What Pillow's decoders raise on damaged files.
_DAMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
_UNSUPPORTED_WORDS = ("cannot handle", "unsupported", "unknown pixel mode", "not yet supported")

# Pillow warns about what is judged here anyway. Once and for all, because warnings.catch_warnings changes the filters
# of all threads, and each text that is not ignored is remembered for ever.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return the upright RGB image of a file's bytes, transparency on white, of 16 bits the upper 8.

    Args:
        data: a whole JPEG, PNG, WebP, GIF (first frame), BMP, PNM or TIFF (first page) file.
        max_pixels: largest width * height that is decoded.

    Raises:
        ImageRejectedError: stage `decode`, reason `empty`, `unknown_format`, `too_many_pixels`, `too_many_scans`,
            `truncated`, `corrupt` or `unsupported_mode`.
    """
    try:
        if data.startswith(png.MAGIC):
            image = png.open_png(data, max_pixels=max_pixels)
        else:
            image = _opener(data)(data, max_pixels=max_pixels)
        return _on_white(_upright(image))
    except ImageRejectedError:
        raise
    except Image.DecompressionBombError as error:
        raise undecodable("too_many_pixels", f"the pixel count must be below Pillow's limit, got {error}") from error
    except _DAMAGE_ERRORS as error:
        raise undecodable(_reason(error), f"the data must be whole and well-formed, got {error}") from error


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if any(words in text for words in _UNSUPPORTED_WORDS):
        return "unsupported_mode"
    # Pillow's header readers run into the end of the data with these.
    ended = isinstance(error.__cause__ or error, EOFError | IndexError | struct.error)
    return "truncated" if ended or "truncated" in text else "corrupt"


def _opener(data: bytes) -> Callable[..., Image.Image]:
    """Return the function that loads files that begin like this one, PNG excepted."""
    if data.startswith(jpeg.MAGIC):
        return jpeg.open_jpeg
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _open_webp
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _open_gif
    if data.startswith(tiff.MAGICS):
        return tiff.open_tiff
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES:
        return _open_bmp
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return _open_pnm
    if not data:
        raise undecodable("empty", "the file must not be empty, got 0 bytes")
    raise undecodable("unknown_format", f"the data must be one of {', '.join(FORMATS)}, got first bytes {data[:16]!r}")


def _open_webp(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return the first frame. The decoder allocates the canvas when it is made, so the header is read before."""
    num_bytes = int.from_bytes(data[4:8], "little") + 8
    if len(data) < num_bytes:
        raise undecodable("truncated", f"a WebP file must have the {num_bytes} bytes it names, got {len(data)}")
    kind, bits = data[12:16], data[20:30]
    if kind == b"VP8X":
        width, height = (int.from_bytes(bits[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8L":
        packed = int.from_bytes(bits[1:5], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(bits[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    check_num_pixels(width, height, max_pixels=max_pixels)
    image = WebPImageFile(io.BytesIO(data))
    check_num_pixels(image.width, image.height, max_pixels=max_pixels)
    image.load()
    return image


def _open_gif(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return the first frame on its canvas; what it does not cover is white, where Pillow has the palette's first."""
    image = GifImageFile(io.BytesIO(data))
    check_num_pixels(image.width, image.height, max_pixels=max_pixels)
    frame_box = image.tile[0][1]
    image.load()
    if frame_box == (0, 0, *image.size) or "transparency" in image.info:
        return image
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(image.crop(frame_box).convert("RGB"), frame_box)
    return canvas


def _open_bmp(data: bytes, *, max_pixels: int) -> Image.Image:
    image = BmpImageFile(io.BytesIO(data))
    check_num_pixels(image.width, image.height, max_pixels=max_pixels)
    image.load()
    return image


def _open_pnm(data: bytes, *, max_pixels: int) -> Image.Image:
    image = PpmImageFile(io.BytesIO(data))
    check_num_pixels(image.width, image.height, max_pixels=max_pixels)
    image.load()
    if image.mode != "I":
        return image
    # Grey beyond 8 bits, which Pillow has stretched to 0..65535.
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    block = image.info.get("exif")
    if block is None:
        return image
    exif = Image.Exif()
    try:
        exif.load(block)
        transposition = _TRANSPOSITIONS.get(exif.get(_EXIF_ORIENTATION, 1))
    except _DAMAGE_ERRORS:
        # A damaged EXIF block says nothing about the pixels; they stay as stored.
        return image
    return image if transposition is None else image.transpose(transposition)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I", "LAB", "HSV"):
        raise undecodable("unsupported_mode", f"the colours must be grey, palette, RGB or CMYK, got {image.mode!r}")
    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(image, (0, 0), image)
    return canvas
