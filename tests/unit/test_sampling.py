"""Sampling: cached equals uncached, draws belong to the sample and not to its batch, filters keep what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drawn import draw_codes
from torch import Tensor
from torch.nn import functional as F

from training.config import ModelConfig, SamplerConfig
from training.drawing import filter_logits, gumbel_draws
from training.guidance import is_guided
from training.noise import make_windows
from training.sampling import SampledCodes, sample_codes
from training.tensorar import TensorAR, build_model

V, T, CLASSES = 20, 9, 5
LABELS = torch.tensor([0, 3, 4, 1, 5])


def _model(window_size: int) -> TensorAR:
    """A model with large random weights, in float64 so that batch shapes do not matter."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=2,
        num_heads=2,
        model_dim=16,
        codebook_size=V,
        codes_per_side=3,
        num_classes=CLASSES,
        window_size=window_size,
    )
    model = build_model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def _sample(model: TensorAR, labels: Tensor = LABELS, *, seed: int = 1, **changes: Any) -> SampledCodes:
    calls = {name: changes.pop(name) for name in ("sample_counters_N", "batch_size") if name in changes}
    return sample_codes(model, labels, config=SamplerConfig(**changes), seed=seed, **calls)


def _windows_fed(sampled: SampledCodes) -> Tensor:
    """The windows (N, T, K) that sampling fed: window t holds code t and the drafts that step t made after it."""
    window_size = sampled.drafts_NTK.shape[2]
    windows = torch.zeros_like(sampled.drafts_NTK)
    for step in range(T):
        for offset in range(min(window_size, T - step)):
            windows[:, step, offset] = sampled.drafts_NTK[:, step + offset, window_size - 1 - offset]
    return windows


@pytest.mark.parametrize("window_size", [1, 2, 4])
@pytest.mark.parametrize("policy", ["sampled", "coupled", "argmax"])
@pytest.mark.parametrize(("guidance", "interval"), [(1.0, -1), (2.5, -1), (2.5, 3)])
def test_every_cached_choice_is_that_of_one_uncached_pass(
    window_size: int, policy: Any, guidance: float, interval: int
) -> None:
    model = _model(window_size).eval()
    config = SamplerConfig(guidance=guidance, guidance_interval=interval, draft_policy=policy, top_k=15, top_p=0.95)
    sampled = sample_codes(model, LABELS, config=config, seed=1)
    windows = _windows_fed(sampled)
    logits = model(windows, LABELS)
    null = model(windows, torch.full_like(LABELS, CLASSES))
    for step in range(T):
        guided = guidance != 1.0 and is_guided(step, interval=interval)
        mixed = null[:, step] + (logits[:, step] - null[:, step]) * (guidance if guided else 1.0)
        inside = min(window_size, T - step)
        chosen = draw_codes(
            mixed[:, :inside], config=config, seed=1, sample_counters_B=torch.arange(5), first_position=step
        )
        assert torch.equal(chosen, windows[:, step, :inside])
    assert torch.equal(sampled.codes_NT, windows[:, :, 0])


@pytest.mark.parametrize("policy", ["sampled", "coupled"])
def test_a_sample_does_not_depend_on_its_batch(policy: Any) -> None:
    model = _model(3)
    counters = torch.tensor([7, 0, 2**35, 3, 11])
    whole = _sample(model, draft_policy=policy, sample_counters_N=counters)
    split = _sample(model, draft_policy=policy, sample_counters_N=counters, batch_size=2)
    assert torch.equal(whole.drafts_NTK, split.drafts_NTK)
    for index in (0, 2, 4):
        one = slice(index, index + 1)
        alone = _sample(model, LABELS[one], draft_policy=policy, sample_counters_N=counters[one])
        assert torch.equal(alone.drafts_NTK[0], whole.drafts_NTK[index])


def test_seed_and_counter_change_the_sample_and_dropout_does_not() -> None:
    model = _model(2)
    first = _sample(model).codes_NT
    assert torch.equal(_sample(model.train()).codes_NT, first)
    assert model.training
    assert not torch.equal(_sample(model, seed=2).codes_NT, first)
    assert not torch.equal(_sample(model, sample_counters_N=torch.arange(5) + 5).codes_NT, first)
    same = torch.tensor([3, 3])
    codes = _sample(model, same).codes_NT
    assert not torch.equal(codes[0], codes[1])


@pytest.mark.parametrize("window_size", [2, 4])
@pytest.mark.parametrize("policy", ["sampled", "coupled", "argmax"])
def test_a_fresh_tensorar_samples_its_base_models_codes(window_size: int, policy: Any) -> None:
    base = _model(1)
    fresh = build_model(base.config.model_copy(update={"window_size": window_size})).double()
    fresh.base.load_state_dict(base.base.state_dict())
    assert torch.equal(_sample(fresh, draft_policy=policy).codes_NT, _sample(base).codes_NT)


def test_drafts_end_in_the_final_codes_and_flips_are_counted_from_the_first() -> None:
    sampled = _sample(_model(3), draft_policy="coupled")
    assert sampled.drafts_NTK.shape == (5, T, 3)
    assert torch.equal(sampled.drafts_NTK[:, :, 2], sampled.codes_NT)
    assert torch.equal(sampled.drafts_NTK[:, 0, 0], sampled.codes_NT[:, 0])  # position 0 has no draft
    assert torch.equal(sampled.drafts_NTK[:, 1, 0], sampled.drafts_NTK[:, 1, 1])  # position 1 has one
    flips = [
        int(sampled.drafts_NTK[image, position, 0] != sampled.codes_NT[image, position])
        for image in range(5)
        for position in range(1, T)
    ]
    assert sampled.flip_rate == pytest.approx(sum(flips) / len(flips))
    assert 0 < sum(flips) < len(flips)


