"""The pieces of a fit, each against a value worked out by hand: order of images, rates, losses, clusters, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_fit import config_in

from tokenization.codebook import spherical_kmeans
from tokenization.config import VQConfig
from tokenization.fit import Fit, batch_positions, learning_rate_at
from tokenization.fit_output import stored_weights
from tokenization.reconstruction import reconstruction_loss


def test_weights_that_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(
        FloatingPointError, match=r"fit step 7: every weight must be finite in float16, .* 1 tensors, b f"
    ):
        stored_weights({"a": torch.tensor([65504.0]), "b": torch.tensor([1.0, 65536.0])}, step=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_steps": 40, "autoencoder_steps": 400},
            "autoencoder_steps must be below num_steps 40, got 400; the code",
        ),
        ({"num_steps": 40, "autoencoder_steps": 40}, "autoencoder_steps must be below num_steps 40, got 40"),
        ({"image_size_px": 17}, "multiple of the network's patch 2, 8 at least, got 17; use 16 or 18"),
        ({"image_size_px": 4}, "multiple of the network's patch 2, 8 at least, got 4; use 8 or 10"),
        (
            {"image_size_px": 8, "network": VQConfig(channels=32, channel_multipliers=(1, 1, 1, 1, 1))},
            "multiple of the network's patch 16, 16 at least, got 8; use 16 or 32",
        ),
    ],
)
def test_a_config_that_cannot_be_fitted_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_in(tmp_path, "refused", **changes)


def test_every_image_is_seen_once_an_epoch() -> None:
    steps = [batch_positions(step, batch_size=4, num_images=10, seed=7) for step in range(10)]
    assert all(len(positions) == 4 for positions in steps)
    epochs = np.concatenate(steps).reshape(4, 10)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert len(batch_positions(0, batch_size=25, num_images=10, seed=7)) == 25


def test_learning_rate_warms_up_and_ends_near_zero(tmp_path: Path) -> None:
    config = config_in(tmp_path, "rate", num_steps=1000, learning_rate=1.0)
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


def test_codes_are_restarted_only_once_their_use_is_known_and_not_near_the_end(tmp_path: Path) -> None:
    config = config_in(tmp_path, "due", num_steps=1000, autoencoder_steps=100)
    fit = Fit(config, np.zeros((1, 16, 16, 3), dtype=np.uint8))
    due = []
    for fit.step in range(1001):
        due += [fit.step] if fit._may_restart_codes() else []
    assert due == list(range(150, 801, 50))
