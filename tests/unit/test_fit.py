"""Fitting a tokenizer: it learns, it resumes to the same bytes, and its pieces equal brute force."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tokenization.codebook import spherical_kmeans
from tokenization.config import FitTokenizerConfig, TokenizerConfig, VQConfig
from tokenization.fit import Fit, batch_positions, fit_tokenizer, learning_rate_at, load_images
from tokenization.reconstruction import reconstruction_loss
from tokenization.tokenizer import Tokenizer

NETWORK = VQConfig(codebook_size=8, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=32)


def write_images(folder: Path, *, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for image_index in range(count):
        pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
        top, left = generator.integers(0, 8, 2)
        pixels[top : top + 8, left : left + 8] = generator.integers(0, 256, 3)
        path = folder / f"class{image_index % 2}" / f"{image_index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def config_in(root: Path, run: str, **changes: object) -> FitTokenizerConfig:
    return FitTokenizerConfig.model_validate(
        {
            "kind": "fit_tokenizer",
            "run_dir": str(root / run),
            "images": str(root / "train"),
            "validation_images": str(root / "validation"),
            "image_size_px": 16,
            "network": NETWORK,
            "num_steps": 75,
            "autoencoder_steps": 10,
            "batch_size": 4,
            "checkpoint_every_n_steps": 25,
            "ema_decay": 0.9,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fit")
    write_images(root / "train", count=10, seed=0)
    write_images(root / "validation", count=4, seed=1)
    fit_tokenizer(config_in(root, "whole"))
    return root


def test_a_fit_learns_and_leaves_a_usable_tokenizer(root: Path) -> None:
    lines = [json.loads(line) for line in (root / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [25, 50, 75]
    assert lines[-1]["held_out_psnr_db"] > lines[0]["held_out_psnr_db"] + 1
    config = TokenizerConfig(weights=str(root / "whole" / "tokenizer.safetensors"), image_size_px=16)
    codes = Tokenizer.load(config).encode(load_images(root / "validation", size_px=16))
    assert codes.shape == (4, 64)


def test_resuming_ends_in_the_same_bytes(root: Path) -> None:
    shutil.copytree(
        root / "whole" / "checkpoints" / "step_00000050", root / "resumed" / "checkpoints" / "step_00000050"
    )
    resumed = fit_tokenizer(config_in(root, "resumed"))
    assert resumed.read_bytes() == (root / "whole" / "tokenizer.safetensors").read_bytes()
    lines = (root / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [75]


def test_a_damaged_checkpoint_is_passed_over_loudly(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(root / "whole" / "checkpoints", root / "damaged" / "checkpoints")
    state = root / "damaged" / "checkpoints" / "step_00000075" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        resumed = fit_tokenizer(config_in(root, "damaged"))
    assert "event=checkpoint_damaged" in caplog.text
    assert "step_00000075" in caplog.text
    assert resumed.read_bytes() == (root / "whole" / "tokenizer.safetensors").read_bytes()


def test_a_finished_fit_is_left_alone(root: Path) -> None:
    path = root / "whole" / "tokenizer.safetensors"
    before = path.stat().st_mtime_ns
    assert fit_tokenizer(config_in(root, "whole")) == path
    assert path.stat().st_mtime_ns == before


def test_lost_or_damaged_weights_are_written_again_from_the_last_checkpoint(root: Path) -> None:
    whole = (root / "whole" / "tokenizer.safetensors").read_bytes()
    for damage in (b"", whole[:-1]):
        shutil.copytree(root / "whole", root / "lost", dirs_exist_ok=True)
        (root / "lost" / "tokenizer.safetensors").write_bytes(damage)
        assert fit_tokenizer(config_in(root, "lost")).read_bytes() == whole


def test_another_config_in_the_same_directory_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="got other batch_size, learning_rate; restore them or choose another run_dir"):
        fit_tokenizer(config_in(root, "whole", batch_size=5, learning_rate=0.5))


def test_a_folder_without_images_is_an_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must hold at least one usable image, got none"):
        fit_tokenizer(config_in(root, "empty", images=str(tmp_path)))


def test_images_are_loaded_in_path_order_without_the_unusable(root: Path, tmp_path: Path) -> None:
    for name, value in (("b/1.png", 2), ("a/2.png", 1), ("c.jpg", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (value * 50,) * 3).save(tmp_path / name)
    (tmp_path / "a" / "1.png").write_bytes(b"broken")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert load_images(tmp_path, size_px=8)[:, 0, 0, 0].tolist() == [50, 100, 150]


def test_unused_codes_are_restarted_and_used_ones_stay(root: Path) -> None:
    images = load_images(root / "train", size_px=16)
    fit = Fit(config_in(root, "restart", num_steps=1000, autoencoder_steps=0), images)
    fit.take_step()
    fit.network.quantize.codebook_used[-40:] = torch.arange(40) % 4
    fit.network.quantize.codebook_used[:-40] = 0
    table = fit.network.quantize.embedding.weight.detach()
    table[4:] = -table[:4]
    fit.step = 50
    before = table.clone()
    fit._restart_unused_codes(torch.from_numpy(images[:4]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.equal(table[:4], before[:4])
    assert (table[4:] != before[4:]).any(dim=1).all()
    torch.testing.assert_close(table[4:].norm(dim=1), torch.ones(4))


def test_every_image_is_seen_once_an_epoch() -> None:
    steps = [batch_positions(step, batch_size=4, num_images=10, seed=7) for step in range(10)]
    assert all(len(positions) == 4 for positions in steps)
    epochs = np.concatenate(steps).reshape(4, 10)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert len(batch_positions(0, batch_size=25, num_images=10, seed=7)) == 25


def test_learning_rate_warms_up_and_ends_near_zero(root: Path) -> None:
    config = config_in(root, "rate", num_steps=1000, learning_rate=1.0)
    assert learning_rate_at(0, config=config) == pytest.approx(0.01)
    assert learning_rate_at(500, config=config) == pytest.approx(0.5)
    assert learning_rate_at(999, config=config) < 1e-5


def test_reconstruction_loss_of_a_known_error() -> None:
    images = torch.zeros(1, 3, 8, 8)
    # A constant error of 1: 1 at each of four sizes, no gradient.
    assert reconstruction_loss(images + 1, images).item() == pytest.approx(4.0)
    # Columns of +1 and -1: 1 at full size, gradient 2 across, nothing at the smaller sizes.
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 3, 8, 8)
    assert reconstruction_loss(stripes, images).item() == pytest.approx(3.0)
    # Half the gradient term, and the squared error of 1 three times.
    assert reconstruction_loss(stripes, images, gradient_weight=0.5, squared_weight=3.0).item() == pytest.approx(5.0)


def test_a_warm_start_begins_from_the_weights_of_the_file(root: Path) -> None:
    weights = root / "whole" / "tokenizer.safetensors"
    changes = {"warm_start": str(weights), "autoencoder_steps": 0, "num_steps": 1, "learning_rate": 1e-9}
    finished = fit_tokenizer(config_in(root, "warm", **changes))
    before, after = load_file(weights), load_file(finished)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-3) for name in before)


def test_a_warm_start_from_another_network_is_refused(root: Path) -> None:
    changes = {"warm_start": str(root / "whole" / "tokenizer.safetensors"), "autoencoder_steps": 0}
    network = NETWORK.model_copy(update={"codebook_size": 16})
    with pytest.raises(ValueError, match=r"its network must be the spec's.*codebook_size=16.*set network"):
        fit_tokenizer(config_in(root, "warm-other", network=network, **changes))


def test_kmeans_finds_well_separated_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(5)
    noisy = directions.repeat(40, 1) + 0.05 * torch.randn(200, 5, generator=generator)
    centers = spherical_kmeans(
        noisy / noisy.norm(dim=1, keepdim=True), num_clusters=5, num_rounds=5, generator=generator
    )
    cosines = centers @ directions.T
    assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2, 3, 4]
    assert cosines.max(dim=1).values.min() > 0.99


def test_codes_are_restarted_only_once_their_use_is_known_and_not_near_the_end(root: Path) -> None:
    config = config_in(root, "due", num_steps=1000, autoencoder_steps=100)
    fit = Fit(config, np.zeros((1, 16, 16, 3), dtype=np.uint8))
    due = []
    for fit.step in range(1001):
        due += [fit.step] if fit._may_restart_codes() else []
    assert due == list(range(150, 801, 50))
