"""RGB images to the views that get codes: ADM's centre crop, LlamaGen's flip and ten-crop.

The views equal ADM's `center_crop_arr` and LlamaGen's `extract_codes_c2i` pixel for pixel; every one records the region
of the source image it shows. A step that would change nothing is left out: on a 64 px image that is worth 14 us of 26.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenization.config import ViewsConfig
from tokenization.image_rejection import ImageRejectedError

MAX_ASPECT_RATIO = 100
"""Longer side over shorter side that may be cropped; beyond it the resized image would be huge."""


class ViewBox(TypedDict):
    """The region of the source image that a view shows."""

    box_px: tuple[float, float, float, float]
    """Left, top, right, bottom in px of the upright source image."""
    flipped: bool
    """Whether the view is the mirror of that region."""


@dataclass(frozen=True)
class Views:
    """The views of one image, ready to encode."""

    images_VHWC: npt.NDArray[np.uint8]
    """uint8, RGB, (V, image_size_px, image_size_px, 3); may be read-only."""
    boxes: tuple[ViewBox, ...]
    """The source region of each view, in the same order."""


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
        image = _halve(image)
    scale = size_px / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    width, height = size
    left, top = (width - size_px) // 2, (height - size_px) // 2
    if size != (size_px, size_px):
        image = image.crop((left, top, left + size_px, top + size_px))
    return _Placed(image, left, top, width / source_width, height / source_height)


def _halve(image: Image.Image) -> Image.Image:
    """Return the image at half its size by box filter, as `resize` makes it; of most images by a faster way."""
    # Averaging pairs of columns, then of rows, is what the box filter does to even sides, in half the time. It rounds
    # in between, so the order matters, and on images more than twice as high as wide resize takes the rows first.
    if image.width % 2 == 0 and image.height % 2 == 0 and image.height <= 2 * image.width:
        return image.reduce((2, 1)).reduce((1, 2))
    return image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)


def center_crop(image: Image.Image, size_px: int) -> Image.Image:
    """Return ADM's centre crop: halved by box filter while twice too large, then bicubic, then cropped.

    Args:
        image: RGB, any size; returned as it is when it has the size already.
        size_px: side of the square crop.

    Raises:
        ImageRejectedError: stage `crop`, the image is more than 100 times longer than wide.

    Source: guided-diffusion's `center_crop_arr`, which LlamaGen copies.
    """
    return _center_crop(image, size_px).image


def _corners(side_px: int, size_px: int) -> tuple[tuple[int, int], ...]:
    far, middle = side_px - size_px, round((side_px - size_px) / 2)
    return ((0, 0), (far, 0), (0, far), (far, far), (middle, middle))


def ten_crop(image: Image.Image, size_px: int) -> npt.NDArray[np.uint8]:
    """Return the corners (top left, top right, bottom left, bottom right) and centre of a square, then of its mirror.

    Args:
        image: RGB square of at least size_px.
        size_px: side of each crop.

    Returns:
        uint8, (10, size_px, size_px, 3).

    Source: torchvision's `TenCrop`.
    """
    crops = np.empty((10, size_px, size_px, 3), dtype=np.uint8)
    corners = _corners(image.width, size_px)
    for first, source in ((0, image), (5, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        pixels = np.asarray(source)
        for position, (left, top) in enumerate(corners, start=first):
            crops[position] = pixels[top : top + size_px, left : left + size_px]
    return crops


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
        images_VHWC = ten_crop(placed.image, image_size_px)
        corners = _corners(side_px, image_size_px)
        mirrored = tuple((side_px - image_size_px - left, top) for left, top in corners)
        boxes = _boxes(placed, corners, image_size_px, flipped=False) + _boxes(
            placed, mirrored, image_size_px, flipped=True
        )
        return Views(images_VHWC=images_VHWC, boxes=boxes)
    placed = _center_crop(image, image_size_px)
    view = np.asarray(placed.image)
    boxes = _boxes(placed, ((0, 0),), image_size_px, flipped=False)
    if config.kind == "center":
        return Views(images_VHWC=view[np.newaxis], boxes=boxes)
    boxes += _boxes(placed, ((0, 0),), image_size_px, flipped=True)
    return Views(images_VHWC=np.stack((view, view[:, ::-1])), boxes=boxes)


def _boxes(
    placed: _Placed, lefts_tops: tuple[tuple[int, int], ...], size_px: int, *, flipped: bool
) -> tuple[ViewBox, ...]:
    """Return where the squares at these places of a crop lie in the source."""
    scale_x, scale_y = placed.scale_x, placed.scale_y
    boxes = []
    for left_px, top_px in lefts_tops:
        left, top = placed.left_px + left_px, placed.top_px + top_px
        right, bottom = left + size_px, top + size_px
        box = round(left / scale_x, 2), round(top / scale_y, 2), round(right / scale_x, 2), round(bottom / scale_y, 2)
        boxes.append(ViewBox(box_px=box, flipped=flipped))
    return tuple(boxes)
