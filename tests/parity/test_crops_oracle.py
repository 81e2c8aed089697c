"""Crops and whole ten-crop codes against arrays that ADM's and LlamaGen's own code produced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded
from PIL import Image

from tokenization.config import ViewsConfig, VQConfig
from tokenization.crops import center_crop, make_views, ten_crop
from tokenization.decoding import decode_image
from tokenization.pixels import to_network_range
from tokenization.vq import VQNetwork

pytestmark = pytest.mark.usefixtures("pixels")

ORACLES = Path(__file__).parents[1] / "oracles"
CROPS = np.load(ORACLES / "center_crop_arr.npz")
CODES = np.load(ORACLES / "llamagen_extract_codes.npz")


@pytest.mark.parametrize("size_px", [32, 33, 35, 64])
@pytest.mark.parametrize("image_index", range(5))
def test_center_crop_equals_adms(image_index: int, size_px: int) -> None:
    image = Image.fromarray(CROPS[f"in{image_index}"])
    crop = center_crop(image, size_px)
    np.testing.assert_array_equal(crop, CROPS[f"in{image_index}_crop{size_px}"])


def test_ten_crop_equals_llamagens() -> None:
    image = Image.fromarray(CROPS["in0"])
    crops = ten_crop(center_crop(image, 35), 32)
    np.testing.assert_array_equal(crops, CODES["img0_tencrop110_crops"])


# Left and top of torchvision's TenCrop(32); Python rounds the middle 1.5 up and 0.5 down to the even number.
@pytest.mark.parametrize(
    ("crop_range", "side_px", "corners"),
    [
        (1.1, 35, [(0, 0), (3, 0), (0, 3), (3, 3), (2, 2)]),
        (1.05, 33, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0)]),
    ],
)
@pytest.mark.parametrize("image_index", range(5))
def test_ten_views_of_a_file_are_regions_of_adms_crop(
    image_index: int, crop_range: float, side_px: int, corners: list[tuple[int, int]]
) -> None:
    file = encoded(Image.fromarray(CROPS[f"in{image_index}"]))
    views = make_views(
        decode_image(file, max_pixels=100_000),
        config=ViewsConfig(kind="ten_crop", crop_range=crop_range),
        image_size_px=32,
    )
    square = CROPS[f"in{image_index}_crop{side_px}"]
    expected = [source[y : y + 32, x : x + 32] for source in (square, square[:, ::-1]) for x, y in corners]
    np.testing.assert_array_equal(views.images_VHWC, expected)


@pytest.fixture(scope="module")
def network() -> VQNetwork:
    oracle = torch.load(ORACLES / "llamagen_vq_tiny_ds8.pt", weights_only=True)
    network = VQNetwork(VQConfig(codebook_size=64, channels=32, channel_multipliers=(1, 1, 2, 2), z_channels=32))
    network.load_state_dict(oracle["state_dict"])
    return network


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("tencrop110", ViewsConfig(kind="ten_crop", crop_range=1.1)),
        ("tencrop105", ViewsConfig(kind="ten_crop", crop_range=1.05)),
        ("flip", ViewsConfig(kind="flip")),
    ],
)
@pytest.mark.parametrize("image_index", range(3))
@torch.no_grad()
def test_codes_of_views_equal_llamagens_extract_codes(
    network: VQNetwork, image_index: int, name: str, views: ViewsConfig
) -> None:
    image = Image.fromarray(CROPS[f"in{image_index}"])
    images_VHWC = make_views(image, config=views, image_size_px=32).images_VHWC
    codes_VT = network.encode(to_network_range(images_VHWC, device=torch.device("cpu")))
    np.testing.assert_array_equal(codes_VT.numpy(), CODES[f"img{image_index}_{name}_codes"][0])
