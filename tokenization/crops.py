"""Image bytes to RGB to crops: decoding with limits, ADM's centre crop, LlamaGen's flip and ten-crop.

The crops equal ADM's `center_crop_arr` and LlamaGen's `extract_codes_c2i` pixel for pixel; every view records the
region of the source image it shows. Nothing is decoded before its pixel count is known to be allowed, and whatever
cannot be used raises `ImageRejectedError` with a stage and a short reason that a ledger can count.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokenization.config import ViewsConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""What may be decoded; formats that start other programs (EPS) or rarely hold photographs stay out."""
MAX_ASPECT_RATIO = 100
"""Longer side over shorter side that may be cropped; beyond it the resized image would be huge."""
EXIF_ORIENTATION = 0x0112
# What Pillow's decoders raise on damaged files; OSError is told apart first.
DAMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


class ImageRejectedError(ValueError):
    """An image that cannot be used; `stage` and `reason` go to the ledger, the message to a reader."""

    def __init__(self, *, stage: Literal["decode", "crop"], reason: str, detail: str) -> None:
        super().__init__(f"{'decoding' if stage == 'decode' else 'cropping'} image: {detail}")
        self.stage = stage
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and Ray pickles errors.
        return _rebuild_error, (self.stage, self.reason, self.detail)


def _rebuild_error(stage: Literal["decode", "crop"], reason: str, detail: str) -> ImageRejectedError:
    return ImageRejectedError(stage=stage, reason=reason, detail=detail)


class ViewBox(TypedDict):
    """The region of the source image that a view shows."""

    box_px: tuple[float, float, float, float]
    """Left, top, right, bottom in px of the upright source image."""
    flipped: bool
    """Whether the view is the mirror of that region."""


@dataclass(frozen=True)
class Views:
    """The views of one image, ready to encode."""

    images_VHWC: np.ndarray
    """uint8, RGB, (V, image_size_px, image_size_px, 3)."""
    boxes: tuple[ViewBox, ...]
    """The source region of each view, in the same order."""


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return the upright RGB image of a file's bytes, transparency on white, 16 bits scaled to 8.

    Args:
        data: a whole JPEG, PNG, WebP, GIF (first frame), BMP, PPM or TIFF file.
        max_pixels: largest width * height that is decoded.

    Raises:
        ImageRejectedError: stage `decode`, reason `empty`, `unknown_format`, `too_many_pixels`, `truncated`, `corrupt`
            or `unsupported_mode`.
    """
    if not data:
        raise _undecodable("empty", "the file must not be empty, got 0 bytes")
    with warnings.catch_warnings():
        # Our own limit is checked on the header below; Pillow's warning at half of its own adds nothing.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise _undecodable("too_many_pixels", f"width * height must be at most {max_pixels}, got {width} * {height}")
    try:
        image.load()
        return _to_rgb(_upright(image))
    except ImageRejectedError:
        raise
    except DAMAGE_ERRORS as error:
        reason = "truncated" if "truncated" in str(error) else "corrupt"
        raise _undecodable(reason, f"the {image.format} data must be whole, got {error}") from error


def _undecodable(reason: str, detail: str) -> ImageRejectedError:
    return ImageRejectedError(stage="decode", reason=reason, detail=detail)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _undecodable("too_many_pixels", f"the pixel count must be below Pillow's limit, got {error}") from error
    except UnidentifiedImageError as error:
        raise _undecodable(
            "unknown_format", f"the data must be one of {', '.join(FORMATS)}, got first bytes {data[:8]!r}"
        ) from error
    except DAMAGE_ERRORS as error:
        raise _undecodable("corrupt", f"the header must be readable, got {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.getexif().get(EXIF_ORIENTATION)
    except DAMAGE_ERRORS:
        # A damaged EXIF block says nothing about the pixels; they stay as stored.
        return image
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _undecodable("unsupported_mode", f"integers must fit 16 bits, got mode {image.mode!r} beyond them")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "LAB", "HSV"):
        raise _undecodable("unsupported_mode", f"the colours must be grey, palette, RGB or CMYK, got {image.mode!r}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


@dataclass(frozen=True)
class _Placed:
    """A crop together with where it lies: its left and top in the resized source, and that source's scale."""

    image: Image.Image
    left_px: int
    top_px: int
    scale_x: float
    scale_y: float


