"""Formats, orientations, modes and first frames against colours known by hand, and how a rejection reads."""

import pickle
import struct

import numpy as np
import pytest
from image_files import FORMATS, encoded, exif_block, noise_image, smooth_image
from PIL import Image

from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError

LIMIT = 1_000_000
WHITE = (255, 255, 255)
LEFT_TO_RIGHT, RIGHT_TO_LEFT = slice(None), slice(None, None, -1)


def rejection(data: bytes, *, max_pixels: int = LIMIT) -> ImageRejectedError:
    with pytest.raises(ImageRejectedError) as caught:
        decode_image(data, max_pixels=max_pixels)
    return caught.value


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_becomes_rgb_of_its_size(kind: str) -> None:
    image = decode_image(encoded(noise_image(7, 5), kind), max_pixels=35)
    assert (image.mode, image.size) == ("RGB", (7, 5))


@pytest.mark.parametrize("kind", FORMATS)
def test_one_pixel_more_than_allowed_is_too_many(kind: str) -> None:
    error = rejection(encoded(noise_image(7, 5), kind), max_pixels=34)
    assert (error.stage, error.reason) == ("decode", "too_many_pixels")
    assert str(error) == "decoding image: width * height must be at most 34, got 7 * 5"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_formats_without_loss_give_the_pixels_back(kind: str) -> None:
    source = noise_image(33, 21)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert decode_image(encoded(source, kind, **options), max_pixels=LIMIT).tobytes() == source.tobytes()


def test_unusable_bytes_are_rejected_with_what_they_begin_with() -> None:
    error = rejection(b"<html>not an image</html>")
    assert error.reason == "unknown_format"
    assert str(error) == (
        "decoding image: the data must be one of JPEG, PNG, WebP, GIF, BMP, PNM, TIFF, "
        "got first bytes b'<html>not an ima'"
    )


def test_a_rejection_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(rejection(b"")))
    assert (error.stage, error.reason, str(error)) == (
        "decode",
        "empty",
        "decoding image: the file must not be empty, got 0 bytes",
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "turned", "rows", "columns"),
    [
        (1, False, LEFT_TO_RIGHT, LEFT_TO_RIGHT),
        (2, False, LEFT_TO_RIGHT, RIGHT_TO_LEFT),
        (3, False, RIGHT_TO_LEFT, RIGHT_TO_LEFT),
        (4, False, RIGHT_TO_LEFT, LEFT_TO_RIGHT),
        (5, True, LEFT_TO_RIGHT, LEFT_TO_RIGHT),
        (6, True, LEFT_TO_RIGHT, RIGHT_TO_LEFT),
        (7, True, RIGHT_TO_LEFT, RIGHT_TO_LEFT),
        (8, True, RIGHT_TO_LEFT, LEFT_TO_RIGHT),
    ],
)
def test_exif_orientation_is_applied(kind: str, orientation: int, turned: bool, rows: slice, columns: slice) -> None:
    source = smooth_image(24, 16)
    stored = np.asarray(decode_image(encoded(source, kind), max_pixels=LIMIT))
    upright = decode_image(encoded(source, kind, exif=exif_block(orientation)), max_pixels=LIMIT)
    expected = (stored.transpose(1, 0, 2) if turned else stored)[rows, columns]
    np.testing.assert_array_equal(np.asarray(upright), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", exif_block(6)[:18], exif_block(77), b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
def test_damaged_exif_leaves_the_pixels_as_stored(kind: str, exif: bytes) -> None:
    source = smooth_image(24, 16)
    stored = decode_image(encoded(source, kind), max_pixels=LIMIT)
    assert decode_image(encoded(source, kind, exif=exif), max_pixels=LIMIT).tobytes() == stored.tobytes()


def test_transparency_lies_on_white() -> None:
    half_red = encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 128)), "WEBP", lossless=True, exact=True)
    # 200 * 128 / 255 + 127 = 227.4
    assert decode_image(half_red, max_pixels=LIMIT).getpixel((1, 1)) == (227, 127, 127)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    image = decode_image(encoded(palette, "GIF", transparency=0), max_pixels=LIMIT)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (1, 2, 3)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "white")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, max_pixels=LIMIT).getpixel((4, 4)) == (0, 0, 255)


def test_what_the_first_gif_frame_does_not_cover_is_white() -> None:
    frame = Image.new("P", (2, 2), 1)
    frame.putpalette([255, 0, 0, 0, 0, 255])
    data = bytearray(encoded(frame, "GIF"))
    data[6:10] = struct.pack("<HH", 5, 4)
    box = data.index(b",\0\0\0\0\2\0\2\0")
    data[box + 1 : box + 5] = struct.pack("<HH", 3, 1)
    image = np.asarray(decode_image(bytes(data), max_pixels=20))
    expected = np.full((4, 5, 3), 255)
    expected[1:3, 3:5] = (0, 0, 255)
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P1 2 1 1 0", [(0, 0, 0), WHITE]),
        (b"P2 2 1 15 15 3", [WHITE, (51, 51, 51)]),
        (b"P3 1 1 255 10 20 30", [(10, 20, 30)]),
        (b"P4 2 1 \x80", [(0, 0, 0), WHITE]),
        (b"P5 2 1 65535 \x12\x34\xfe\xff", [(0x12,) * 3, (0xFE,) * 3]),
        (b"P6 1 1 255 abc", [(97, 98, 99)]),
    ],
)
def test_portable_maps_are_read_as_they_say(data: bytes, expected: list[tuple[int, ...]]) -> None:
    image = decode_image(data, max_pixels=2)
    assert [image.getpixel((x, 0)) for x in range(image.width)] == expected


def test_palette_and_bilevel_bitmaps_become_rgb() -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encoded(palette, "BMP"), max_pixels=4).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(encoded(Image.new("1", (2, 2), 1), "BMP"), max_pixels=4).getpixel((0, 0)) == WHITE


def test_colour_profiles_are_not_applied() -> None:
    source = smooth_image(16, 16)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        plain, tagged = encoded(source, kind), encoded(source, kind, icc_profile=b"a profile of some length" * 9)
        assert decode_image(tagged, max_pixels=LIMIT).tobytes() == decode_image(plain, max_pixels=LIMIT).tobytes()
