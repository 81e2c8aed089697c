"""Self-speculation: the plain sampler's codes and drafts, bit for bit, in fewer backbone calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from training.config import ModelConfig, SamplerConfig
from training.sampling import SampledCodes, sample_codes
from training.tensorar import TensorAR, build_model

V, T, CLASSES = 20, 16, 5
LABELS = torch.tensor([0, 3, 4, 1, 5, 2])
POLICIES = ["sampled", "coupled", "argmax"]
GUIDANCES = [(1.0, -1), (1.5, -1), (1.5, 6)]


def _model(window_size: int, *, dtype: torch.dtype = torch.float64, std: float = 0.35) -> TensorAR:
    """A model whose codes hang on what was read before, but not so much that no draft stands."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=2,
        num_heads=2,
        model_dim=16,
        codebook_size=V,
        codes_per_side=4,
        num_classes=CLASSES,
        window_size=window_size,
    )
    model = build_model(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def _sample(model: TensorAR, labels: Tensor = LABELS, *, batch_size: int | None = None, **changes: Any) -> SampledCodes:
    counters = torch.arange(len(labels)) + 7
    config = SamplerConfig(**changes)
    return sample_codes(model, labels, config=config, seed=3, sample_counters_N=counters, batch_size=batch_size)


def _assert_same(found: SampledCodes, expected: SampledCodes) -> None:
    assert torch.equal(found.codes_NT, expected.codes_NT)
    assert torch.equal(found.drafts_NTK, expected.drafts_NTK)
    assert found.flip_rate == expected.flip_rate


@pytest.mark.parametrize("window_size", [1, 2, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("guidance", "interval"), GUIDANCES)
def test_codes_and_drafts_are_the_plain_samplers(window_size: int, policy: Any, guidance: float, interval: int) -> None:
    model = _model(window_size)
    config = {"draft_policy": policy, "guidance": guidance, "guidance_interval": interval}
    plain = _sample(model, **config)
    for windows_per_call in (2, 5, 99):
        found = _sample(model, windows_per_call=windows_per_call, **config)
        _assert_same(found, plain)
        assert found.num_backbone_calls <= T


@pytest.mark.parametrize("window_size", [1, 2, 4])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 5, "temperature": 0.7},
        {"top_p": 0.8, "draft_top_p": 0.5, "draft_temperature": 0.4},
        {"top_k": 9, "draft_top_k": 2, "draft_top_p": 1.0},
        {"temperature": 0.0},
    ],
)
def test_codes_and_drafts_are_the_plain_samplers_with_filters(window_size: int, filters: dict[str, Any]) -> None:
    model = _model(window_size)
    for policy in POLICIES:
        config = {"draft_policy": policy, "guidance": 1.5, "guidance_interval": 4, **filters}
        _assert_same(_sample(model, windows_per_call=4, **config), _sample(model, **config))


@pytest.mark.parametrize("window_size", [1, 2, 4])
def test_codes_and_drafts_are_the_plain_samplers_in_float32(window_size: int) -> None:
    model = _model(window_size, dtype=torch.float32)
    config = {"draft_policy": "coupled", "guidance": 1.5}
    _assert_same(_sample(model, windows_per_call=4, **config), _sample(model, **config))


@pytest.mark.parametrize("interval", [-1, 5])
def test_a_speculated_sample_does_not_depend_on_its_batch(interval: int) -> None:
    model = _model(4)
    config = {"draft_policy": "coupled", "windows_per_call": 4, "guidance": 1.5, "guidance_interval": interval}
    whole, split = _sample(model, **config), _sample(model, batch_size=2, **config)
    _assert_same(split, whole)
    assert torch.equal(split.calls_per_sample_N, whole.calls_per_sample_N)
    assert len(set(whole.calls_per_sample_N.tolist())) > 1  # samples went at paces of their own


def test_calls_are_counted_by_sample_and_by_batch() -> None:
    model = _model(4)
    whole = _sample(model, windows_per_call=4, draft_policy="coupled")
    assert whole.num_backbone_calls == int(whole.calls_per_sample_N.max())
    split = _sample(model, windows_per_call=4, draft_policy="coupled", batch_size=3)
    assert split.num_backbone_calls == sum(int(part.max()) for part in split.calls_per_sample_N.split(3))
    assert _sample(model).calls_per_sample_N.tolist() == [T] * 6


def test_a_model_that_hangs_on_nothing_settles_all_windows_of_a_call() -> None:
    model = _model(4)
    with torch.no_grad():
        for block in model.base.layers:
            block.attention.wo.weight.zero_()  # type: ignore[union-attr, operator]
            block.feed_forward.w2.weight.zero_()  # type: ignore[union-attr, operator]
        model.base.tok_embeddings.weight.zero_()
        assert model.input_encoder is not None
        assert model.output_decoder is not None
        model.input_encoder.attention.wo.weight.zero_()
        for module in (model.input_encoder, model.output_decoder):
            module.feed_forward.w2.weight.zero_()
        model.output_decoder.attention.wo.weight.zero_()
        model.base.cls_embedding.embedding_table.weight.zero_()
    found = _sample(model, windows_per_call=5, draft_policy="coupled", guidance=1.0)
    assert found.calls_per_sample_N.tolist() == [4] * 6  # the label's alone, then 5 windows a call: 1 + 5 + 5 + 5
    _assert_same(found, _sample(model, draft_policy="coupled", guidance=1.0))


def test_two_windows_a_call_already_take_fewer_calls() -> None:
    labels = torch.arange(40) % CLASSES
    calls = _sample(_model(4, std=0.2), labels, windows_per_call=2, draft_policy="coupled").calls_per_sample_N
    assert int(calls.min()) >= 1 + 8  # the first has the label alone to go by, 15 windows are left
    assert int(calls.max()) < T


def test_coupled_draws_settle_more_windows_than_fresh_ones() -> None:
    model, labels = _model(4, std=0.2), torch.arange(40) % CLASSES
    calls = {
        policy: _sample(model, labels, windows_per_call=4, draft_policy=policy, guidance=1.0).calls_per_sample_N
        for policy in ("coupled", "sampled")
    }
    assert calls["coupled"].double().mean() < calls["sampled"].double().mean()
    assert int(calls["coupled"].max()) < T