def test_coupled_draws_flip_less_than_fresh_ones() -> None:
    model, labels = _model(3), torch.arange(40) % CLASSES
    fresh, coupled = (_sample(model, labels, draft_policy=policy, guidance=1.0) for policy in ("sampled", "coupled"))
    assert coupled.flip_rate is not None
    assert fresh.flip_rate is not None
    assert coupled.flip_rate < fresh.flip_rate - 0.1


def test_window_size_1_refines_nothing() -> None:
    sampled = _sample(_model(1))
    assert sampled.flip_rate is None
    assert sampled.drafts_NTK.shape == (5, T, 1)
    assert sampled.num_backbone_calls == T


def test_progress_counts_finished_samples() -> None:
    seen: list[int] = []
    sample_codes(_model(1), LABELS, config=SamplerConfig(), seed=0, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]


def test_interval_counts_from_the_second_code() -> None:
    assert [is_guided(step, interval=1) for step in range(5)] == [True, True, True, False, False]
    assert all(is_guided(step, interval=-1) for step in range(100))


@pytest.mark.parametrize("label", [-1, CLASSES + 1])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\]"):
        _sample(_model(1), torch.tensor([0, label]))


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one, got \\[\\]; use labels of the model's classes"):
        _sample(_model(1), torch.empty(0, dtype=torch.int64))


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    assert filter_logits(logits, top_k=2, top_p=1.0).tolist() == [3.0, -math.inf, 2.0, 2.0, -math.inf]
    assert filter_logits(logits, top_k=99, top_p=1.0).tolist() == logits.tolist()


def test_top_p_keeps_the_first_code_above_the_threshold() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, kept in ((0.3, [1]), (0.5, [1]), (0.55, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        filtered = filter_logits(logits, top_k=0, top_p=top_p if top_p != 0.5 else 0.49)
        assert [index for index in range(4) if filtered[index] > -math.inf] == kept


def test_draws_follow_the_distribution_at_their_temperature() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(20_000, 2, 4)
    config = SamplerConfig(temperature=1.0, draft_temperature=0.5)
    codes = draw_codes(logits, config=config, seed=0, sample_counters_B=torch.arange(20_000), first_position=3)
    for offset, shares in ((0, (0.5, 0.25, 0.125, 0.125)), (1, (8 / 11, 2 / 11, 0.5 / 11, 0.5 / 11))):
        measured = torch.bincount(codes[:, offset], minlength=4) / 20_000
        assert measured.tolist() == pytest.approx(shares, abs=5 * 0.5 / 20_000**0.5)


def test_argmax_drafts_are_greedy_and_finals_are_not() -> None:
    logits = torch.tensor([0.3, 0.4, 0.3]).log().expand(200, 3, 3)
    config = SamplerConfig(draft_policy="argmax")
    codes = draw_codes(logits, config=config, seed=0, sample_counters_B=torch.arange(200), first_position=0)
    assert set(codes[:, 1:].flatten().tolist()) == {1}
    assert set(codes[:, 0].tolist()) == {0, 1, 2}


def test_coupled_draws_of_a_code_are_kept_across_refinements() -> None:
    def draws(position: int, stream: int) -> Tensor:
        return gumbel_draws(
            seed=0,
            sample_counters_B=torch.tensor([1]),
            positions_J=torch.tensor([position]),
            streams_J=torch.tensor([stream]),
            codebook_size=7,
        )

    logits = torch.zeros(1, 3, 7)
    coupled, fresh = (SamplerConfig(draft_policy=policy) for policy in ("coupled", "sampled"))
    made = [
        draw_codes(logits, config=coupled, seed=0, sample_counters_B=torch.tensor([1]), first_position=position)
        for position in (4, 5, 6)
    ]
    assert int(made[0][0, 2]) == int(made[1][0, 1]) == int(made[2][0, 0]) == int(draws(6, 0).argmax())
    drafts = draw_codes(logits, config=fresh, seed=0, sample_counters_B=torch.tensor([1]), first_position=4)
    assert drafts[0].tolist() == [int(draws(4 + offset, offset).argmax()) for offset in range(3)]


@pytest.mark.parametrize(("policy", "expected"), [("sampled", 0.75), ("coupled", 1.0)])
def test_only_fresh_drafts_leave_the_final_to_the_models_prediction(policy: Any, expected: float) -> None:
    # A model that gives the draft of a code 3 of 4, the other code 1 of 4.
    config = SamplerConfig(draft_policy=policy)
    samples = torch.arange(4000)
    drafts = draw_codes(torch.zeros(4000, 2, 2), config=config, seed=3, sample_counters_B=samples, first_position=4)[
        :, 1
    ]
    logits = F.one_hot(drafts, 2)[:, None] * math.log(3.0)
    finals = draw_codes(logits, config=config, seed=3, sample_counters_B=samples, first_position=5)[:, 0]
    assert float((finals == drafts).double().mean()) == pytest.approx(expected, abs=0.03)


def test_windows_of_the_true_codes_are_what_sampling_would_feed_were_its_drafts_true() -> None:
    codes = torch.randint(0, V, (2, T))
    windows, _ = make_windows(codes, window_size=4)
    drafts = codes[:, :, None].expand(-1, -1, 4)
    pretended = SampledCodes(
        codes_NT=codes, drafts_NTK=drafts, flip_rate=0.0, num_backbone_calls=0, calls_per_sample_N=torch.tensor([0, 0])
    )
    assert torch.equal(_windows_fed(pretended), windows)
