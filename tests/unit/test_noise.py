"""Windows and what replaces their drafts: the schedules' table, the share replaced, and independence of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import philox
from torch import Tensor, nn

from training.config import ModelConfig, NoiseConfig
from training.gpt import Readout
from training.noise import beta_of_offset, draft_windows, drop_labels, make_windows, noise_windows
from training.philox import Purpose, cell_of, draw_words
from training.tensorar import build_model

V = 50


def _noise(codes: Tensor, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "betas": (0.0, 0.5, 0.8, 1.0),
        "codebook_size": V,
        "coupling": "independent",
        "seed": 3,
        "step": 7,
        "sample_counters_B": torch.arange(len(codes)),
    }
    return noise_windows(codes, **(arguments | changes))


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [  # the table of the method, k = 4, closed
        ("linear", (0.0, 0.333, 0.667, 1.0)),
        ("sine", (0.0, 0.5, 0.866, 1.0)),
        ("sqrt", (0.0, 0.577, 0.816, 1.0)),
        ("exponential", (0.0, 0.506, 0.814, 1.0)),
        ("none", (0.0, 0.0, 0.0, 0.0)),
        ("full", (0.0, 1.0, 1.0, 1.0)),
    ],
)
def test_closed_schedules_are_the_table(schedule: Any, betas: tuple[float, ...]) -> None:
    got = beta_of_offset(NoiseConfig(schedule=schedule), window_size=4)
    assert got == pytest.approx(betas, abs=5e-4)
    assert got[-1] == betas[-1]  # exactly 1, so that the last offset is always replaced


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [  # u = j / 4; exponential without its divisor: 1 - exp(-j / 2)
        ("linear", (0.0, 0.25, 0.5, 0.75)),
        ("sine", (0.0, 0.3827, 0.7071, 0.9239)),
        ("sqrt", (0.0, 0.5, 0.7071, 0.8660)),
        ("exponential", (0.0, 0.3935, 0.6321, 0.7769)),
    ],
)
def test_open_schedules_stay_below_1(schedule: Any, betas: tuple[float, ...]) -> None:
    config = NoiseConfig(schedule=schedule, end_point="open")
    assert beta_of_offset(config, window_size=4) == pytest.approx(betas, abs=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "sine", "sqrt", "exponential", "none", "full"])
def test_window_size_1_has_one_clean_offset(schedule: Any) -> None:
    assert beta_of_offset(NoiseConfig(schedule=schedule), window_size=1) == (0.0,)


def test_windows_hold_the_next_codes_and_mark_what_lies_outside() -> None:
    windows, valid = make_windows(torch.tensor([[5, 6, 7, 8]]), window_size=3)
    assert windows.tolist() == [[[5, 6, 7], [6, 7, 8], [7, 8, 0], [8, 0, 0]]]
    assert valid.tolist() == [[True, True, True], [True, True, True], [True, True, False], [True, False, False]]


@pytest.mark.parametrize("coupling", ["independent", "shared"])
def test_share_replaced_is_beta_and_replacements_are_uniform(coupling: Any) -> None:
    codes = torch.full((400, 64), V)  # a code that no replacement can be
    windows = _noise(codes, coupling=coupling)
    inside = windows[:, :61]
    replaced = (inside != V).double().mean((0, 1))
    # 24,400 draws an offset, 5 standard deviations
    assert replaced.tolist() == pytest.approx([0.0, 0.5, 0.8, 1.0], abs=5 * 0.5 / 24_400**0.5)
    counts = torch.bincount(inside[:, :, 3].flatten(), minlength=V)[:V].double()
    expected = counts.sum() / V
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 49 + 5 * (2 * 49) ** 0.5


def test_replacement_follows_the_documented_integer_rule() -> None:
    codes = torch.randint(0, V, (2, 6), generator=torch.Generator().manual_seed(0))
    windows = _noise(codes, betas=(0.0, 0.3), sample_counters_B=torch.tensor([4, 2**40 + 1]))
    for image, counter in enumerate((4, 2**40 + 1)):
        for position in range(5):
            cell = cell_of(torch.tensor(position), torch.tensor(1))
            words = draw_words(Purpose.NOISE_INDEPENDENT, seed=3, samples=torch.tensor(counter), step=7, cells=cell)
            is_replaced = int(words[0]) < int(0.3 * 2**32)
            expected = int(words[1]) * V // 2**32 if is_replaced else int(codes[image, position + 1])
            assert int(windows[image, position, 1]) == expected


def test_a_code_is_replaced_from_the_very_threshold_of_its_word_on() -> None:
    codes = torch.full((1, 2), V)
    cell = cell_of(torch.tensor(0), torch.tensor(1))
    words = draw_words(Purpose.NOISE_INDEPENDENT, seed=3, samples=torch.tensor(0), step=7, cells=cell)
    word = int(words[0])
    # 0.6 of a step above the word is cut off, not rounded to the next.
    kept, cut, replaced = (
        _noise(codes, betas=(0.0, threshold / 2**32))[0, 0, 1] for threshold in (word, word + 0.6, word + 1)
    )
    assert int(kept) == int(cut) == V
    assert int(replaced) == int(words[1]) * V // 2**32


def test_windows_without_noise_are_memory_of_their_own() -> None:
    codes = torch.arange(4)[None]
    windows = _noise(codes, betas=(0.0, 0.0, 0.0))
    windows[0, 0, 1] = 99  # the same code as of window 1 at offset 0
    assert windows[0].tolist() == [[0, 99, 2], [1, 2, 3], [2, 3, 0], [3, 0, 0]]
    assert codes.tolist() == [[0, 1, 2, 3]]


def test_offset_0_is_always_the_true_code() -> None:
    codes = torch.randint(0, V, (8, 16))
    for coupling in ("independent", "shared"):
        assert torch.equal(_noise(codes, betas=(0.0, 1.0, 1.0, 1.0), coupling=coupling)[:, :, 0], codes)


def test_shared_draws_make_the_copies_of_a_code_agree() -> None:
    codes = torch.full((20, 16), V)
    windows = _noise(codes, coupling="shared")
    for position in range(3, 16):
        near, middle, far = (windows[:, position - j, j] for j in (1, 2, 3))
        assert torch.equal(near[near != V], far[near != V])  # replaced near is replaced far, by the same code
        assert torch.equal(middle[near != V], near[near != V])
    independent = _noise(codes)
    assert not torch.equal(independent[:, 1:14, 2], independent[:, 0:13, 3])


@pytest.mark.parametrize("coupling", ["independent", "shared"])
def test_noise_does_not_depend_on_the_batch_but_on_seed_step_and_sample(coupling: Any) -> None:
    codes = torch.randint(0, V, (6, 16))
    counters = torch.tensor([5, 17, 900, 3, 2**33, 1])
    whole = _noise(codes, coupling=coupling, sample_counters_B=counters)
    picked = torch.tensor([4, 0, 2])
    assert torch.equal(_noise(codes[picked], coupling=coupling, sample_counters_B=counters[picked]), whole[picked])
    halves = [  # two ranks
        _noise(codes[rank::2], coupling=coupling, sample_counters_B=counters[rank::2]) for rank in range(2)
    ]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)
    for change in ({"seed": 4}, {"step": 8}, {"sample_counters_B": counters + 1}):
        assert not torch.equal(_noise(codes, coupling=coupling, **({"sample_counters_B": counters} | change)), whole)


def test_noise_of_an_offset_does_not_depend_on_the_window_size() -> None:
    codes = torch.randint(0, V, (3, 16))
    assert torch.equal(_noise(codes)[:, :, :2], _noise(codes, betas=(0.0, 0.5)))


def test_a_schedule_that_touches_the_kept_code_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta of offset 0 must be 0, got 0\.5"):
        _noise(torch.zeros(1, 4, dtype=torch.int64), betas=(0.5, 1.0))


class _Certain(nn.Module):
    """Predicts code (10 * position + offset) % V with certainty."""

    def forward(self, windows: Tensor, labels: Tensor, *, readout: Readout) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        batch, positions, window_size = windows.shape
        codes = (10 * torch.arange(positions)[:, None] + torch.arange(window_size)) % V
        logits = nn.functional.one_hot(codes, V).float().mul(1000.0).expand(batch, -1, -1, -1)
        drafts: Tensor = readout(logits, torch.eye(V))
        return drafts


def test_own_drafts_of_a_window_are_those_made_at_its_first_position() -> None:
    codes = torch.randint(0, V, (2, 9))
    model = _Certain().train()
    windows = draft_windows(
        model,
        make_windows(codes, window_size=3)[0],
        torch.tensor([0, 1]),
        seed=0,
        step=0,
        sample_counters_B=torch.arange(2),
    )
    assert model.training
    for position in range(9):  # step `position` predicts codes position .. position + 2; window `position` holds them
        expected = [(10 * position + 1) % V, (10 * position + 2) % V]
        assert windows[:, position, 1:].tolist() == [expected, expected]
    assert torch.equal(windows[:, :, 0], codes)


def test_own_drafts_follow_the_models_distribution_and_temperature() -> None:
    class Skewed(nn.Module):
        def forward(self, windows: Tensor, labels: Tensor, *, readout: Readout) -> Tensor:
            logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(*windows.shape, 4)
            drafts: Tensor = readout(logits, torch.eye(4))
            return drafts

    windows = torch.zeros(500, 16, 2, dtype=torch.int64)
    for temperature, shares in ((1.0, (0.5, 0.25, 0.125, 0.125)), (0.5, (8 / 11, 2 / 11, 0.5 / 11, 0.5 / 11))):
        drafts = draft_windows(
            Skewed(),
            windows,
            torch.zeros(500),
            temperature=temperature,
            seed=0,
            step=0,
            sample_counters_B=torch.arange(500),
        )[:, :, 1]
        measured = torch.bincount(drafts.flatten(), minlength=4) / drafts.numel()
        assert measured.tolist() == pytest.approx(shares, abs=5 * 0.5 / 8000**0.5)


class _Logits(nn.Module):
    """Predicts the same whatever it reads; `logits` broadcast to (B, T, K, V)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, windows: Tensor, labels: Tensor, *, readout: Readout) -> Tensor:
        num_codes = self.logits.shape[-1]
        logits = self.logits.expand(*windows.shape, num_codes)
        drafts: Tensor = readout(logits, torch.eye(num_codes, dtype=logits.dtype))
        return drafts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_own_draft_is_where_its_uniform_meets_the_running_probability(dtype: torch.dtype) -> None:
    seed, step, counters = 2**40 + 9, 77, (3, 2**33 + 1)
    drafts = draft_windows(
        _Logits(torch.zeros(1000, dtype=dtype)),  # code c lies between c / 1000 and (c + 1) / 1000
        torch.zeros(2, 4, 3, dtype=torch.int64),
        torch.zeros(2),
        seed=seed,
        step=step,
        sample_counters_B=torch.tensor(counters),
    )
    for sample, counter in enumerate(counters):
        for position in range(4):
            for offset in (1, 2):
                words = philox(
                    (counter & 0xFFFFFFFF, counter >> 32, step, position << 16 | offset),
                    (seed & 0xFFFFFFFF, 3 | seed >> 32 << 8),
                )
                assert int(drafts[sample, position, offset]) == int(((words[0] >> 9) + 0.5) / 2**23 * 1000)


