"""TIFF layouts built tag by tag: pixels by hand, or a reject where Pillow would misread them."""

import struct

import pytest
from image_files import encoded, noise_image, tiff_file
from PIL import Image

from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def pixels_of(data: bytes) -> list[tuple[int, ...]]:
    image = decode_image(data, max_pixels=100)
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def greys(*values: int) -> list[tuple[int, ...]]:
    return [(value,) * 3 for value in values]


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("big_endian", [False, True])
def test_grey_of_16_bits_keeps_its_high_byte(compression: int, big_endian: bool) -> None:
    strip = struct.pack(">HH" if big_endian else "<HH", 0x1234, 0xFE80)
    data = tiff_file(2, 1, bits=(16,), photometric=1, strips=[strip], compression=compression, big_endian=big_endian)
    assert pixels_of(data) == greys(0x12, 0xFE)


@pytest.mark.parametrize("compression", [1, 8])
def test_white_may_be_zero(compression: int) -> None:
    strip = struct.pack("<HH", 0x1234, 0xFE80)
    data = tiff_file(2, 1, bits=(16,), photometric=0, strips=[strip], compression=compression)
    assert pixels_of(data) == greys(0xED, 0x01)
    assert pixels_of(tiff_file(2, 1, bits=(8,), photometric=0, strips=[b"\x12\xfe"])) == greys(0xED, 0x01)


@pytest.mark.parametrize("compression", [1, 8])
def test_grey_of_12_bits_keeps_its_upper_8(compression: int) -> None:
    data = tiff_file(2, 1, bits=(12,), photometric=1, strips=[bytes((0x12, 0x3F, 0xE8))], compression=compression)
    assert pixels_of(data) == greys(0x12, 0xFE)


@pytest.mark.parametrize("compression", [1, 8])
def test_colours_of_16_bits_keep_their_high_bytes(compression: int) -> None:
    strip = struct.pack("<6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0x8000)
    data = tiff_file(2, 1, bits=(16,) * 3, photometric=2, strips=[strip], compression=compression)
    assert pixels_of(data) == [(0x12, 0x56, 0x9A), (255, 0, 0x80)]


@pytest.mark.parametrize(("depth", "compression"), [(8, 1), (8, 8), (16, 8)])
def test_separate_planes_are_joined(depth: int, compression: int) -> None:
    code = "<BB" if depth == 8 else "<HH"
    strips = [
        struct.pack(code, first << (depth - 8), second << (depth - 8)) for first, second in ((1, 4), (2, 5), (3, 6))
    ]
    data = tiff_file(2, 1, bits=(depth,) * 3, photometric=2, strips=strips, tags={284: (2,)}, compression=compression)
    assert pixels_of(data) == [(1, 2, 3), (4, 5, 6)]


def test_alpha_lies_on_white_multiplied_in_or_not() -> None:
    pixel = bytes((100, 50, 0, 128))
    separate = tiff_file(1, 1, bits=(8,) * 4, photometric=2, strips=[pixel], tags={338: (2,)})
    multiplied = tiff_file(1, 1, bits=(8,) * 4, photometric=2, strips=[pixel], tags={338: (1,)})
    # 100 * 128 / 255 + 127 = 177.2 and 50 * 128 / 255 + 127 = 152.1; where it is multiplied in, 100 + 127 and 50 + 127.
    assert pixels_of(separate) == [(177, 152, 127)]
    assert pixels_of(multiplied)[0] == pytest.approx((227, 177, 127), abs=1)


def test_grey_with_alpha_multiplied_in_lies_on_white() -> None:
    data = tiff_file(1, 1, bits=(8, 8), photometric=1, strips=[bytes((100, 128))], tags={338: (1,)})
    assert pixels_of(data)[0] == pytest.approx((227, 227, 227), abs=1)


@pytest.mark.parametrize("compression", [1, 8])
def test_orientation_is_applied_once(compression: int) -> None:
    options = {"bits": (8,) * 3, "photometric": 2, "strips": [bytes(RED + GREEN)], "compression": compression}
    assert pixels_of(tiff_file(2, 1, tags={274: (3,)}, **options)) == [GREEN, RED]
    turned = tiff_file(2, 1, tags={274: (8,)}, **options)
    assert decode_image(turned, max_pixels=2).size == (1, 2)
    assert pixels_of(turned) == [GREEN, RED]


def test_the_first_page_is_taken() -> None:
    pages = [Image.new("RGB", (2, 2), colour) for colour in ("red", "lime")]
    assert pixels_of(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])) == [RED] * 4


def test_cmyk_becomes_the_colour_it_prints() -> None:
    data = tiff_file(1, 1, bits=(8,) * 4, photometric=5, strips=[bytes((255, 0, 51, 51))])
    # No red; green 204 of 255 black's rest; blue 204 * 204 / 255 = 163.2.
    assert pixels_of(data) == [(0, 204, 163)]


def test_a_tile_larger_than_the_limit_is_never_allocated() -> None:
    tags = {273: (), 278: (), 279: (), 322: (64,), 323: (64,), 324: (0,), 325: (4096,)}
    data = tiff_file(10, 10, bits=(8,), photometric=1, strips=[bytes(4096)], tags=tags)
    assert decode_image(data, max_pixels=64 * 64).size == (10, 10)
    with pytest.raises(ImageRejectedError, match=r"at most 4095, got 64 \* 64") as caught:
        decode_image(data, max_pixels=64 * 64 - 1)
    assert caught.value.reason == "too_many_pixels"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressions_without_loss_give_the_pixels_back(compression: str) -> None:
    source = noise_image(20, 10)
    data = encoded(source, "TIFF", compression=compression)
    assert decode_image(data, max_pixels=200).tobytes() == source.tobytes()