def _center_crop(image: Image.Image, size_px: int) -> _Placed:
    source_width, source_height = image.size
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ImageRejectedError(
            stage="crop",
            reason="too_elongated",
            detail=f"sides must differ at most {MAX_ASPECT_RATIO} times, got {image.width} * {image.height}",
        )
    while min(image.size) >= 2 * size_px:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size_px / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - size_px) // 2, (resized.height - size_px) // 2
    crop = resized.crop((left, top, left + size_px, top + size_px))
    return _Placed(crop, left, top, resized.width / source_width, resized.height / source_height)


def _corners(side_px: int, size_px: int) -> tuple[tuple[int, int], ...]:
    far, middle = side_px - size_px, round((side_px - size_px) / 2)
    return ((0, 0), (far, 0), (0, far), (far, far), (middle, middle))


def center_crop(image: Image.Image, size_px: int) -> Image.Image:
    """Return ADM's centre crop: halved by box filter while twice too large, then bicubic, then cropped.

    Args:
        image: RGB, any size.
        size_px: side of the square crop.

    Raises:
        ImageRejectedError: stage `crop`, the image is more than 100 times longer than wide.

    Source: guided-diffusion's `center_crop_arr`, which LlamaGen copies.
    """
    return _center_crop(image, size_px).image


def ten_crop(image: Image.Image, size_px: int) -> tuple[Image.Image, ...]:
    """Return the corners (top left, top right, bottom left, bottom right) and centre of a square, then of its mirror.

    Args:
        image: RGB square of at least size_px.
        size_px: side of each crop.

    Source: torchvision's `TenCrop`.
    """
    sources = (image, ImageOps.mirror(image))
    corners = _corners(image.width, size_px)
    return tuple(source.crop((left, top, left + size_px, top + size_px)) for source in sources for left, top in corners)


def make_views(image: Image.Image, *, config: ViewsConfig, image_size_px: int) -> Views:
    """Return the views of an image that get codes of their own, in LlamaGen's order.

    Args:
        image: RGB, any size.
        config: which views.
        image_size_px: side of each view.

    Raises:
        ImageRejectedError: stage `crop`, the image is more than 100 times longer than wide.
    """
    if config.kind == "ten_crop":
        side_px = int(image_size_px * config.crop_range)
        placed = _center_crop(image, side_px)
        crops = ten_crop(placed.image, image_size_px)
        corners = _corners(side_px, image_size_px)
        mirrored = tuple((side_px - image_size_px - left, top) for left, top in corners)
        lefts_tops = corners + mirrored
        flips: tuple[bool, ...] = (False,) * 5 + (True,) * 5
    else:
        placed = _center_crop(image, image_size_px)
        crops = (placed.image, ImageOps.mirror(placed.image))[: config.num_views]
        lefts_tops, flips = ((0, 0),) * config.num_views, (False, True)[: config.num_views]
    boxes = tuple(
        _view_box(placed, left_px=left, top_px=top, size_px=image_size_px, flipped=flipped)
        for (left, top), flipped in zip(lefts_tops, flips, strict=True)
    )
    return Views(images_VHWC=np.stack([np.asarray(crop) for crop in crops]), boxes=boxes)


def _view_box(placed: _Placed, *, left_px: int, top_px: int, size_px: int, flipped: bool) -> ViewBox:
    left, top = placed.left_px + left_px, placed.top_px + top_px
    box = (
        left / placed.scale_x,
        top / placed.scale_y,
        (left + size_px) / placed.scale_x,
        (top + size_px) / placed.scale_y,
    )
    return ViewBox(box_px=(round(box[0], 2), round(box[1], 2), round(box[2], 2), round(box[3], 2)), flipped=flipped)
