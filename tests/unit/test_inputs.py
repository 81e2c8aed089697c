"""What a micro step reads: which steps train on own drafts, what dropout is seeded by, the parts put together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from called_ops import CalledOps
from synthetic_shards import train_config
from test_order import word_by_hand
from torch import Tensor

from training import noise
from training.config import TrainConfig
from training.gpt import Readout
from training.inputs import betas_of_step, dropout_seed, make_inputs, uses_own_drafts, with_own_drafts


def config_of(*, fraction: float = 0.3, window_size: int = 4, seed: int = 0, **noise_fields: Any) -> TrainConfig:
    config = train_config(Path("run"), shards=Path("set"))
    changes = {"own_draft_fraction": fraction, "offset_weights": None} | noise_fields
    noise = config.noise.model_copy(update=changes)
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


def test_jitter_moves_the_betas_of_drafts_by_one_uniform_draw_a_step() -> None:
    config = config_of(schedule="linear", beta_jitter=0.2)  # betas 0, 1/3, 2/3, 1
    shifts = []
    for step in range(1, 2001):
        first, second, third, last = betas_of_step(config, step=step)
        assert first == 0.0
        assert third - second == pytest.approx(1 / 3)
        shift = second - 1 / 3
        assert last == pytest.approx(min(1.0, 1.0 + shift))
        shifts.append(shift)
    assert -0.2 <= min(shifts) < -0.199 < 0.199 < max(shifts) <= 0.2
    # The mean of 2,000 uniform draws, five standard deviations; each is independent of the one before.
    assert np.mean(shifts) == pytest.approx(0.0, abs=5 * 0.2 / (3 * 2000) ** 0.5)
    assert abs(np.corrcoef(shifts[:-1], shifts[1:])[0, 1]) < 5 / 2000**0.5
    assert betas_of_step(config, step=9) == betas_of_step(config, step=9)
    assert betas_of_step(config, step=9) != betas_of_step(config_of(schedule="linear", beta_jitter=0.2, seed=1), step=9)


def test_jitter_is_clipped_and_validation_has_none() -> None:
    config = config_of(schedule="linear", beta_jitter=1.0)
    betas = [betas_of_step(config, step=step) for step in range(1, 200)]
    assert min(map(min, betas)) == 0.0
    assert max(map(max, betas)) == 1.0
    assert all(first == 0.0 for first, *_ in betas)
    assert betas_of_step(config, step=0) == pytest.approx((0.0, 1 / 3, 2 / 3, 1.0))
    assert betas_of_step(config_of(schedule="linear"), step=7) == pytest.approx((0.0, 1 / 3, 2 / 3, 1.0))


def test_windows_of_a_step_are_noised_by_its_jittered_betas() -> None:
    config = config_of(schedule="none", beta_jitter=0.9)
    shape = (200, config.model.num_positions)
    arguments = (np.full(shape, 99, dtype=np.int64), np.zeros(200, dtype=np.int64), np.arange(200, dtype=np.int64))
    for step in (1, 2, 3, 4):
        inputs = make_inputs(*arguments, config=config, step=step, label_dropout=0.0, device=torch.device("cpu"))
        inside = inputs.windows_BTK[:, :-3]
        shares = (inside != 99).double().mean((0, 1)).tolist()
        beta = betas_of_step(config, step=step)[1]
        # 2,600 draws an offset, five standard deviations.
        assert shares == pytest.approx([0.0, beta, beta, beta], abs=5 * 0.5 / 2600**0.5)
    assert {betas_of_step(config, step=step)[1] > 0.0 for step in (1, 2, 3, 4)} == {True, False}


def test_what_a_step_draws_for_all_samples_are_words_of_its_number() -> None:
    seed, step = 2**40 + 3, 9
    key = [(seed & 0xFFFFFFFF, purpose | seed >> 32 << 8) for purpose in (0x13, 0x14, 0x16)]
    own_drafts, jitter = word_by_hand(step, key=key[0], stream=0), word_by_hand(step, key=key[2], stream=0)
    for above, is_on_own_drafts in ((0, False), (1, True)):
        config = config_of(fraction=((own_drafts >> 11) + above) / 2**53, seed=seed)
        assert uses_own_drafts(config, step=step) is is_on_own_drafts
    config = config_of(schedule="linear", beta_jitter=0.2, seed=seed)
    shift = 0.2 * (2 * jitter / 2**64 - 1)
    assert betas_of_step(config, step=step)[1] == pytest.approx(1 / 3 + shift, abs=1e-14)
    word = word_by_hand(5 << 32 | 6, key=key[1], stream=step)
    assert dropout_seed(config, step=step, micro_step=5, rank=6) == word // 2


def test_dropout_has_a_seed_of_its_own_for_each_step_micro_step_and_rank() -> None:
    places = [(step, micro_step, rank) for step in (1, 2) for micro_step in (0, 1) for rank in (0, 1)]
    seeds = [
        dropout_seed(config_of(seed=seed), step=step, micro_step=micro_step, rank=rank)
        for seed in (0, 1)
        for step, micro_step, rank in places
    ]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("coupling", ["independent", "shared"])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_the_draws_of_a_step_are_those_of_its_seed_number_and_samples(name: str, coupling: str) -> None:
    config = config_of(seed=2**40 + 3, schedule="linear", coupling=coupling)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"ops": name})})
    codes = torch.randint(16, (6, config.model.num_positions), generator=torch.Generator().manual_seed(0))
    labels, counters = torch.tensor([0, 1, 2, 3, -1, 0]), torch.tensor([7, 2**35, 0, 1, 2, 12])
    arrays = (codes.numpy(), labels.numpy(), counters.numpy())
    inputs = make_inputs(*arrays, config=config, step=9, label_dropout=0.5, device=torch.device("cpu"))
    draws: dict[str, Any] = {"seed": 2**40 + 3, "step": 9, "sample_counters_B": counters}
    betas = (0.0, 1 / 3, 2 / 3, 1.0)
    windows = noise.noise_windows(codes, betas=betas, codebook_size=16, coupling=coupling, **draws)  # type: ignore[arg-type]
    assert torch.equal(inputs.windows_BTK, windows)
    dropped = noise.drop_labels(labels, fraction=0.5, null_label=config.model.num_classes, **draws)
    assert torch.equal(inputs.labels_B, dropped)
    assert 1 < int((dropped == config.model.num_classes).sum()) < 6
    assert torch.equal(inputs.counters_B, counters)
    drafted = with_own_drafts(inputs, PrefersOneCode(), config=config, step=9)
    expected = noise.draft_windows(PrefersOneCode(), windows, dropped, **draws)
    assert torch.equal(drafted.windows_BTK, expected)
    assert drafted.labels_B is inputs.labels_B


@pytest.mark.parametrize(("name", "called"), [("native", ["noise_windows"]), ("reference", [])])
def test_noise_is_made_by_the_ops_that_were_asked_for(name: str, called: list[str]) -> None:
    config = config_of(schedule="linear")
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"ops": name})})
    codes_BT, zeros_B = np.zeros((2, config.model.num_positions), dtype=np.int64), np.zeros(2, dtype=np.int64)
    with CalledOps() as seen:
        make_inputs(codes_BT, zeros_B, zeros_B, config=config, step=1, label_dropout=0.0, device=torch.device("cpu"))
    assert seen.names == called


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


class PrefersOneCode(torch.nn.Module):
    """Code 3 has a logit of ln 3 above another, all else none: at temperature 1 it is drawn three times in four."""

    def forward(self, windows_BTK: Tensor, labels_B: Tensor, *, readout: Readout) -> Tensor:
        logits = torch.full((*windows_BTK.shape, 16), -1e9)
        logits[..., 3], logits[..., 5] = float(np.log(3)), 0.0
        drafts: Tensor = readout(logits, torch.eye(16))
        return drafts


@pytest.mark.parametrize(
    ("temperature", "step", "share"),
    [(1.0, 1, 3 / 4), (0.5, 1, 9 / 10), (2.0, 1, 3**0.5 / (1 + 3**0.5)), (0.5, 0, 3 / 4)],
    ids=["1", "1/2", "2", "validation is at 1"],
)
def test_own_drafts_are_drawn_at_their_temperature_in_training(temperature: float, step: int, share: float) -> None:
    config = config_of(draft_temperature=temperature)
    codes_BT = np.zeros((200, config.model.num_positions), dtype=np.int64)
    labels_B, counters_B = np.zeros(200, dtype=np.int64), np.arange(200, dtype=np.int64)
    noised = make_inputs(
        codes_BT, labels_B, counters_B, config=config, step=step, label_dropout=0.0, device=torch.device("cpu")
    )
    drafts = with_own_drafts(noised, PrefersOneCode(), config=config, step=step).windows_BTK[:, :, 1:]
    assert float((drafts == 3).double().mean()) == pytest.approx(share, abs=5 * 0.5 / drafts.numel() ** 0.5)


def test_the_asked_for_labels_are_dropped() -> None:
    config = config_of()
    codes_BT = np.zeros((3, config.model.num_positions), dtype=np.int64)
    labels_B, counters_B = np.zeros(3, dtype=np.int64), np.arange(3, dtype=np.int64)
    dropped = make_inputs(
        codes_BT, labels_B, counters_B, config=config, step=1, label_dropout=1.0, device=torch.device("cpu")
    )
    assert dropped.labels_B.tolist() == [config.model.num_classes] * 3
