"""The VQ network against LlamaGen's own numbers: codes, images, losses, gradients, and the full-size key lists."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenization.config import NETWORKS, VQConfig
from tokenization.vq import VQNetwork

ORACLES = Path(__file__).parents[1] / "oracles"
TINY = VQConfig(codebook_size=64, channels=32, channel_multipliers=(1, 1, 2, 2), z_channels=32)


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return torch.load(ORACLES / "llamagen_vq_tiny_ds8.pt", weights_only=True)


@pytest.fixture
def network(oracle: dict[str, Any]) -> VQNetwork:
    network = VQNetwork(TINY)
    network.load_state_dict(oracle["state_dict"])
    return network


def test_state_dict_has_the_oracles_keys_in_its_order(oracle: dict[str, Any]) -> None:
    assert list(VQNetwork(TINY).state_dict()) == list(oracle["state_dict"])


@torch.no_grad()
def test_encoding_equals_the_oracle(oracle: dict[str, Any], network: VQNetwork) -> None:
    torch.testing.assert_close(network.encoder(oracle["image"]), oracle["encoder_out"], rtol=0, atol=1e-4)
    torch.testing.assert_close(network.pre_quantize(oracle["image"]), oracle["pre_quant"], rtol=0, atol=1e-4)
    assert torch.equal(network.encode(oracle["image"]), oracle["codes"])
    assert torch.equal(network.encode(oracle["image"].flip(3)), oracle["codes_flipped_image"])


@torch.no_grad()
def test_decoding_equals_the_oracle(oracle: dict[str, Any], network: VQNetwork) -> None:
    reconstruction = network(oracle["image"])
    torch.testing.assert_close(reconstruction.reconstruction_BCHW, oracle["recon"], rtol=0, atol=1e-4)
    torch.testing.assert_close(reconstruction.quantized.quantized_BDHW, oracle["quant"], rtol=0, atol=1e-4)
    for codes, images in (("codes", "decode_code_recon"), ("random_codes", "random_codes_decoded")):
        decoded = network.decode(oracle[codes].view(2, 4, 4))
        torch.testing.assert_close(decoded, oracle[images], rtol=0, atol=1e-4)


def test_training_losses_and_gradients_equal_the_oracle(oracle: dict[str, Any], network: VQNetwork) -> None:
    train = oracle["train"]
    output = network(oracle["image"], commitment_weight=0.25, entropy_weight=0.1)
    losses = output.quantized
    torch.testing.assert_close(output.reconstruction_BCHW, train["recon"], rtol=0, atol=1e-4)
    torch.testing.assert_close(losses.codebook_loss, train["vq_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.commitment_loss, train["commit_loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.entropy_loss, train["entropy_loss"], rtol=0, atol=1e-5)
    squared_error = (output.reconstruction_BCHW - oracle["image"]).square().mean()
    loss = squared_error + losses.codebook_loss + losses.commitment_loss + losses.entropy_loss
    torch.testing.assert_close(loss, train["loss"], rtol=0, atol=1e-5)
    loss.backward()
    parameters = dict(network.named_parameters())
    assert len(train["grads"]) == 4
    for name, gradient in train["grads"].items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=0, atol=1e-4, msg=name)


def test_history_of_used_codes_equals_the_oracles_usage(oracle: dict[str, Any], network: VQNetwork) -> None:
    network.quantize.codebook_used.zero_()
    network.quantize.remember(oracle["codes"])
    assert len(network.quantize.used_codes()) / 64 == oracle["train"]["codebook_usage"]
    assert network.quantize.codebook_used[-32:].tolist() == oracle["codes"].flatten().tolist()


@pytest.mark.parametrize(("name", "num_params"), [("vq16", 71_883_403), ("vq8", 70_109_835)])
def test_full_size_networks_have_llamagens_keys_shapes_and_count(name: str, num_params: int) -> None:
    keys = json.loads((ORACLES / "keys" / f"llamagen_{name}.json").read_text())["keys"]
    with torch.device("meta"):
        network = VQNetwork(NETWORKS[name])
    state = network.state_dict()
    assert list(state) == list(keys)
    assert [list(value.shape) for value in state.values()] == [shape for shape, _ in keys.values()]
    assert sum(parameter.numel() for parameter in network.parameters()) == num_params
    assert [key for key, (_, kind) in keys.items() if kind != "param"] == ["quantize.codebook_used"]


def test_a_space_to_depth_stem_divides_the_side_and_keeps_the_rest() -> None:
    config = VQConfig(codebook_size=16, channels=32, channel_multipliers=(1, 1), z_channels=32, stem_patch_px=2)
    network = VQNetwork(config)
    images = torch.randn(2, 3, 16, 16)
    assert network.encode(images).shape == (2, 16)
    assert network(images).reconstruction_BCHW.shape == images.shape
    assert network.encoder.conv_in.weight.shape == (32, 12, 3, 3)
