"""Crops and whole ten-crop codes against arrays that ADM's and LlamaGen's own code produced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenization.config import ViewsConfig, VQConfig
from tokenization.crops import center_crop, make_views, ten_crop
from tokenization.pixels import to_network_range
from tokenization.vq import VQNetwork

ORACLES = Path(__file__).parents[1] / "oracles"
CROPS = np.load(ORACLES / "center_crop_arr.npz")
CODES = np.load(ORACLES / "llamagen_extract_codes.npz")


@pytest.mark.parametrize("size_px", [32, 33, 35, 64])
@pytest.mark.parametrize("image_index", range(5))
def test_center_crop_equals_adms(image_index: int, size_px: int) -> None:
    image = Image.fromarray(CROPS[f"in{image_index}"])
    crop = np.asarray(center_crop(image, size_px))
    np.testing.assert_array_equal(crop, CROPS[f"in{image_index}_crop{size_px}"])


def test_ten_crop_equals_llamagens() -> None:
    image = Image.fromarray(CROPS["in0"])
    crops = ten_crop(center_crop(image, 35), 32)
    np.testing.assert_array_equal(crops, CODES["img0_tencrop110_crops"])


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