def test_own_drafts_come_from_the_windows_and_labels_of_their_sample() -> None:
    class Reads(nn.Module):
        def forward(self, windows: Tensor, labels: Tensor, *, readout: Readout) -> Tensor:
            codes = (windows + 10 * labels[:, None, None]) % V
            drafts: Tensor = readout(nn.functional.one_hot(codes, V).float().mul(1000.0), torch.eye(V))
            return drafts

    windows = torch.tensor([[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 0, 1]]])
    drafts = draft_windows(Reads(), windows, torch.tensor([0, 3]), seed=0, step=1, sample_counters_B=torch.arange(2))
    assert drafts.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 37, 38], [9, 30, 31]]]


def test_the_largest_uniform_draws_no_code_of_probability_0() -> None:
    counter = 2_141_342  # its word at step 1, window 0 and offset 1 is all ones above bit 9
    assert philox((counter, 0, 1, 1), (0, 3))[0] >> 9 == 2**23 - 1
    logits = torch.randn(2000, 1, 1, 9, generator=torch.Generator().manual_seed(0))
    logits[..., 8] = -1e9
    sums = torch.softmax(logits, -1).double().sum(-1)
    assert float(sums.min()) < 1 - 2**-24  # rounded, probabilities may sum to less than the largest uniform
    drafts = draft_windows(
        _Logits(logits.expand(-1, -1, 2, -1)),
        torch.zeros(2000, 1, 2, dtype=torch.int64),
        torch.zeros(2000),
        seed=0,
        step=1,
        sample_counters_B=torch.full((2000,), counter),
    )
    assert drafts[:, 0, 1].unique().tolist() == [7]


