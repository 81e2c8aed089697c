"""Every bad or odd file becomes the right pixels or a named reject, in any thread, quietly and in little memory."""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import BAD_INPUTS, MAX_PIXELS, BadInput, damaged_files
from image_files import FORMATS, encoded, smooth_image

from tokenization.config import ViewsConfig
from tokenization.crops import make_views
from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError

pytestmark = pytest.mark.usefixtures("pixels")

EMOJI = sorted((Path(__file__).parents[1] / "data" / "held_out_emoji").glob("*.png"))
DECODE_ALL = """
import resource
from concurrent.futures import ThreadPoolExecutor
from bad_inputs import BAD_INPUTS, MAX_PIXELS
from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError

def reason_of(bad):
    try:
        decode_image(bad.data, max_pixels=MAX_PIXELS)
    except ImageRejectedError as error:
        return error.reason

before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(8) as pool:
    reasons = list(pool.map(reason_of, BAD_INPUTS))
expected = [bad.expected_reason if bad.expected_stage == "decode" else None for bad in BAD_INPUTS]
print(reasons == expected, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) // 1024)
"""

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def outcome(data: bytes, *, max_pixels: int) -> bytes | ImageRejectedError:
    """The pixels, or why there are none."""
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except ImageRejectedError as error:
        return error
    assert image.mode == "RGB"
    return image.tobytes()


def flipped(data: bytes, positions: list[int], bits: list[int]) -> bytes:
    damaged = bytearray(data)
    for position, bit in zip(positions, bits, strict=True):
        damaged[position] ^= 1 << bit
    return bytes(damaged)


@pytest.mark.parametrize(
    "bad", [bad for bad in BAD_INPUTS if bad.expected_reason is not None], ids=lambda bad: bad.name
)
def test_a_bad_input_is_rejected_with_its_stage_and_reason_in_one_line(bad: BadInput) -> None:
    with pytest.raises(ImageRejectedError) as caught:
        make_views(decode_image(bad.data, max_pixels=MAX_PIXELS), config=ViewsConfig(), image_size_px=16)
    assert (caught.value.stage, caught.value.reason) == (bad.expected_stage, bad.expected_reason), str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("bad", [bad for bad in BAD_INPUTS if bad.expected_reason is None], ids=lambda bad: bad.name)
def test_an_odd_input_has_views(bad: BadInput) -> None:
    image = decode_image(bad.data, max_pixels=MAX_PIXELS)
    views = make_views(image, config=ViewsConfig(kind="ten_crop"), image_size_px=16)
    assert views.images_VHWC.shape == (10, 16, 16, 3)


def test_inputs_are_many_of_many_kinds_and_always_the_same() -> None:
    assert len(BAD_INPUTS) >= 200
    assert len(Counter(bad.kind for bad in BAD_INPUTS)) >= 15
    assert max(Counter(bad.name for bad in BAD_INPUTS).values()) == 1
    assert not any("." in bad.name for bad in BAD_INPUTS)
    again = {bad.name: bad for bad in damaged_files()}
    assert all(again.get(bad.name, bad) == bad for bad in BAD_INPUTS)


def test_all_inputs_in_eight_threads_leave_no_warning_and_take_little_memory() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", DECODE_ALL],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    as_expected, grown_mib = result.stdout.split()
    assert as_expected == "True"
    assert int(grown_mib) < 64


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in FORMATS), ("WEBP", {"lossless": True}), ("JPEG", {"progressive": True})],
)
def test_a_file_cut_anywhere_gives_its_own_pixels_or_none(kind: str, options: dict[str, bool]) -> None:
    whole = encoded(smooth_image(21, 17), kind, **options)
    pixels = outcome(whole, max_pixels=1000)
    outcomes = [outcome(whole[:size], max_pixels=1000) for size in range(len(whole))]
    assert [size for size, seen in enumerate(outcomes) if isinstance(seen, bytes) and seen != pixels] == []
    assert sum(isinstance(seen, ImageRejectedError) for seen in outcomes) > 0.9 * len(whole)


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bits_give_pixels_or_a_reject(kind: str) -> None:
    generator = np.random.default_rng(1)
    whole = encoded(smooth_image(21, 17), kind)
    for _ in range(400):
        positions = generator.integers(0, len(whole), generator.integers(1, 5)).tolist()
        bits = generator.integers(0, 8, len(positions)).tolist()
        seen = outcome(flipped(whole, positions, bits), max_pixels=100_000)
        assert isinstance(seen, bytes) or seen.stage == "decode"


def test_a_flipped_bit_of_a_png_never_gives_other_pixels() -> None:
    whole = encoded(smooth_image(15, 11))
    pixels = outcome(whole, max_pixels=1000)
    for position in range(len(whole)):
        seen = outcome(flipped(whole, [position], [position % 8]), max_pixels=1000)
        assert isinstance(seen, ImageRejectedError) or seen == pixels, position


def test_eight_threads_decode_the_same_pixels_as_one() -> None:
    files = [path.read_bytes() for path in EMOJI]
    files += [encoded(smooth_image(90, 70, seed=seed), kind) for kind in FORMATS for seed in range(8)]
    files *= 4

    def views_of(data: bytes) -> bytes:
        image = decode_image(data, max_pixels=MAX_PIXELS)
        return make_views(image, config=ViewsConfig(kind="flip"), image_size_px=48).images_VHWC.tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(views_of, files)) == [views_of(data) for data in files]
