"""Stride: s codes final in one call, against a sampler without a cache that is written out code by code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from training.config import ModelConfig, SamplerConfig
from training.drawing import filter_logits, gumbel_draws
from training.sampling import SampledCodes, refinements, sample_codes
from training.tensorar import TensorAR, build_model

V, SIDE, CLASSES, SEED = 20, 4, 5, 3
T = SIDE**2
LABELS = torch.tensor([0, 5])


def _model(window_size: int) -> TensorAR:
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=2,
        num_heads=2,
        model_dim=16,
        codebook_size=V,
        codes_per_side=SIDE,
        num_classes=CLASSES,
        window_size=window_size,
    )
    model = build_model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.35)
    return model.eval()


def _sample(model: TensorAR, **changes: Any) -> SampledCodes:
    return sample_codes(model, LABELS, config=SamplerConfig(**changes), seed=SEED)


def _draw(logits_V: Tensor, *, sample: int, position: int, stream: int, temperature: float, top_k: int) -> int:
    gumbels = gumbel_draws(
        seed=SEED,
        sample_counters_B=torch.tensor([sample]),
        positions_J=torch.tensor([position]),
        streams_J=torch.tensor([stream]),
        codebook_size=V,
    )
    return int((filter_logits(logits_V / temperature, top_k=top_k, top_p=1.0) + gumbels[0, 0]).argmax())


def _by_hand(model: TensorAR, sample: int, *, stride: int, guidance: float, interval: int, config: Any) -> Tensor:
    """Windows (T, K) of one sample, every call a full pass over all windows so far."""
    window_size = model.config.window_size
    windows = torch.zeros(1, T + window_size, window_size, dtype=torch.int64)
    for step in range(0, T, stride):
        logits = [
            model(windows[:, : step + 1], torch.tensor([label]))[0, step] for label in (int(LABELS[sample]), CLASSES)
        ]
        is_guided = guidance != 1.0 and (interval == -1 or step <= interval + 1)
        mixed = logits[1] + (logits[0] - logits[1]) * guidance if is_guided else logits[0]
        for shift in range(stride):
            for offset in range(window_size):
                position = step + shift + offset
                if position >= T:
                    continue
                row = mixed[min(shift + offset, window_size - 1)]
                if offset > 0 and config["draft_policy"] == "argmax":
                    windows[0, step + shift, offset] = int(row.argmax())
                    continue
                windows[0, step + shift, offset] = _draw(
                    row,
                    sample=sample,
                    position=position,
                    stream=shift + offset if config["draft_policy"] == "sampled" else 0,
                    temperature=config["temperature" if offset == 0 else "draft_temperature"],
                    top_k=config["top_k" if offset == 0 else "draft_top_k"],
                )
    return windows[0, :T]


@pytest.mark.parametrize(("window_size", "stride"), [(2, 2), (4, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("policy", ["sampled", "coupled", "argmax"])
@pytest.mark.parametrize(("guidance", "interval"), [(1.0, -1), (2.5, 5)])
@torch.no_grad()
def test_every_code_of_a_stride_is_the_one_that_a_full_pass_gives(
    window_size: int, stride: int, policy: Any, guidance: float, interval: int
) -> None:
    model = _model(window_size)
    config = {"draft_policy": policy, "temperature": 0.9, "draft_temperature": 0.5, "top_k": 0, "draft_top_k": 7}
    guiding = {"guidance": guidance, "guidance_interval": interval}
    sampled = _sample(model, stride=stride, **guiding, **config)
    for sample in range(len(LABELS)):
        windows = _by_hand(model, sample, stride=stride, guidance=guidance, interval=interval, config=config)
        assert sampled.codes_NT[sample].tolist() == windows[:, 0].tolist()
        assert sampled.drafts_NTK[sample].tolist() == refinements(windows[None], stride=stride)[0].tolist()


@pytest.mark.parametrize(("stride", "calls"), [(1, 16), (2, 8), (3, 6), (4, 4)])
def test_calls_are_positions_over_stride(stride: int, calls: int) -> None:
    sampled = _sample(_model(4), stride=stride)
    assert sampled.num_backbone_calls == calls
    assert sampled.calls_per_sample_N.tolist() == [calls] * 2


def test_refinements_are_predictions_in_order_and_never_guesses() -> None:
    windows = torch.arange(6)[:, None] * 10 + torch.arange(3)  # window t holds 10 t + offset
    ages = [[(value % 10) for value in line] for line in refinements(windows[None])[0].tolist()]
    assert ages == [[0, 0, 0], [1, 1, 0], [2, 1, 0], [2, 1, 0], [2, 1, 0], [2, 1, 0]]
    shifted = refinements(windows[None], stride=2)[0].tolist()
    # Codes 3 and 5 are first predicted by calls 2 and 4, 1 offset ahead; code 2 and 4 by calls 0 and 2, 2 ahead.
    assert shifted == [[0, 0, 0], [1, 1, 10], [2, 11, 20], [21, 21, 30], [22, 31, 40], [41, 41, 50]]


def test_drafts_that_became_final_unrefined_do_not_flip() -> None:
    sampled = _sample(_model(4), stride=4, draft_policy="sampled")
    assert sampled.flip_rate == 0.0
    refined = _sample(_model(4), stride=2, draft_policy="sampled")
    assert refined.flip_rate is not None
    first, final = refined.drafts_NTK[:, :, 0], refined.drafts_NTK[:, :, 3]
    assert torch.equal(first[:, 1], final[:, 1])  # predicted by the first call alone
    flips = sum(int(first[sample, position] != final[sample, position]) for sample in range(2) for position in range(T))
    assert refined.flip_rate == pytest.approx(flips / (2 * (T - 1)))
    assert flips > 0


def test_a_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stride must be in \[1, window_size of the model = 2\], got 3"):
        _sample(_model(2), stride=3)


def test_stride_and_windows_per_call_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other: one of them must be 1, got stride 2 and windows_per"):
        SamplerConfig(stride=2, windows_per_call=4)


@pytest.mark.parametrize(
    "wrong",
    [{"stride": 0}, {"windows_per_call": 0}, {"draft_top_k": -1}, {"draft_top_p": 0.0}, {"draft_top_p": math.nan}],
)
def test_dials_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplerConfig(**wrong)