def test_own_drafts_of_a_model_that_is_not_finite_are_codes_all_the_same() -> None:
    drafts = draft_windows(
        _Logits(torch.full((5,), float("nan"))),
        torch.zeros(2, 3, 2, dtype=torch.int64),
        torch.zeros(2),
        seed=0,
        step=1,
        sample_counters_B=torch.arange(2),
    )
    assert int(drafts.min()) >= 0
    assert int(drafts.max()) < 5  # the step's loss says what is wrong; an index out of range would end the run


def test_own_drafts_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=1, num_heads=2, model_dim=16, codebook_size=V, codes_per_side=3, num_classes=5, window_size=3
    )
    model = build_model(config).double()
    torch.nn.init.normal_(model.base.output.weight)
    windows, labels, counters = torch.randint(0, V, (4, 9, 3)), torch.tensor([0, 1, 2, 5]), torch.tensor([3, 9, 1, 0])
    whole = draft_windows(model, windows, labels, seed=1, step=2, sample_counters_B=counters)
    alone = draft_windows(model, windows[2:3], labels[2:3], seed=1, step=2, sample_counters_B=counters[2:3])
    assert torch.equal(alone[0], whole[2])
    assert not torch.equal(draft_windows(model, windows, labels, seed=1, step=3, sample_counters_B=counters), whole)


