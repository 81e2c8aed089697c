"""From file bytes to views against the plain Pillow expression of the same steps, one core, byte-equal output.

The baseline is what one writes first: `Image.open`, alpha pasted on white, `convert("RGB")`, guided-diffusion's crop,
`np.asarray`, and Pillow's crops of those for the ten. `ours_by_pillow` is ours where native pixels are not built;
`pixels_only` is `Image.open(..).load()`, which no decoding by `Image.open` can beat. Rounds alternate, medians are
given. JSON lines; the last key of each is the ratio of ours to the baseline.
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tokenization import native
from tokenization.config import ViewsConfig
from tokenization.crops import make_views
from tokenization.decoding import decode_image

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from image_files import encoded, smooth_image

EMOJI = Path(__file__).parents[1] / "tests" / "data" / "held_out_emoji"
NUM_ROUNDS = 15
MAX_PIXELS = 100_000_000


def emoji_files() -> list[bytes]:
    """64 real pictures of 64 px with an alpha channel."""
    return [path.read_bytes() for path in sorted(EMOJI.glob("*.png"))]


def photograph_files(width: int, height: int) -> list[bytes]:
    """16 JPEGs, smooth colours and noise, about as large as photographs are."""
    return [encoded(smooth_image(width, height, seed=seed), "JPEG", quality=90) for seed in range(16)]


def plain_crop(image: Image.Image, size_px: int) -> Image.Image:
    """guided-diffusion's centre crop, step by step."""
    while min(image.size) >= 2 * size_px:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size_px / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size_px) // 2, (image.height - size_px) // 2
    return image.crop((left, top, left + size_px, top + size_px))


def plain_views(data: bytes, *, views: ViewsConfig, size_px: int) -> np.ndarray:
    """The views (V, size_px, size_px, 3) by Pillow's public functions alone."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "RGBA":
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        image = canvas
    image = image.convert("RGB")
    if views.kind == "center":
        return np.asarray(plain_crop(image, size_px))[np.newaxis]
    square = plain_crop(image, int(size_px * views.crop_range))
    far, middle = square.width - size_px, round((square.width - size_px) / 2)
    corners = ((0, 0), (far, 0), (0, far), (far, far), (middle, middle))
    return np.stack(
        [
            np.asarray(source.crop((left, top, left + size_px, top + size_px)))
            for source in (square, ImageOps.mirror(square))
            for left, top in corners
        ]
    )


def our_views(data: bytes, *, views: ViewsConfig, size_px: int) -> np.ndarray:
    """The views as the tokenize job makes them, their boxes included."""
    return make_views(decode_image(data, max_pixels=MAX_PIXELS), config=views, image_size_px=size_px).images_VHWC


def our_views_by_pillow(data: bytes, *, views: ViewsConfig, size_px: int) -> np.ndarray:
    """The same as on a machine where native pixels are not built."""
    native.library, library = (lambda: None), native.library
    try:
        return our_views(data, views=views, size_px=size_px)
    finally:
        native.library = library


def pixels_only(data: bytes, **_: object) -> None:
    """Pillow's reading and decoding, without anything after."""
    Image.open(io.BytesIO(data)).load()


def measure(name: str, files: list[bytes], *, views: ViewsConfig, size_px: int) -> None:
    """Print one line: images/s of each way, and of ours over plain Pillow's."""
    assert native.library() is not None, "run `tensorar build-ops` first"
    ways: dict[str, Callable[..., object]] = {
        "ours": our_views,
        "ours_by_pillow": our_views_by_pillow,
        "plain": plain_views,
        "pixels_only": pixels_only,
    }
    options = {"views": views, "size_px": size_px}
    for data in files:
        np.testing.assert_array_equal(our_views(data, **options), plain_views(data, **options))
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(NUM_ROUNDS):
        for way, function in ways.items():
            begin_s = time.perf_counter()
            for data in files:
                function(data, **options)
            rates[way].append(len(files) / (time.perf_counter() - begin_s))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    line = {"case": name, "num_files": len(files), "bytes_per_file": sum(map(len, files)) // len(files)}
    line |= {f"{way}_images_per_s": round(rate) for way, rate in medians.items()}
    print(json.dumps(line | {"ratio_to_plain_pillow": round(medians["ours"] / medians["plain"], 2)}))


def main() -> None:
    """Print a line for each case; 500 x 375 px is what an image of ImageNet most often has."""
    center, ten = ViewsConfig(kind="center"), ViewsConfig(kind="ten_crop")
    emoji, photographs, of_imagenet = emoji_files(), photograph_files(512, 512), photograph_files(500, 375)
    measure("64 px RGBA PNG to 64 px", emoji * 4, views=center, size_px=64)
    measure("512 px JPEG to 256 px", photographs, views=center, size_px=256)
    measure("512 px JPEG to ten crops of 256 px", photographs, views=ten, size_px=256)
    measure("500 x 375 px JPEG to 256 px", of_imagenet, views=center, size_px=256)
    measure("500 x 375 px JPEG to ten crops of 256 px", of_imagenet, views=ten, size_px=256)
    measure("64 px RGBA PNG to ten crops of 32 px", emoji * 2, views=ten, size_px=32)


if __name__ == "__main__":
    main()
