"""Logits to codes: counter-based Gumbel draws, filters, and the windows that one prediction gives.

A draw is a pure function of (seed, sample, position, stream, code): stream 0 for finals and coupled drafts, the offset
for `sampled` drafts. So a code does not depend on its batch, on the number of windows drawn together, or on when it is
drawn. A draw costs a quarter of a Philox call a code; cells that share position and stream share it.

A batch, B samples, C cells, G draws, J offsets, K window_size, R logit rows, V codebook_size.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from training.config import ModelConfig, SamplerConfig
from training.ops import drawn_codes, sampling_uniforms
from training.philox import Purpose, cell_of, draw_words, unit_interval

MIN_TEMPERATURE = 1e-5
WORDS_PER_CALL = 4
CALLS_AT_A_TIME = 2**14
"""Philox calls whose words are in cache together, on a CPU."""

Ops = Literal["native", "reference"]
"""Compiled (on a CPU), or plain torch: the same bits, more slowly."""
Distinct = TypeVar("Distinct", bound=Hashable)


@dataclass(frozen=True)
class Rule:
    """How a code is chosen from logits."""

    temperature: float
    """0 is greedy."""
    top_k: int
    top_p: float


@dataclass(frozen=True)
class Cell:
    """One code to be drawn, the same for every sample of a batch."""

    row: int
    """Which logits."""
    ahead: int
    """Position of the code, less that of the prediction."""
    stream: int
    """Stream of its draws."""
    rule: Rule


@dataclass(frozen=True)
class Draws:
    """Which draws the samples of a batch get."""

    seed: int
    """In [0, 2**56)."""
    sample_counters_B: Tensor
    """int64."""
    first_positions_B: Tensor
    """int64, position of a cell whose `ahead` is 0."""
    ops: Ops = "reference"
    """What computes them."""


def rule_of(config: SamplerConfig, *, offset: int) -> Rule:
    """How a prediction at `offset` is chosen: the final at 0, drafts after it."""
    if offset == 0:
        return Rule(config.temperature, config.top_k, config.top_p)
    if config.draft_policy == "argmax":
        return Rule(0.0, 0, 1.0)
    return Rule(
        config.temperature if config.draft_temperature is None else config.draft_temperature,
        config.top_k if config.draft_top_k is None else config.draft_top_k,
        config.top_p if config.draft_top_p is None else config.draft_top_p,
    )


def predicted_cells(config: SamplerConfig, *, window_size: int, num_windows: int = 1) -> list[Cell]:
    """The codes of consecutive predictions, each from logits of its own: R = num_windows * K rows."""
    return [
        Cell(
            row=window * window_size + offset,
            ahead=window + offset,
            stream=_stream_of(config, offset),
            rule=rule_of(config, offset=offset),
        )
        for window in range(num_windows)
        for offset in range(window_size)
    ]


def guessed_cells(config: SamplerConfig, *, window_size: int, num_windows: int) -> list[Cell]:
    """The `num_windows` windows after a prediction, guessed from its K rows, each code drawn as its own call will.

    A code beyond the prediction is drawn from the logits of the last offset.
    """
    return [
        Cell(
            row=min(window + offset, window_size - 1),
            ahead=window + offset,
            stream=_stream_of(config, offset),
            rule=rule_of(config, offset=offset),
        )
        for window in range(1, num_windows + 1)
        for offset in range(window_size)
    ]


def kept_cells(config: SamplerConfig, *, window_size: int, num_windows: int) -> list[Cell]:
    """A prediction, then its shifts: drafts are kept; one that becomes final is chosen by the finals' rule.

    It keeps its draws. A code beyond the prediction is drawn from the logits of the last offset.
    """
    return [
        Cell(
            row=min(window + offset, window_size - 1),
            ahead=window + offset,
            stream=_stream_of(config, window + offset),
            rule=rule_of(config, offset=offset),
        )
        for window in range(num_windows)
        for offset in range(window_size)
    ]


def _stream_of(config: SamplerConfig, offset: int) -> int:
    return offset if config.draft_policy == "sampled" else 0


def draw_windows(logits_BRV: Tensor, cells: Sequence[Cell], draws: Draws, *, config: ModelConfig) -> Tensor:
    """Windows (B, number of them, K) of cells that go through them in order; 0 beyond the image.

    Args:
        logits_BRV: guided, float32 or wider.
        cells: what is drawn.
        draws: and from which draws.
        config: of the model.
    """
    ahead_C = torch.tensor([cell.ahead for cell in cells], device=logits_BRV.device)
    outside_BC = draws.first_positions_B[:, None] + ahead_C >= config.num_positions
    inside = [index for index, is_outside in enumerate(outside_BC.all(0).tolist()) if not is_outside]
    codes_BC = torch.zeros_like(outside_BC, dtype=torch.int64)
    codes_BC[:, inside] = draw_cells(logits_BRV, [cells[index] for index in inside], draws)
    return codes_BC.masked_fill_(outside_BC, 0).view(len(codes_BC), -1, config.window_size)


def draw_cells(logits_BRV: Tensor, cells: Sequence[Cell], draws: Draws) -> Tensor:
    """Codes (B, C); arguments as in `draw_windows`."""
    distinct, cell_of_each = _distinct(cells)
    codes_BC = draws.sample_counters_B.new_empty(len(logits_BRV), len(distinct))
    for rule in dict.fromkeys(cell.rule for cell in distinct):
        chosen = [index for index, cell in enumerate(distinct) if cell.rule == rule]
        codes_BC[:, chosen] = _draw_by_rule(logits_BRV, [distinct[index] for index in chosen], rule, draws)
    return codes_BC[:, cell_of_each]


def _draw_by_rule(logits_BRV: Tensor, cells: Sequence[Cell], rule: Rule, draws: Draws) -> Tensor:
    rows, row_of_cell = _distinct([cell.row for cell in cells])
    chosen_BRV = _at(logits_BRV, rows)
    if rule.temperature == 0.0:
        return chosen_BRV.argmax(-1)[:, row_of_cell]
    if rule.temperature != 1.0:
        chosen_BRV = chosen_BRV / max(rule.temperature, MIN_TEMPERATURE)
    filtered_BRV = filter_logits(chosen_BRV, top_k=rule.top_k, top_p=rule.top_p)
    if _is_native(draws.ops, filtered_BRV) and filtered_BRV.dtype == torch.float32:
        return _draw_natively(filtered_BRV, row_of_cell, cells, draws)
    counters, draw_of_cell = _distinct([(cell.ahead, cell.stream) for cell in cells])
    ahead_G, streams_G = torch.tensor(counters, device=logits_BRV.device).unbind(-1)
    gumbels_BGV = gumbel_draws(
        seed=draws.seed,
        sample_counters_B=draws.sample_counters_B,
        positions_J=draws.first_positions_B[:, None] + ahead_G,
        streams_J=streams_G,
        codebook_size=logits_BRV.shape[-1],
        ops=draws.ops,
    )
    return (_at(filtered_BRV, row_of_cell) + _at(gumbels_BGV, draw_of_cell)).argmax(-1)


def _draw_natively(logits_BRV: Tensor, row_of_cell: list[int], cells: Sequence[Cell], draws: Draws) -> Tensor:
    """Codes (B, C) by the op that makes no tensor of Gumbels; the draws that it leaves open are taken as always."""
    shape, (num_rows, codebook_size) = (len(logits_BRV), len(cells)), logits_BRV.shape[1:]
    ahead_C, streams_C = torch.tensor([(cell.ahead, cell.stream) for cell in cells]).unbind(-1)
    rows_BC = num_rows * torch.arange(shape[0])[:, None] + torch.tensor(row_of_cell)
    rows_N, samples_N, positions_N, streams_N = (
        numbers.expand(shape).flatten()
        for numbers in (
            rows_BC,
            draws.sample_counters_B[:, None],
            draws.first_positions_B[:, None] + ahead_C,
            streams_C,
        )
    )
    logits_RV = logits_BRV.reshape(-1, codebook_size)
    codes_N, is_certain_N = drawn_codes(
        logits_RV, rows_N=rows_N, samples_N=samples_N, positions_N=positions_N, streams_N=streams_N, seed=draws.seed
    )
    if not bool(is_certain_N.all()):
        open_M = (~is_certain_N).nonzero()[:, 0]
        uniforms_MV = sampling_uniforms(
            samples_R=samples_N[open_M],
            positions_R=positions_N[open_M],
            streams_R=streams_N[open_M],
            codebook_size=codebook_size,
            seed=draws.seed,
        )
        codes_N[open_M] = (logits_RV[rows_N[open_M]] + _gumbels_of(uniforms_MV)).argmax(-1)
    return codes_N.view(shape)


def _distinct(values: Sequence[Distinct]) -> tuple[list[Distinct], list[int]]:
    """The values without repetitions, and the place of each value among them."""
    place_of = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return list(place_of), [place_of[value] for value in values]


def _at(x_BRV: Tensor, rows: list[int]) -> Tensor:
    """Those rows; no copy where it is all of them in order."""
    return x_BRV if rows == list(range(x_BRV.shape[1])) else x_BRV[:, rows]


def gumbel_draws(
    *,
    seed: int,
    sample_counters_B: Tensor,
    positions_J: Tensor,
    streams_J: Tensor,
    codebook_size: int,
    ops: Ops = "reference",
) -> Tensor:
    """Standard Gumbel variables (B, J, V) float32; argmax(log p + gumbel) is a draw from p.

    Args:
        seed: in [0, 2**56).
        sample_counters_B: int64.
        positions_J: int64, position of the code; (B, J) where it differs by sample.
        streams_J: int64, offset of the prediction, or 0 where draws are kept across refinements.
        codebook_size: V <= 2**18.
        ops: what computes them.
    """
    shape = (len(sample_counters_B), len(streams_J))
    counters = {
        "samples_R": sample_counters_B[:, None].expand(shape).flatten(),
        "positions_R": positions_J.expand(shape).flatten(),
        "streams_R": streams_J.expand(shape).flatten(),
    }
    is_native = _is_native(ops, sample_counters_B)
    make = sampling_uniforms if is_native else reference_sampling_uniforms
    uniforms_RV = make(**counters, codebook_size=codebook_size, seed=seed)
    return _gumbels_of(uniforms_RV).view(*shape, codebook_size)


def _gumbels_of(uniforms: Tensor) -> Tensor:
    """Standard Gumbel variables, in place."""
    return uniforms.log_().neg_().log_().neg_()


def _is_native(ops: Ops, x: Tensor) -> bool:
    return ops == "native" and x.device.type == "cpu"


def reference_sampling_uniforms(
    *, samples_R: Tensor, positions_R: Tensor, streams_R: Tensor, codebook_size: int, seed: int
) -> Tensor:
    """What `training.ops.sampling_uniforms` returns, in plain torch, on any device."""
    calls = torch.arange(math.ceil(codebook_size / WORDS_PER_CALL), device=samples_R.device)
    uniforms_RCW = torch.empty(len(samples_R), len(calls), WORDS_PER_CALL, device=samples_R.device)
    size = max(1, CALLS_AT_A_TIME // len(calls) if samples_R.device.type == "cpu" else len(samples_R))
    for start in range(0, len(samples_R), size):
        some = slice(start, start + size)
        samples_R1, positions_R1, streams_R1 = (x[some, None] for x in (samples_R, positions_R, streams_R))
        cells = cell_of(positions_R1, calls)
        words = draw_words(Purpose.SAMPLING, seed=seed, samples=samples_R1, step=streams_R1, cells=cells)
        for index, word in enumerate(words):
            uniforms_RCW[some, :, index] = unit_interval(word)
    return uniforms_RCW.flatten(1)[:, :codebook_size].contiguous()


def filter_logits(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V) with -inf where LlamaGen's filters remove a code.

    Args:
        logits: already divided by the temperature.
        top_k: codes kept, ties with the last one too; 0 is all.
        top_p: the most likely codes are kept up to the first whose running probability is above it; 1 is all.
    """
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        above = ordered.softmax(-1).cumsum(-1) > top_p
        removed = torch.zeros_like(above)
        removed[..., 1:] = above[..., :-1]
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)
    return logits