def test_labels_are_dropped_at_their_share_and_missing_ones_always() -> None:
    labels = torch.full((20_000,), 3)
    labels[::2] = -1
    counters = torch.arange(20_000)
    dropped = drop_labels(labels, fraction=0.1, null_label=10, seed=0, step=5, sample_counters_B=counters)
    assert torch.equal(dropped[::2], torch.full((10_000,), 10))
    kept = dropped[1::2]
    assert set(kept.tolist()) == {3, 10}
    assert (kept == 10).double().mean().item() == pytest.approx(0.1, abs=5 * 0.3 / 100)
    alone = drop_labels(labels[7:9], fraction=0.1, null_label=10, seed=0, step=5, sample_counters_B=counters[7:9])
    assert torch.equal(alone, dropped[7:9])


def test_a_label_is_dropped_up_to_the_very_threshold_of_its_word() -> None:
    word = philox((5, 2, 7, 0), (3, 4 | 1 << 8))[0]  # sample 2 * 2**32 + 5, step 7, seed 2**32 + 3
    for threshold, expected in ((word, 1), (word + 0.6, 1), (word + 1, 10)):
        dropped = drop_labels(
            torch.tensor([1]),
            fraction=threshold / 2**32,
            null_label=10,
            seed=2**32 + 3,
            step=7,
            sample_counters_B=torch.tensor([2 * 2**32 + 5]),
        )
        assert dropped.tolist() == [expected]


def test_no_label_is_dropped_at_fraction_0_and_every_one_at_1() -> None:
    labels, counters = torch.arange(50), torch.arange(50)
    for fraction, expected in ((0.0, labels), (1.0, torch.full((50,), 99))):
        got = drop_labels(labels, fraction=fraction, null_label=99, seed=0, step=0, sample_counters_B=counters)
        assert torch.equal(got, expected)


def test_other_labels_are_dropped_at_another_step_and_under_another_seed() -> None:
    labels, counters = torch.arange(1000), torch.arange(1000)

    def dropped(*, seed: int, step: int) -> torch.Tensor:
        kept = drop_labels(labels, fraction=0.5, null_label=-9, seed=seed, step=step, sample_counters_B=counters)
        return kept == -9

    first = dropped(seed=0, step=5)
    assert torch.equal(first, dropped(seed=0, step=5))
    for other in (dropped(seed=0, step=6), dropped(seed=1, step=5)):
        assert 400 < (first != other).sum().item() < 600
