"""Draws and filters: what a code's draw depends on, filters of finals and drafts, cells that share their draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from called_ops import CalledOps
from drawn import draw_codes
from test_ops import philox
from torch import Tensor

from training import ops
from training.config import ModelConfig, SamplerConfig
from training.drawing import (
    Cell,
    Draws,
    Rule,
    draw_cells,
    draw_windows,
    filter_logits,
    guessed_cells,
    gumbel_draws,
    kept_cells,
    predicted_cells,
    reference_sampling_uniforms,
)

SEED = 2**55 + 2**33 + 12345
COUNTERS = torch.tensor([0, 3, 2**61 + 5])


def uniform_rows(codebook_size: int) -> dict[str, Any]:
    return {
        "samples_R": COUNTERS.repeat(3),
        "positions_R": torch.tensor([0, 1, 255, 2**15, 7, 7, 7, 8, 9]),
        "streams_R": torch.tensor([0, 0, 0, 1, 2, 3, 0, 7, 255]),
        "codebook_size": codebook_size,
        "seed": SEED,
    }


@pytest.mark.parametrize("make", [reference_sampling_uniforms, ops.sampling_uniforms])
def test_any_uniform_follows_from_its_counter_alone(make: Any) -> None:
    rows = uniform_rows(23)
    uniforms = make(**rows)
    for row in range(9):
        sample = int(rows["samples_R"][row])
        for code in range(23):
            cell = int(rows["positions_R"][row]) << 16 | code // 4
            counter = (sample & 0xFFFFFFFF, sample >> 32, int(rows["streams_R"][row]), cell)
            word = philox(counter, (SEED & 0xFFFFFFFF, 5 | (SEED >> 32) << 8))[code % 4]
            assert uniforms[row, code].item() == ((word >> 9) + 0.5) / 2**23


def test_the_op_is_what_it_declares() -> None:
    ops.load_ops()
    counters = torch.arange(3)
    torch.library.opcheck(torch.ops.tensorar.sampling_uniforms.default, (counters, counters, counters, 50, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 0}, r"codebook_size must be in \[1, 262144\], got 0"),
        ({"codebook_size": 2**18 + 1}, r"codebook_size must be in \[1, 262144\], got 262145"),
        ({"seed": 2**56}, r"seed must be in \[0, 2\*\*56\), got 72057594037927936"),
        ({"positions_R": torch.arange(3)}, r"positions must be contiguous int64 of shape \(R,\) = \(9,\)"),
        ({"streams_R": torch.zeros(9)}, "streams must be contiguous int64"),
    ],
)
def test_an_argument_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.sampling_uniforms(**(uniform_rows(8) | change))


def test_native_gumbels_are_the_references_bit_for_bit() -> None:
    made = [
        gumbel_draws(
            seed=SEED,
            sample_counters_B=COUNTERS,
            positions_J=torch.tensor([[4, 5], [0, 1], [9, 10]]),
            streams_J=torch.tensor([0, 1]),
            codebook_size=37,
            ops=name,  # type: ignore[arg-type]
        )
        for name in ("native", "reference")
    ]
    assert made[0].shape == (3, 2, 37)
    assert torch.equal(made[0], made[1])


def _kept(logits: list[float], *, top_k: int, top_p: float) -> list[bool]:
    """LlamaGen's filters in Python: the top k, then the shortest run of the most likely whose mass is above p."""
    kept = [top_k == 0 or sum(other > value for other in logits) < top_k for value in logits]
    mass = sum(math.exp(value) for value, stays in zip(logits, kept, strict=True) if stays)
    running, chosen = 0.0, [False] * len(logits)
    for index in sorted(range(len(logits)), key=lambda index: -logits[index]):
        if kept[index] and (running <= top_p or top_p == 1.0):
            chosen[index] = True
            running += math.exp(logits[index]) / mass
    return chosen


@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_filters_keep_what_a_brute_force_keeps(top_k: int, top_p: float) -> None:
    logits = torch.randn(20, 11, generator=torch.Generator().manual_seed(2)).double() * 2
    filtered = filter_logits(logits, top_k=top_k, top_p=top_p)
    for row in range(20):
        kept = _kept(logits[row].tolist(), top_k=top_k, top_p=top_p)
        assert (filtered[row] > -math.inf).tolist() == kept
        assert torch.equal(filtered[row][torch.tensor(kept)], logits[row][torch.tensor(kept)])


@pytest.mark.parametrize(
    ("config", "finals", "drafts"),
    [
        ({"top_k": 2}, {0, 1}, {0, 1}),
        ({"top_k": 2, "draft_top_k": 3}, {0, 1}, {0, 1, 2}),
        ({"top_k": 2, "draft_top_k": 0}, {0, 1}, {0, 1, 2, 3}),
        ({"top_p": 0.3}, {0}, {0}),
        ({"top_p": 0.3, "draft_top_p": 1.0}, {0}, {0, 1, 2, 3}),
        ({"draft_top_p": 0.5}, {0, 1, 2, 3}, {0, 1}),
        ({"top_k": 3, "draft_policy": "argmax", "draft_top_k": 2}, {0, 1, 2}, {0}),
    ],
)
def test_finals_and_drafts_have_filters_of_their_own(config: Any, finals: set[int], drafts: set[int]) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(400, 3, 4)
    codes = draw_codes(
        logits, config=SamplerConfig(**config), seed=0, sample_counters_B=torch.arange(400), first_position=2
    )
    assert set(codes[:, 0].tolist()) == finals
    assert set(codes[:, 1:].flatten().tolist()) == drafts


