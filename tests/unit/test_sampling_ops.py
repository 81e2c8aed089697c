"""The native ops of a sampling step: codes drawn in one pass over logits, and states projected to logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training import ops
from training.config import ModelConfig, SamplerConfig
from training.drawing import Draws, draw_cells, predicted_cells, reference_sampling_uniforms
from training.frozen import FrozenModel
from training.gpt import evaluation_mode
from training.tensorar import build_model

SEED = 2**55 + 2**33 + 12345
SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000, 16384)


def _scores(logits_RV: Tensor, rows_N: Tensor, counters: dict[str, Tensor]) -> Any:
    """Logits + Gumbels (N, V) in float64, the logarithms numpy's."""
    named = {f"{name}_R": counters[f"{name}_N"] for name in ("samples", "positions", "streams")}
    uniforms = reference_sampling_uniforms(**named, codebook_size=logits_RV.shape[1], seed=SEED)
    return logits_RV[rows_N].double().numpy() - np.log(-np.log(uniforms.double().numpy()))


def _counters(count: int) -> dict[str, Tensor]:
    numbers_N = torch.arange(count)
    return {"samples_N": 2**61 + numbers_N, "positions_N": numbers_N % 5, "streams_N": numbers_N % 3}


def check_drawn_codes() -> None:
    """Certain codes are those of the largest score in float64; few are not certain."""
    generator, num_open, num_draws = torch.Generator().manual_seed(0), 0, 0
    for codebook_size in SIZES:
        logits_RV = torch.randn(4, codebook_size, generator=generator) * torch.tensor([0.0, 1.0, 9.0, 1e4])[:, None]
        logits_RV[1, codebook_size // 2 + 1 :: 3] = -math.inf
        rows_N = torch.arange(40) % 4
        codes_N, is_certain_N = ops.drawn_codes(logits_RV, rows_N=rows_N, **_counters(40), seed=SEED)
        expected_N = torch.from_numpy(_scores(logits_RV, rows_N, _counters(40)).argmax(-1))
        assert torch.equal(codes_N[is_certain_N], expected_N[is_certain_N]), codebook_size
        num_open, num_draws = num_open + int((~is_certain_N).sum()), num_draws + 40
    assert num_open <= num_draws // 100, num_open


def check_projected_states() -> None:
    """Products are numpy's in float64 up to rounding, and the same bits for each state alone."""
    generator = torch.Generator().manual_seed(0)
    for num_states, dim, num_weights in ((1, 1, 1), (8, 5, 47), (16, 17, 48), (17, 32, 49), (33, 7, 100), (70, 33, 12)):
        states, weight = torch.randn(num_states, dim, generator=generator), torch.randn(num_weights, dim)
        made = ops.project_states(states, weight)
        exact = states.double().numpy() @ weight.double().numpy().T
        assert np.abs(made.double().numpy() - exact).max() < 1e-5
        alone = torch.cat([ops.project_states(state, weight) for state in states.split(1)])
        assert torch.equal(made, alone), (num_states, dim, num_weights)


def _draw(logits_BRV: Tensor, config: SamplerConfig, *, name: Any) -> Tensor:
    counters_B = torch.arange(len(logits_BRV)) + 2**40
    cells = predicted_cells(config, window_size=logits_BRV.shape[1])
    return draw_cells(logits_BRV, cells, Draws(SEED, counters_B, torch.full_like(counters_B, 3), name))


@pytest.mark.parametrize("name", ["positions", "streams"])
def test_counters_beyond_their_words_are_refused(name: str) -> None:
    """They would take the draws of another position or stream."""
    end = {"positions": 2**16, "streams": 2**32}[name]
    for number in (-1, end):
        counters = _counters(2) | {f"{name}_N": torch.tensor([0, number])}
        told = rf"positions must be in \[0, 2\*\*16\) and streams in \[0, 2\*\*32\), got .*{number}"
        with pytest.raises(RuntimeError, match=told):
            ops.drawn_codes(torch.zeros(1, 8), rows_N=torch.zeros(2, dtype=torch.int64), **counters, seed=SEED)
        rows = {key.replace("_N", "_R"): value for key, value in counters.items()}
        with pytest.raises(RuntimeError, match=told):
            ops.sampling_uniforms(**rows, codebook_size=8, seed=SEED)
    counters = _counters(1) | {f"{name}_N": torch.tensor([end - 1])}
    ops.drawn_codes(torch.zeros(1, 8), rows_N=torch.zeros(1, dtype=torch.int64), **counters, seed=SEED)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draft_policy": "sampled", "temperature": 0.7},
        {"draft_policy": "coupled", "top_k": 20, "draft_top_k": 3},
        {"draft_policy": "argmax", "top_p": 0.5},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_codes_are_the_references(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.randn(20, 3, 300, generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    drawn = [_draw(logits, SamplerConfig(**options), name=name) for name in ("native", "reference")]
    assert torch.equal(*drawn)


def test_scores_within_rounding_of_each_other_are_not_certain_and_drawn_as_the_reference_draws() -> None:
    rows_N = torch.arange(50)
    counters = {"samples_N": 2**40 + rows_N, "positions_N": rows_N * 0 + 3, "streams_N": rows_N * 0}
    gumbels = torch.from_numpy(_scores(torch.zeros(50, 100), rows_N, counters))
    logits_RV = torch.full((50, 100), -math.inf)
    logits_RV[:, 20:90:7] = -gumbels.float()[:, 20:90:7]
    assert not ops.drawn_codes(logits_RV, rows_N=rows_N, **counters, seed=SEED)[1].any()
    drawn = [_draw(logits_RV[:, None], SamplerConfig(), name=name) for name in ("native", "reference")]
    assert torch.equal(*drawn)
    assert drawn[0].unique().numel() > 1
    logits_RV[:, 41] += 1e-3
    codes_N, is_certain_N = ops.drawn_codes(logits_RV, rows_N=rows_N, **counters, seed=SEED)
    assert bool(is_certain_N.all())
    assert codes_N.tolist() == [41] * 50


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_drawn_as_the_reference_draws(worst: float) -> None:
    logits = torch.randn(6, 1, 50, generator=torch.Generator().manual_seed(1))
    logits[:3, 0, 7::11] = worst
    logits[3:] = worst
    drawn = [_draw(logits, SamplerConfig(), name=name) for name in ("native", "reference")]
    assert torch.equal(*drawn)


def test_a_frozen_model_with_native_ops_predicts_what_the_model_does() -> None:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(num_layers=1, num_heads=2, model_dim=8, codebook_size=50, codes_per_side=3, window_size=3)
    )
    torch.nn.init.normal_(model.base.output.weight)
    h_BLD = torch.randn(2, 2, 8)
    with evaluation_mode(model):
        expected_BLKV = model.predict(h_BLD)
        model.use_native_ops()
        made_BLKV = FrozenModel(model, num_windows=1).predict(h_BLD)
    assert made_BLKV.shape == (2, 2, 3, 50)
    torch.testing.assert_close(made_BLKV, expected_BLKV, rtol=1e-5, atol=1e-5)
    assert not expected_BLKV.allclose(torch.zeros(()))


def test_the_ops_are_what_they_declare() -> None:
    ops.load_ops()
    numbers = torch.arange(3)
    torch.library.opcheck(torch.ops.tensorar.drawn_codes.default, (torch.randn(3, 40), *[numbers] * 4, 7))
    torch.library.opcheck(torch.ops.tensorar.project_states.default, (torch.randn(3, 5), torch.randn(7, 5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_RV": torch.zeros(3, 4).double()}, r"logits must be contiguous float32 of shape \(R, V\) on the CPU"),
        ({"logits_RV": torch.zeros(3, 2**18 + 1)}, r"V must be in \[1, 262144\], got 262145"),
        ({"rows_N": torch.tensor([0, 3])}, r"rows must be in \[0, R = 3\), got 3"),
        ({"rows_N": torch.tensor([-1, 0])}, r"rows must be in \[0, R = 3\), got -1"),
        ({"samples_N": torch.arange(3)}, r"samples must be contiguous int64 of shape \(N,\) = \(2,\)"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*56\), got -1"),
    ],
)
def test_a_wrong_argument_of_a_draw_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"logits_RV": torch.zeros(3, 4), "rows_N": torch.arange(2), **_counters(2), "seed": 0}
    with pytest.raises(RuntimeError, match=message):
        ops.drawn_codes(**(arguments | change))


@pytest.mark.parametrize(
    ("states", "weight", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), "weight must have D = 3 columns as the states, got 5"),
        (torch.zeros(2, 3).double(), torch.zeros(4, 3), "states must be a contiguous float32 matrix on the CPU"),
        (torch.zeros(2, 3), torch.zeros(3, 4).T, "weight must be a contiguous float32 matrix on the CPU"),
    ],
)
def test_a_wrong_argument_of_a_projection_is_refused(states: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.project_states(states, weight)
