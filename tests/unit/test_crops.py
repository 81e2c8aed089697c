"""Decoding of well-formed, odd and hostile image bytes, and what the views of an image say about themselves."""

import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tokenization.config import ViewsConfig
from tokenization.crops import center_crop, make_views
from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError

LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header_only(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 16)) + chunk(b"IEND", b"")
    )


def rejection(data: bytes, *, max_pixels: int = LIMIT) -> ImageRejectedError:
    with pytest.raises(ImageRejectedError) as caught:
        decode_image(data, max_pixels=max_pixels)
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_every_format_becomes_rgb_of_its_size(kind: str) -> None:
    image = decode_image(encoded(noise_image(7, 5), kind), max_pixels=35)
    assert (image.mode, image.size) == ("RGB", (7, 5))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "unknown_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown_format"),
        (encoded(noise_image(64, 64))[:2000], "truncated"),
        (encoded(noise_image(64, 64), "JPEG")[:900], "truncated"),
        (encoded(noise_image(64, 64))[:20], "truncated"),
    ],
    ids=["empty", "text", "eps", "cut_png", "cut_jpeg", "cut_header"],
)
def test_unusable_bytes_are_rejected_with_a_reason(data: bytes, reason: str) -> None:
    error = rejection(data)
    assert (error.stage, error.reason) == ("decode", reason)
    assert str(error).startswith("decoding image: ")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_flipped_bits_never_escape_as_another_error() -> None:
    generator = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        whole = encoded(noise_image(24, 24), kind)
        for _ in range(60):
            damaged = bytearray(whole)
            for position in generator.integers(0, len(whole), 4):
                damaged[position] ^= 1 << int(generator.integers(8))
            with contextlib.suppress(ImageRejectedError):
                assert decode_image(bytes(damaged), max_pixels=LIMIT).mode == "RGB"


@pytest.mark.parametrize("side", [1001, 30_000, 2**31 - 1])
def test_too_many_pixels_are_rejected_before_they_are_decoded(side: int) -> None:
    # Only the header promises the pixels: decoding would fail as truncated, so the reason tells which came first.
    assert rejection(png_header_only(side, 1000)).reason == "too_many_pixels"
    assert rejection(png_header_only(10, 10)).reason != "too_many_pixels"


def test_cmyk_becomes_the_colour_it_prints() -> None:
    cyan = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert decode_image(encoded(cyan, "TIFF"), max_pixels=LIMIT).getpixel((1, 1)) == (0, 255, 255)
    red, green, blue = decode_image(encoded(cyan, "JPEG"), max_pixels=LIMIT).getpixel((1, 1))
    assert red < 5
    assert min(green, blue) > 250


def test_sixteen_bits_keep_their_high_byte() -> None:
    grey = Image.fromarray(np.array([[0x1234, 0xFFFF]], dtype=np.uint16))
    image = decode_image(encoded(grey), max_pixels=LIMIT)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0x12,) * 3, (0xFF,) * 3]


def test_floating_point_pixels_are_rejected() -> None:
    error = rejection(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))
    assert error.reason == "unsupported_mode"


def test_palette_and_bilevel_images_become_rgb() -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encoded(palette), max_pixels=LIMIT).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(encoded(Image.new("1", (2, 2), 1)), max_pixels=LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_transparency_lies_on_white() -> None:
    half_black = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert decode_image(encoded(half_black), max_pixels=LIMIT).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    assert decode_image(encoded(palette, transparency=0), max_pixels=LIMIT).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.new("LA", (2, 2), (0, 0))
    assert decode_image(encoded(grey), max_pixels=LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied_and_damaged_exif_is_not_fatal() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_image(encoded(image, exif=exif.tobytes()), max_pixels=LIMIT)
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 0, 0)
    assert decode_image(encoded(image, exif=b"Exif\0\0garbage"), max_pixels=LIMIT).size == (2, 1)


def test_an_elongated_image_is_rejected_by_the_crop() -> None:
    assert center_crop(Image.new("RGB", (100, 1)), 8).size == (8, 8)
    with pytest.raises(ImageRejectedError, match="cropping image: sides must differ at most 100 times") as caught:
        center_crop(Image.new("RGB", (101, 1)), 8)
    assert (caught.value.stage, caught.value.reason) == ("crop", "too_elongated")


def test_a_rejection_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(rejection(b"")))
    assert (error.stage, error.reason, str(error)) == (
        "decode",
        "empty",
        "decoding image: the file must not be empty, got 0 bytes",
    )


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


def test_boxes_are_in_pixels_of_the_source() -> None:
    views = make_views(noise_image(200, 100), config=ViewsConfig(kind="center"), image_size_px=25)
    assert views.boxes == ({"box_px": (48.0, 0.0, 148.0, 100.0), "flipped": False},)
