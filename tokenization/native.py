"""The native half of decoding and cropping: csrc, compiled by `tensorar build-ops`, called by ctypes.

Invariant: its pixels are Pillow's, bit for bit, so that codes do not depend on where it is built; without it the same
work is done by Pillow, and the log says so once. It serves what most images are: PNGs of 8 bits with or without alpha,
and centre crops. Pixels are four bytes each here, of which the last is of no account, as Pillow keeps RGB in memory.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenization.build_pixels import LIBRARY, sources_mark

logger = logging.getLogger(__name__)

_SPARE_PIXELS = 3
"""What csrc/png_rows.cpp may write after an image."""


class NativePixelsError(RuntimeError):
    """The library cannot be used; the message says why."""


def load_library() -> ctypes.CDLL:
    """Load the library.

    Raises:
        NativePixelsError: it is not there, does not load, or was built from other sources.
    """
    if not LIBRARY.exists():
        raise NativePixelsError(f"{LIBRARY} is not there")
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        loaded.pixels_sources.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise NativePixelsError(f"{LIBRARY} does not load: {error}") from error
    if loaded.pixels_sources() != sources_mark().encode():
        raise NativePixelsError(f"{LIBRARY} was built from other sources")
    sizes = [ctypes.c_int64] * 5
    loaded.png_rows.argtypes = [ctypes.c_char_p, *sizes[:3], ctypes.c_void_p]
    loaded.center_crop.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_void_p]
    return loaded


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library for the functions below; None, with one line in the log, where it cannot be used."""
    try:
        return load_library()
    except NativePixelsError as error:
        logger.warning("native pixels: %s; Pillow makes the same ones, slower; run `tensorar build-ops`", error)
        return None


def png_rows_on_white(
    rows: bytes, *, width: int, height: int, num_channels: int, library: ctypes.CDLL
) -> Image.Image | None:
    """Return the RGB image of a PNG's inflated rows, or None if a row has a filter that there is not.

    Args:
        rows: `height` rows of 1 + width * num_channels bytes.
        width: of the image.
        height: of the image.
        num_channels: 3, or 4 with alpha, which is blended on white.
        library: what does it.
    """
    pixels = np.empty(4 * (width * height + _SPARE_PIXELS), dtype=np.uint8)
    status = library.png_rows(rows, width, height, num_channels, pixels.ctypes.data)
    _check_memory(status)
    return Image.frombytes("RGB", (width, height), pixels, "raw", "RGBX") if status else None


def center_crop(
    image: Image.Image, *, size_px: int, resized_px: tuple[int, int], library: ctypes.CDLL
) -> npt.NDArray[np.uint8]:
    """Return the centre of an image that is halved by box filter while it is twice too large, then resized bicubically.

    Each step does the columns before the rows, which shows in the pixels: they are Pillow's where Pillow does so too.

    Args:
        image: RGB, in one piece of memory.
        size_px: side of the crop.
        resized_px: width and height before it is cropped.
        library: what does it.

    Returns:
        uint8, (size_px, size_px, 3).

    Raises:
        ValueError: the image is in several pieces, as Pillow keeps those of more than 16 MiB.
    """
    memory = image.__arrow_c_array__()[1]
    array = _address(memory, b"arrow_array")
    crop = np.empty((size_px, size_px, 3), dtype=np.uint8)
    status = library.center_crop(array, image.width, image.height, size_px, *resized_px, crop.ctypes.data)
    _check_memory(status)
    return crop


_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _check_memory(status: int) -> None:
    if status < 0:
        raise MemoryError("native pixels: no memory for the image")
