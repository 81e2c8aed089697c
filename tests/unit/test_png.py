"""PNG pixels of every depth and colour type against samples packed and blended by hand, and what damage is seen."""

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from image_files import GREY, GREY_ALPHA, PALETTE, RGB, RGB_ALPHA, encoded, insert_png_chunk, png_chunk, png_file
from PIL import Image

from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError

pytestmark = pytest.mark.usefixtures("pixels")

LAYOUTS = [
    *((depth, GREY) for depth in (1, 2, 4, 8, 16)),
    *((depth, PALETTE) for depth in (1, 2, 4, 8)),
    *((depth, colour) for colour in (RGB, GREY_ALPHA, RGB_ALPHA) for depth in (8, 16)),
]
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
COLOURS = [(value * 7 % 256, value * 13 % 256, value * 29 % 256) for value in range(256)]


def pack(samples: list[int], depth: int) -> bytes:
    """One row: samples of `depth` bits, high bits first, filled up to a byte."""
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))


def rows_of(samples_HWC: np.ndarray, depth: int, *, interlace: int) -> list[bytes]:
    passes = ADAM7 if interlace else [(0, 0, 1, 1)]
    grids = [samples_HWC[top::step_y, left::step_x] for left, top, step_x, step_y in passes]
    return [pack(row.ravel().tolist(), depth) for grid in grids if grid.size for row in grid]


def blended(channel: int, alpha: int) -> int:
    return round(Fraction(channel * alpha + 255 * (255 - alpha), 255))


def expected_pixel(samples: list[int], *, depth: int, colour: int) -> tuple[int, ...]:
    if colour == PALETTE:
        return COLOURS[samples[0]]
    values = [sample >> 8 if depth == 16 else sample * 255 // (2**depth - 1) for sample in samples]
    alpha = values.pop() if colour in (GREY_ALPHA, RGB_ALPHA) else 255
    channels = values if len(values) == 3 else values * 3
    return tuple(blended(channel, alpha) for channel in channels)


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(("depth", "colour"), LAYOUTS)
@pytest.mark.parametrize(("width", "height"), [(13, 11), (1, 1), (3, 2)])
def test_every_layout_gives_the_samples_at_8_bits_on_white(
    depth: int, colour: int, width: int, height: int, interlace: int
) -> None:
    samples_HWC = np.random.default_rng(depth + colour).integers(0, 2**depth, (height, width, CHANNELS[colour]))
    palette = ((b"PLTE", bytes(channel for entry in COLOURS[: 2**depth] for channel in entry)),)
    rows = rows_of(samples_HWC, depth, interlace=interlace)
    before = palette if colour == PALETTE else ()
    png = png_file(width, height, depth=depth, colour=colour, rows=rows, before=before, interlace=interlace)
    image = decode_image(png, max_pixels=width * height)
    for y in range(height):
        for x in range(width):
            expected = expected_pixel(samples_HWC[y, x].tolist(), depth=depth, colour=colour)
            assert image.getpixel((x, y)) == expected, (x, y)


@pytest.mark.parametrize(
    ("depth", "samples", "key"),
    [
        (1, [0, 1], 1),
        (2, [0, 1, 2, 3], 2),
        (4, list(range(16)), 9),
        (8, [8, 9, 10], 9),
        # The same high byte, and the same low byte, are other colours.
        (16, [0x1234, 0x1235, 0x1334], 0x1234),
    ],
)
def test_only_the_named_grey_is_transparent(depth: int, samples: list[int], key: int) -> None:
    png = png_file(
        len(samples),
        1,
        depth=depth,
        colour=GREY,
        rows=[pack(samples, depth)],
        before=((b"tRNS", struct.pack(">H", key)),),
    )
    image = decode_image(png, max_pixels=100)
    for x, sample in enumerate(samples):
        opaque = expected_pixel([sample], depth=depth, colour=GREY)
        assert image.getpixel((x, 0)) == ((255, 255, 255) if sample == key else opaque)


@pytest.mark.parametrize("depth", [8, 16])
def test_only_the_named_colour_is_transparent(depth: int) -> None:
    scale = 257 if depth == 16 else 1
    key = [10 * scale, 20 * scale, 30 * scale]
    near = [[key[0], key[1], key[2] + 1], [key[0] + 1, key[1], key[2]]]
    rows = [pack(key + near[0] + near[1], depth)]
    png = png_file(3, 1, depth=depth, colour=RGB, rows=rows, before=((b"tRNS", struct.pack(">HHH", *key)),))
    image = decode_image(png, max_pixels=3)
    pixels = [image.getpixel((x, 0)) for x in range(3)]
    assert pixels == [(255, 255, 255), *(expected_pixel(sample, depth=depth, colour=RGB) for sample in near)]


def test_palette_entries_blend_with_white_by_their_own_alpha() -> None:
    before = ((b"PLTE", bytes((10, 20, 30, 201, 103, 0, 7, 8, 9))), (b"tRNS", bytes((0, 128))))
    png = png_file(3, 1, depth=8, colour=PALETTE, rows=[b"\0\1\2"], before=before)
    image = decode_image(png, max_pixels=3)
    # 201 * 128 / 255 + 127 = 227.9, 103 * 128 / 255 + 127 = 178.7, 0 + 127; entries without an alpha are opaque.
    assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (228, 179, 127), (7, 8, 9)]