def test_a_low_temperature_is_taken_as_it_is() -> None:
    codes = draw_codes(
        torch.tensor([0.05, 0.0]).expand(4000, 1, 2),
        config=SamplerConfig(temperature=0.01),
        seed=0,
        sample_counters_B=torch.arange(4000),
        first_position=0,
    )
    share = 1 / (1 + math.exp(-5))  # five standard deviations
    assert float((codes == 0).double().mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5)


def _draw(logits: Tensor, cells: Any, first_positions: list[int], *, window_size: int) -> Tensor:
    config = ModelConfig(
        num_layers=1, num_heads=1, model_dim=4, codebook_size=9, codes_per_side=3, window_size=window_size
    )
    return draw_windows(logits, cells, Draws(SEED, COUNTERS, torch.tensor(first_positions)), config=config)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_cells_come_in_any_order_of_their_rows(temperature: float, name: Any) -> None:
    logits = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(1))
    rule = Rule(temperature, 0, 1.0)
    draws = Draws(SEED, COUNTERS, torch.tensor([1, 2, 3]), name)
    cells = [Cell(row=row, ahead=row, stream=0, rule=rule) for row in range(4)]
    in_order = draw_cells(logits, cells, draws)
    for order in ([3, 1, 0, 2], [1, 0], [2, 3, 2]):
        assert torch.equal(draw_cells(logits, [cells[index] for index in order], draws), in_order[:, order])


@pytest.mark.parametrize(
    ("name", "dtype", "called"),
    [
        ("native", torch.float32, ["drawn_codes"]),
        ("native", torch.float64, ["sampling_uniforms"]),
        ("reference", torch.float32, []),
    ],
)
def test_codes_are_drawn_by_the_ops_that_were_asked_for(name: Any, dtype: torch.dtype, called: list[str]) -> None:
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(1)).to(dtype) * 5
    cells = predicted_cells(SamplerConfig(), window_size=2)
    with CalledOps() as seen:
        draw_cells(logits, cells, Draws(SEED, COUNTERS, torch.tensor([1, 2, 3]), name))
    assert seen.names == called


@pytest.mark.parametrize("policy", ["sampled", "coupled", "argmax"])
def test_windows_drawn_together_are_those_drawn_one_by_one(policy: Any) -> None:
    logits = torch.randn(3, 4 * 3, 9, generator=torch.Generator().manual_seed(0)).double()
    config = SamplerConfig(draft_policy=policy, draft_temperature=0.7)
    together = _draw(logits, predicted_cells(config, window_size=3, num_windows=4), [0, 4, 7], window_size=3)
    assert together.shape == (3, 4, 3)
    for window in range(4):
        for sample, first in enumerate((0, 4, 7)):
            alone = draw_codes(
                logits[sample : sample + 1, 3 * window : 3 * window + 3],
                config=config,
                seed=SEED,
                sample_counters_B=COUNTERS[sample : sample + 1],
                first_position=first + window,
            )
            inside = [first + window + offset < 9 for offset in range(3)]
            expected = [code if is_inside else 0 for code, is_inside in zip(alone[0].tolist(), inside, strict=True)]
            assert together[sample, window].tolist() == expected


@pytest.mark.parametrize("policy", ["sampled", "coupled"])
def test_guesses_use_the_draws_of_their_own_calls_and_kept_drafts_those_they_were_drawn_with(policy: Any) -> None:
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0)).double()
    config = SamplerConfig(draft_policy=policy)

    def by_hand(sample: int, row: int, position: int, stream: int) -> int:
        gumbels = gumbel_draws(
            seed=SEED,
            sample_counters_B=COUNTERS[sample : sample + 1],
            positions_J=torch.tensor([position]),
            streams_J=torch.tensor([stream if policy == "sampled" else 0]),
            codebook_size=9,
        )
        return int((logits[sample, row] + gumbels[0, 0]).argmax())

    guessed = _draw(logits, guessed_cells(config, window_size=2, num_windows=2), [1, 1, 4], window_size=2)
    kept = _draw(logits, kept_cells(config, window_size=2, num_windows=2), [1, 1, 4], window_size=2)
    for sample, first in enumerate((1, 1, 4)):
        for window in range(2):
            for offset in range(2):
                ahead = window + 1 + offset
                assert guessed[sample, window, offset] == by_hand(sample, min(ahead, 1), first + ahead, offset)
                ahead = window + offset
                assert kept[sample, window, offset] == by_hand(sample, min(ahead, 1), first + ahead, ahead)
