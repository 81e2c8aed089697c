"""Native pixels against Pillow's, and what is said where they cannot be had."""

from __future__ import annotations

import io
import logging
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import RGB, RGB_ALPHA, encoded, noise_image, png_chunk, png_file, smooth_image
from PIL import Image

from tokenization import build_pixels, native
from tokenization.compiler import BuildError
from tokenization.crops import center_crop
from tokenization.decoding import decode_image

SIZES_PX = [1, 2, 3, 5, 8, 16, 17, 32, 33]


def adm_crop(image: Image.Image, size_px: int) -> np.ndarray:
    """guided-diffusion's `center_crop_arr`, by Pillow."""
    while min(image.size) >= 2 * size_px:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size_px / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size_px) // 2, (pixels.shape[1] - size_px) // 2
    return pixels[top : top + size_px, left : left + size_px]


def check_crops() -> None:
    """Crops of images of any shape, with soft and with hard edges, are those of Pillow."""
    assert native.library() is not None
    sizes = random.Random(0)
    for seed in range(600):
        width, height, size_px = sizes.randint(1, 120), sizes.randint(1, 120), sizes.choice(SIZES_PX)
        if max(width, height) > 100 * min(width, height):
            continue
        image = noise_image(width, height, seed=seed)
        if seed % 3 == 0:
            image = image.point(lambda value: 255 * (value > 127))
        np.testing.assert_array_equal(
            center_crop(image, size_px), adm_crop(image, size_px), err_msg=f"{width} x {height} to {size_px}"
        )


def filtered_png(width: int, height: int, *, colour: int, seed: int) -> bytes:
    """A PNG of noise whose rows have every filter, those of the first row included."""
    num_channels = {RGB: 3, RGB_ALPHA: 4}[colour]
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 256, (height, 1 + width * num_channels), dtype=np.uint8)
    rows[:, 0] = generator.integers(0, 5, height)
    whole = png_file(width, height, depth=8, colour=colour, rows=[])
    pixels = png_chunk(b"IDAT", zlib.compress(rows.tobytes()))
    return whole[:33] + pixels + whole[-12:]


def check_rows() -> None:
    """Rows of every filter are the pixels that Pillow's own reader has; of alpha, the exact blend on white, rounded."""
    assert native.library() is not None
    for seed in range(60):
        width, height = 1 + seed, 1 + seed * 7 % 23
        png = filtered_png(width, height, colour=RGB, seed=seed)
        assert decode_image(png, max_pixels=5000).tobytes() == Image.open(io.BytesIO(png)).tobytes(), seed
        png = filtered_png(width, height, colour=RGB_ALPHA, seed=seed)
        pixels = np.asarray(Image.open(io.BytesIO(png)), dtype=np.float64)
        alpha = pixels[:, :, 3:] / 255
        blended = np.rint(pixels[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        np.testing.assert_array_equal(np.asarray(decode_image(png, max_pixels=5000)), blended)


def test_crops_are_pillows() -> None:
    check_crops()


def test_rows_are_pillows() -> None:
    check_rows()


@pytest.mark.parametrize(("width", "height"), [(2300, 2100), (400, 12000)])
def test_an_image_in_several_pieces_of_memory_is_cropped_too(width: int, height: int) -> None:
    image = smooth_image(width, height)
    np.testing.assert_array_equal(center_crop(image, 256), adm_crop(image, 256))


def test_a_png_too_large_for_native_rows_is_the_same_picture() -> None:
    image = smooth_image(2049, 2048)
    assert decode_image(encoded(image, compress_level=1), max_pixels=10_000_000).tobytes() == image.tobytes()


def test_a_compressed_bomb_gives_no_more_than_the_rows_of_its_header() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    header = png_file(4, 4, depth=8, colour=RGB, rows=[])[:33]
    image = decode_image(header + png_chunk(b"IDAT", bomb) + png_chunk(b"IEND", b""), max_pixels=16)
    assert image.getextrema() == ((0, 0), (0, 0), (0, 0))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library is looked for, as by a process that has not loaded it yet."""
    path = tmp_path / "_pixels.so"
    monkeypatch.setattr(native, "LIBRARY", path)
    monkeypatch.setattr(build_pixels, "LIBRARY", path)
    native.library.cache_clear()
    return path


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged by two crops and a PNG; their pixels are checked."""
    image = noise_image(40, 30)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(center_crop(image, 16), adm_crop(image, 16))
        assert decode_image(encoded(image), max_pixels=1200).tobytes() == image.tobytes()
    native.library.cache_clear()
    return caplog.messages


def test_without_the_library_pillow_makes_the_pixels_and_the_log_says_so_once(
    elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    next_step = "Pillow makes the same ones, slower; run `tensorar build-ops`"
    assert told(caplog) == [f"native pixels: {elsewhere} is not there; {next_step}"]


def test_a_library_that_does_not_load_is_not_used(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere.write_bytes(b"no library")
    (message,) = told(caplog)
    assert f"{elsewhere} does not load" in message


def test_a_library_of_other_sources_is_not_used(
    elsewhere: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_pixels.build_pixels()
    assert told(caplog) == []
    monkeypatch.setattr(native, "sources_mark", lambda: "of later sources")
    assert told(caplog)[0].startswith(f"native pixels: {elsewhere} was built from other sources")


def test_a_missing_compiler_is_one_error(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"C\+\+20 compiler must be on PATH or named by CXX, got no-such-compiler"):
        build_pixels.build_pixels()
    assert list(elsewhere.parent.iterdir()) == []