def test_a_transparent_colour_beside_an_alpha_channel_is_ignored() -> None:
    png = png_file(1, 1, depth=8, colour=GREY_ALPHA, rows=[b"\x07\xff"], before=((b"tRNS", b"\0\x07"),))
    assert decode_image(png, max_pixels=1).getpixel((0, 0)) == (7, 7, 7)


def test_filters_and_split_pixel_data_give_what_pillow_gives() -> None:
    source = Image.fromarray((np.indices((40, 50)).sum(axis=0)[..., None] * [1, 2, 3] % 256).astype(np.uint8))
    png = encoded(source, optimize=True)
    compressed = zlib.compress(zlib.decompress(png[41 : png.rindex(b"IEND") - 8]))
    pieces = [compressed[at : at + 7] for at in range(0, len(compressed), 7)] + [b""]
    split = png[:33] + b"".join(png_chunk(b"IDAT", piece) for piece in pieces) + png_chunk(b"IEND", b"")
    for data in (png, split):
        assert decode_image(data, max_pixels=2000).tobytes() == source.tobytes()


def test_of_an_animation_the_still_image_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    first = encoded(frames[0], save_all=True, append_images=frames[1:])
    still = encoded(frames[0], save_all=True, append_images=frames[1:], default_image=True)
    for data in (first, still):
        assert decode_image(data, max_pixels=16).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("value", [0, 85, 255])
def test_missing_rows_are_seen_whatever_the_pixels(value: int, interlace: int) -> None:
    samples = np.full((9, 6, 1), value)
    rows = rows_of(samples, 8, interlace=interlace)
    whole = png_file(6, 9, depth=8, colour=GREY, rows=rows, interlace=interlace)
    assert decode_image(whole, max_pixels=54).getpixel((5, 8)) == (value,) * 3
    with pytest.raises(ImageRejectedError, match="must hold all its rows"):
        decode_image(png_file(6, 9, depth=8, colour=GREY, rows=rows[:-1], interlace=interlace), max_pixels=54)


def test_a_flipped_bit_of_the_pixels_is_seen() -> None:
    # Stored, not compressed: without its checksum the stream would decode to another picture.
    pixels = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pixels, "PNG", compress_level=0)
    png = bytearray(pixels.getvalue())
    png[80] ^= 1
    with pytest.raises(ImageRejectedError, match="checksum") as caught:
        decode_image(bytes(png), max_pixels=64)
    assert caught.value.reason == "corrupt"


def test_comments_and_profiles_do_not_matter() -> None:
    source = Image.new("RGB", (3, 3), (1, 2, 3))
    png = encoded(source)
    for kind in (b"iCCP", b"zTXt", b"sRGB", b"gAMA", b"bKGD", b"acTL", b"tIME"):
        png = insert_png_chunk(png, kind, b"damaged")
    assert decode_image(png, max_pixels=9).getpixel((1, 1)) == (1, 2, 3)
