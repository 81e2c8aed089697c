"""What the views of an image say about themselves, and which images have none."""

import numpy as np
import pytest
from image_files import noise_image
from PIL import Image

from tokenization.config import ViewsConfig
from tokenization.crops import center_crop, make_views
from tokenization.image_rejection import ImageRejectedError

pytestmark = pytest.mark.usefixtures("pixels")


def test_an_elongated_image_is_rejected_by_the_crop() -> None:
    assert center_crop(Image.new("RGB", (100, 1)), 8).shape == (8, 8, 3)
    with pytest.raises(ImageRejectedError, match="cropping image: sides must differ at most 100 times") as caught:
        center_crop(Image.new("RGB", (101, 1)), 8)
    assert (caught.value.stage, caught.value.reason) == ("crop", "too_elongated")


@pytest.mark.parametrize(("kind", "num_views"), [("center", 1), ("flip", 2), ("ten_crop", 10)])
def test_views_have_one_box_each(kind: str, num_views: int) -> None:
    views = make_views(noise_image(50, 40), config=ViewsConfig(kind=kind), image_size_px=16)
    assert views.images_VHWC.shape == (num_views, 16, 16, 3)
    assert views.images_VHWC.dtype == np.uint8
    assert len(views.boxes) == num_views
    assert [box["flipped"] for box in views.boxes] == [False] * -(-num_views // 2) + [True] * (num_views // 2)


def test_boxes_show_where_the_pixels_came_from() -> None:
    # Sides of 20 and 22 = int(20 * 1.1): nothing is resized, so each view is exactly a region of the source.
    source = noise_image(30, 22)
    views = make_views(source, config=ViewsConfig(kind="ten_crop"), image_size_px=20)
    assert views.boxes[0] == {"box_px": (4.0, 0.0, 24.0, 20.0), "flipped": False}
    for view, box in zip(views.images_VHWC, views.boxes, strict=True):
        left, top, right, bottom = (int(edge) for edge in box["box_px"])
        region = np.asarray(source)[top:bottom, left:right]
        np.testing.assert_array_equal(view, region[:, ::-1] if box["flipped"] else region)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (32, 66), (46, 40), (37, 50), (50, 37), (61, 33)])
@pytest.mark.parametrize("seed", range(5))
def test_halving_is_pillows_box_filter(width: int, height: int, seed: int) -> None:
    image = noise_image(width, height, seed=seed)
    halved = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    assert center_crop(image, 16).tobytes() == center_crop(halved, 16).tobytes()


def test_boxes_are_in_pixels_of_the_source() -> None:
    views = make_views(noise_image(200, 100), config=ViewsConfig(kind="center"), image_size_px=25)
    assert views.boxes == ({"box_px": (48.0, 0.0, 148.0, 100.0), "flipped": False},)


@pytest.mark.parametrize("kind", ["center", "flip", "ten_crop"])
def test_views_of_one_pixel_are_that_pixel(kind: str) -> None:
    views = make_views(Image.new("RGB", (1, 1), (9, 8, 7)), config=ViewsConfig(kind=kind), image_size_px=8)
    assert (views.images_VHWC == (9, 8, 7)).all()
