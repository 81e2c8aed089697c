"""JPEG colours by hand, and the damage that libjpeg would paint over."""

import io
import re

import numpy as np
import pytest
from image_files import encoded, smooth_image
from PIL import Image

from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError

LIMIT = 1_000_000


def reason_of(data: bytes) -> str:
    with pytest.raises(ImageRejectedError) as caught:
        decode_image(data, max_pixels=LIMIT)
    assert caught.value.stage == "decode"
    return caught.value.reason


def stored_as_four_channels(channels: tuple[int, int, int, int], *, adobe_transform: int) -> bytes:
    """A flat JPEG whose four stored channels are these, under an Adobe marker with this transform."""
    # Pillow inverts what it stores.
    image = Image.new("CMYK", (16, 16), tuple(255 - channel for channel in channels))
    data = encoded(image, "JPEG", quality=100, subsampling=0)
    transform = data.index(b"\xff\xeeAdobe".replace(b"\xff\xee", b"")) + 11
    return data[:transform] + bytes([adobe_transform]) + data[transform + 1 :]


def test_adobe_cmyk_is_stored_inverted() -> None:
    # Inks 20 %, 40 %, 60 % of 255 and 10 % black: 255 * (1 - ink) * (1 - black).
    data = stored_as_four_channels((204, 153, 102, 230), adobe_transform=0)
    pixel = decode_image(data, max_pixels=LIMIT).getpixel((8, 8))
    np.testing.assert_allclose(pixel, (204 * 230 / 255, 153 * 230 / 255, 102 * 230 / 255), atol=1)


def test_adobe_ycck_is_turned_into_cmyk_first() -> None:
    luma, blue, red, black = 90, 110, 200, 220
    r, g, b = (
        luma + 1.402 * (red - 128),
        luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
        luma + 1.772 * (blue - 128),
    )
    data = stored_as_four_channels((luma, blue, red, black), adobe_transform=2)
    pixel = decode_image(data, max_pixels=LIMIT).getpixel((8, 8))
    np.testing.assert_allclose(pixel, [(255 - channel) * black / 255 for channel in (r, g, b)], atol=1.5)


def test_grey_becomes_three_equal_channels() -> None:
    data = encoded(Image.new("L", (16, 16), 77), "JPEG", quality=100)
    assert decode_image(data, max_pixels=LIMIT).getpixel((3, 3)) == (77, 77, 77)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 2}])
def test_whole_files_give_what_pillow_gives(options: dict[str, object]) -> None:
    data = encoded(smooth_image(75, 50), "JPEG", **options)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert decode_image(data, max_pixels=LIMIT).tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("blocks", [1, 4, 7])
@pytest.mark.parametrize(("width", "height"), [(75, 50), (8, 8), (33, 17)])
def test_restart_markers_of_whole_files_are_as_many_as_expected(
    mode: str, subsampling: int, options: dict[str, object], blocks: int, width: int, height: int
) -> None:
    image = smooth_image(width, height).convert(mode)
    data = encoded(image, "JPEG", subsampling=subsampling, restart_marker_blocks=blocks, **options)
    assert decode_image(data, max_pixels=LIMIT).size == (width, height)


@pytest.mark.parametrize("lost", range(5))
def test_a_lost_restart_marker_is_seen(lost: int) -> None:
    data = encoded(smooth_image(64, 64), "JPEG", restart_marker_blocks=3, subsampling=0)
    markers = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", data)]
    at = markers[lost * (len(markers) - 1) // 4]
    assert reason_of(data[:at] + data[at + 2 :]) == "corrupt"


def test_one_restart_marker_more_at_the_end_is_no_damage() -> None:
    data = encoded(smooth_image(32, 8), "JPEG", restart_marker_blocks=1, subsampling=0)
    assert data.count(b"\xff\xd2") == 1
    assert decode_image(data[:-2] + b"\xff\xd3\xff\xd9", max_pixels=LIMIT).size == (32, 8)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("percent", range(30, 100, 5))
def test_a_file_cut_and_closed_again_is_truncated(mode: str, percent: int) -> None:
    data = encoded(smooth_image(120, 90).convert(mode), "JPEG", quality=90)
    begin = data.index(b"\xff\xda") + 14
    cut = begin + (len(data) - begin) * percent // 100
    assert reason_of(data[:cut].rstrip(b"\xff") + b"\xff\xd9") == "truncated"


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_whole_picture_may_be_grey(mode: str, options: dict[str, object]) -> None:
    image = Image.new("RGB", (40, 24), (128, 128, 128)).convert(mode)
    grey = Image.new("CMYK", (40, 24), (127, 127, 127, 127)) if mode == "CMYK" else image
    assert decode_image(encoded(grey, "JPEG", **options), max_pixels=LIMIT).size == (40, 24)


def test_endless_scans_are_rejected_before_they_are_decoded() -> None:
    data = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    num_scans = data.count(b"\xff\xda")
    allowed = data[:-2] + scan * (100 - num_scans) + b"\xff\xd9"
    assert decode_image(allowed, max_pixels=LIMIT).size == (64, 64)
    assert reason_of(data[:-2] + scan * (101 - num_scans) + b"\xff\xd9") == "too_many_scans"


def test_what_looks_like_scans_after_the_end_does_not_count() -> None:
    data = encoded(smooth_image(16, 16), "JPEG")
    assert decode_image(data + b"\0\x02" + b"\xff\xda\0\x02" * 500, max_pixels=LIMIT).size == (16, 16)
