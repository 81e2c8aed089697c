"""What a micro step reads: which steps train on own drafts, what dropout is seeded by, the parts put together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_shards import train_config
from torch import Tensor

from training.config import TrainConfig
from training.gpt import Readout
from training.inputs import dropout_seed, make_inputs, uses_own_drafts, with_own_drafts


def config_of(*, fraction: float = 0.3, window_size: int = 4, seed: int = 0) -> TrainConfig:
    config = train_config(Path("run"), shards=Path("set"))
    noise = config.noise.model_copy(update={"own_draft_fraction": fraction, "offset_weights": None})
    model = config.model.model_copy(update={"window_size": window_size})
    return config.model_copy(update={"noise": noise, "model": model, "seed": seed})


def steps_on_own_drafts(config: TrainConfig, *, count: int = 3000) -> list[int]:
    return [step for step in range(1, count + 1) if uses_own_drafts(config, step=step)]


def test_the_asked_for_share_of_steps_trains_on_own_drafts() -> None:
    steps = steps_on_own_drafts(config_of(fraction=0.3))
    # Five standard deviations of a binomial share.
    assert len(steps) / 3000 == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 3000) ** 0.5)
    assert steps == steps_on_own_drafts(config_of(fraction=0.3))
    assert steps != steps_on_own_drafts(config_of(fraction=0.3, seed=1))
    assert len(steps_on_own_drafts(config_of(fraction=1.0), count=100)) == 100
    assert steps_on_own_drafts(config_of(fraction=0.0), count=100) == []


def test_a_base_model_has_no_drafts_to_train_on() -> None:
    assert steps_on_own_drafts(config_of(fraction=1.0, window_size=1), count=100) == []


def test_dropout_has_a_seed_of_its_own_for_each_step_micro_step_and_rank() -> None:
    places = [(step, micro_step, rank) for step in (1, 2) for micro_step in (0, 1) for rank in (0, 1)]
    seeds = [
        dropout_seed(config_of(seed=seed), step=step, micro_step=micro_step, rank=rank)
        for seed in (0, 1)
        for step, micro_step, rank in places
    ]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


class PredictsOneCode(torch.nn.Module):
    """Every prediction is code 3, for certain."""

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size

    def forward(self, windows_BTK: Tensor, labels_B: Tensor, *, readout: Readout) -> Tensor:
        logits = torch.full((*windows_BTK.shape, self.codebook_size), -1e9)
        logits[..., 3] = 0.0
        drafts: Tensor = readout(logits, torch.eye(self.codebook_size))
        return drafts


def test_own_drafts_take_the_place_of_noise_and_leave_the_true_codes() -> None:
    config = config_of()
    num_positions = config.model.num_positions
    codes_BT = np.arange(5 * num_positions, dtype=np.int64).reshape(5, num_positions) % config.model.codebook_size
    labels_B, counters_B = np.arange(5, dtype=np.int64) % config.model.num_classes, np.arange(5, dtype=np.int64)
    noised = make_inputs(
        codes_BT, labels_B, counters_B, config=config, step=1, label_dropout=0.0, device=torch.device("cpu")
    )
    assert torch.equal(noised.codes_BT, torch.from_numpy(codes_BT))
    assert torch.equal(noised.labels_B, torch.from_numpy(labels_B))
    assert torch.equal(noised.windows_BTK[:, :, 0], noised.codes_BT)
    drafted = with_own_drafts(noised, PredictsOneCode(config.model.codebook_size), config=config, step=1)
    assert torch.equal(drafted.windows_BTK[:, :, 0], noised.codes_BT)
    assert torch.equal(drafted.windows_BTK[:, :, 1:], torch.full_like(drafted.windows_BTK[:, :, 1:], 3))


def test_the_asked_for_labels_are_dropped() -> None:
    config = config_of()
    codes_BT = np.zeros((3, config.model.num_positions), dtype=np.int64)
    labels_B, counters_B = np.zeros(3, dtype=np.int64), np.arange(3, dtype=np.int64)
    dropped = make_inputs(
        codes_BT, labels_B, counters_B, config=config, step=1, label_dropout=1.0, device=torch.device("cpu")
    )
    assert dropped.labels_B.tolist() == [config.model.num_classes] * 3
