"""RGB images to the views that get codes: ADM's centre crop, LlamaGen's flip and ten-crop.

The views equal ADM's `center_crop_arr` and LlamaGen's `extract_codes_c2i` pixel for pixel; every one records the region
of the source image it shows. A step that would change nothing is left out. Native code crops most images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenization import native
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
    """The source region of each view, in the same order; images of one size share them."""


@dataclass(frozen=True, eq=False)
class _Square:
    """A centre crop: the size that the source has when it is cropped, the left and top there, and the scale."""

    size_px: int
    resized_px: tuple[int, int]
    left_px: int
    top_px: int
    scale_x: float
    scale_y: float
    goes_columns_first: bool
    """Whether every Pillow resizes columns before rows in each step, as native code does.

    Pillow 13 takes the rows first where they lose more than twice what the columns lose (found by trial).
    """


@lru_cache(maxsize=4096)  # as `_boxes`: 2 us each, and most corpora have few sizes
def _square(width: int, height: int, size_px: int) -> _Square:
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageRejectedError(
            stage="crop",
            reason="too_elongated",
            detail=f"sides must differ at most {MAX_ASPECT_RATIO} times, got {width} * {height}",
        )
    halved_width, halved_height, goes_columns_first = width, height, True
    while min(halved_width, halved_height) >= 2 * size_px:
        goes_columns_first &= halved_height <= 2 * halved_width
        halved_width, halved_height = halved_width // 2, halved_height // 2
    scale = size_px / min(halved_width, halved_height)
    resized_width, resized_height = round(halved_width * scale), round(halved_height * scale)
    goes_columns_first &= scale >= 1 or halved_height - resized_height <= 2 * (halved_width - resized_width)
    return _Square(
        size_px=size_px,
        resized_px=(resized_width, resized_height),
        left_px=(resized_width - size_px) // 2,
        top_px=(resized_height - size_px) // 2,
        scale_x=resized_width / width,
        scale_y=resized_height / height,
        goes_columns_first=goes_columns_first,
    )


def _crop(image: Image.Image, square: _Square) -> npt.NDArray[np.uint8]:
    size_px, resized_px = square.size_px, square.resized_px
    library = native.library() if square.goes_columns_first else None
    while library is not None:
        try:
            return native.center_crop(image, size_px=size_px, resized_px=resized_px, library=library)
        except ValueError:  # an image in several pieces; its half may be in one
            if min(image.size) < 2 * size_px:
                break
            image = _halve(image)
    while min(image.size) >= 2 * size_px:
        image = _halve(image)
    if image.size != resized_px:
        image = image.resize(resized_px, Image.Resampling.BICUBIC)
    if image.size != (size_px, size_px):
        image = image.crop((square.left_px, square.top_px, square.left_px + size_px, square.top_px + size_px))
    return np.asarray(image)


def _halve(image: Image.Image) -> Image.Image:
    """Return the image at half its size by box filter, as `resize` makes it; of most images by a faster way."""
    # Averaging pairs of columns, then of rows, is what the box filter does to even sides, in half the time. It rounds
    # in between, so the order matters, and on images more than twice as high as wide resize takes the rows first.
    if image.width % 2 == 0 and image.height % 2 == 0 and image.height <= 2 * image.width:
        return image.reduce((2, 1)).reduce((1, 2))
    return image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)


def center_crop(image: Image.Image, size_px: int) -> npt.NDArray[np.uint8]:
    """Return ADM's centre crop: halved by box filter while twice too large, then bicubic, then cropped.

    Args:
        image: RGB, any size.
        size_px: side of the square crop.

    Returns:
        uint8, (size_px, size_px, 3), may be read-only.

    Raises:
        ImageRejectedError: stage `crop`, the image is more than 100 times longer than wide.

    Source: guided-diffusion's `center_crop_arr`, which LlamaGen copies.
    """
    return _crop(image, _square(image.width, image.height, size_px))


def _corners(side_px: int, size_px: int) -> tuple[tuple[int, int], ...]:
    far, middle = side_px - size_px, round((side_px - size_px) / 2)
    return ((0, 0), (far, 0), (0, far), (far, far), (middle, middle))


def ten_crop(square_HWC: npt.NDArray[np.uint8], size_px: int) -> npt.NDArray[np.uint8]:
    """Return the corners (top left, top right, bottom left, bottom right) and centre of a square, then of its mirror.

    Args:
        square_HWC: uint8, RGB, a square of at least size_px.
        size_px: side of each crop.

    Returns:
        uint8, (10, size_px, size_px, 3).

    Source: torchvision's `TenCrop`.
    """
    crops = np.empty((10, size_px, size_px, 3), dtype=np.uint8)
    corners = _corners(len(square_HWC), size_px)
    for first, source in ((0, square_HWC), (5, _mirror(square_HWC))):
        for position, (left, top) in enumerate(corners, start=first):
            crops[position] = source[top : top + size_px, left : left + size_px]
    return crops


def _mirror(pixels_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    # Twice as fast as copying from a view with a negative step.
    return pixels_HWC.take(range(pixels_HWC.shape[1] - 1, -1, -1), axis=1)


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
        square = _square(image.width, image.height, side_px)
        images_VHWC = ten_crop(_crop(image, square), image_size_px)
        corners = _corners(side_px, image_size_px)
        mirrored = tuple((side_px - image_size_px - left, top) for left, top in corners)
        boxes = _boxes(square, corners, image_size_px, flipped=False) + _boxes(
            square, mirrored, image_size_px, flipped=True
        )
        return Views(images_VHWC=images_VHWC, boxes=boxes)
    square = _square(image.width, image.height, image_size_px)
    view = _crop(image, square)
    boxes = _boxes(square, ((0, 0),), image_size_px, flipped=False)
    if config.kind == "center":
        return Views(images_VHWC=view[np.newaxis], boxes=boxes)
    boxes += _boxes(square, ((0, 0),), image_size_px, flipped=True)
    return Views(images_VHWC=np.stack((view, _mirror(view))), boxes=boxes)


@lru_cache(maxsize=4096)
def _boxes(
    square: _Square, lefts_tops: tuple[tuple[int, int], ...], size_px: int, *, flipped: bool
) -> tuple[ViewBox, ...]:
    """Return where the squares at these places of a crop lie in the source."""
    scale_x, scale_y = square.scale_x, square.scale_y
    boxes = []
    for left_px, top_px in lefts_tops:
        left, top = square.left_px + left_px, square.top_px + top_px
        right, bottom = left + size_px, top + size_px
        box = round(left / scale_x, 2), round(top / scale_y, 2), round(right / scale_x, 2), round(bottom / scale_y, 2)
        boxes.append(ViewBox(box_px=box, flipped=flipped))
    return tuple(boxes)
