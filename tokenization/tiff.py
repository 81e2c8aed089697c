"""TIFF files to pixels, first page only, less the layouts that Pillow misreads without a word.

Pillow opens 12 bits and white-is-zero 16 bits as if black were 0 and white 65535, signed bytes as unsigned, and 16-bit
planes as 8-bit ones; libtiff allocates whatever tile a header asks for. Each is mended or refused by its tags.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from tokenization.image_rejection import check_num_pixels, undecodable

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 259, 262, 284, 339
_TILE_WIDTH, _TILE_LENGTH, _SUBSAMPLING = 322, 323, 530
_UNCOMPRESSED, _WHITE_IS_ZERO, _YCBCR, _SEPARATE_PLANES, _UNSIGNED = 1, 0, 6, 2, 1


def open_tiff(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return the upright pixels of a TIFF's first page; grey of 12 or 16 bits becomes 8.

    Args:
        data: a whole file.
        max_pixels: largest width * height that is decoded.

    Raises:
        ImageRejectedError: reason `too_many_pixels` or `unsupported_mode`.
        OSError, SyntaxError, ..: what Pillow raises on damaged files.

    Source: Adobe, TIFF revision 6.0.
    """
    image = TiffImageFile(io.BytesIO(data))
    check_num_pixels(image.width, image.height, max_pixels=max_pixels)
    tags = image.tag_v2
    # One tile may be larger than the image that it covers.
    tile_width, tile_length = (_values(tags, tag, default=0)[0] for tag in (_TILE_WIDTH, _TILE_LENGTH))
    check_num_pixels(tile_width, tile_length, max_pixels=max_pixels)
    _check_layout(tags)
    num_bits = _values(tags, _BITS, default=1)[0]
    white_is_zero = _values(tags, _PHOTOMETRIC, default=_WHITE_IS_ZERO)[0] == _WHITE_IS_ZERO
    image.load()  # also turns it upright
    if not image.mode.startswith("I;16"):
        return image
    grey = (np.asarray(image) >> (num_bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _check_layout(tags: ImageFileDirectory_v2) -> None:
    if set(_values(tags, _SAMPLE_FORMAT, default=_UNSIGNED)) != {_UNSIGNED}:
        raise undecodable("unsupported_mode", "the samples of a TIFF must be unsigned integers, got signed or floats")
    if _values(tags, _COMPRESSION, default=_UNCOMPRESSED)[0] != _UNCOMPRESSED:
        return
    most_bits = max(_values(tags, _BITS, default=1))
    if most_bits > 8 and _values(tags, _PLANAR, default=1)[0] == _SEPARATE_PLANES:
        raise undecodable("unsupported_mode", f"uncompressed planes of a TIFF must have 8 bits, got {most_bits}")
    subsampled = set(_values(tags, _SUBSAMPLING, default=2)) != {1}
    if subsampled and _values(tags, _PHOTOMETRIC, default=_WHITE_IS_ZERO)[0] == _YCBCR:
        raise undecodable("unsupported_mode", "uncompressed YCbCr in a TIFF must not be subsampled, got it so")


def _values(tags: ImageFileDirectory_v2, tag: int, *, default: int) -> tuple[int, ...]:
    """Return a tag's values whether the file holds one or more; anything but integers raises ValueError."""
    value = tags.get(tag, default)
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(isinstance(entry, int) for entry in values):
        raise ValueError(f"tag {tag} must hold integers, got {value!r}")
    return values
