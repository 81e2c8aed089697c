"""The key-value cache: any number of positions a call, from positions of each sample's own, as in one uncached pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.config import ModelConfig
from training.gpt import GPT, KeyValueCache

CONFIG = ModelConfig(num_layers=2, num_heads=2, model_dim=16, codebook_size=10, codes_per_side=4, num_classes=3)
T = 16


def _base(dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(0)
    base = GPT(CONFIG).to(dtype).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.4)
    return base


def _cache(batch_size: int, *, num_spare: int = 0, dtype: torch.dtype = torch.float64) -> KeyValueCache:
    device = torch.device("cpu")
    return KeyValueCache(CONFIG, batch_size=batch_size, dtype=dtype, device=device, num_spare=num_spare)


def _input(batch_size: int) -> Tensor:
    return torch.randn(batch_size, T, 16, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("lengths", [[16], [1] * 16, [4, 4, 4, 4], [1, 5, 1, 2, 7], [3, 13]])
@torch.no_grad()
def test_spans_of_any_length_give_the_uncached_states(lengths: list[int]) -> None:
    base, x, cache, start = _base(), _input(3), _cache(3), 0
    whole = base.backbone(x)
    for length in lengths:
        made = base.backbone(x[:, start : start + length], start=start, cache=cache)
        torch.testing.assert_close(made, whole[:, start : start + length], rtol=1e-9, atol=1e-12)
        start += length


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_samples_at_positions_of_their_own_read_again_what_was_wrong(dtype: torch.dtype) -> None:
    base, x = _base(dtype), _input(3).to(dtype)
    cache, whole = _cache(3, num_spare=4, dtype=dtype), base.backbone(x)
    base.backbone(x[:, :1], start=0, cache=cache)
    starts = torch.tensor([1, 1, 1])
    for steps in ([1, 2, 3], [3, 1, 2], [2, 2, 3], [3, 3, 3], [2, 3, 3], [3, 3, 1], [1, 1, 0]):
        positions = starts[:, None] + torch.arange(4)
        read = x[torch.arange(3)[:, None], positions.clamp(max=T - 1)].clone()
        right = torch.arange(4) < torch.tensor(steps)[:, None]
        read[~right] += 1.0  # behind the first `steps` positions a sample reads what is wrong
        made = base.backbone(read, start=starts, cache=cache)
        right &= positions < T
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(
            made[right], whole[torch.arange(3)[:, None], positions.clamp(max=T - 1)][right], **tolerance
        )
        starts += torch.tensor(steps)
    assert starts.tolist() == [16, 16, 16]


def test_keeping_samples_fills_the_holes_and_says_who_is_where() -> None:
    cache = _cache(6)
    cache.keys += torch.arange(6)[None, :, None, None, None]
    cache.values -= torch.arange(6)[None, :, None, None, None]
    order = cache.keep(torch.tensor([True, False, True, False, True, True]))
    assert sorted(order.tolist()) == [0, 2, 4, 5]
    assert cache.batch_size == 4
    assert cache.keys[1, :, 0, 3, 2].tolist() == order.tolist()
    assert cache.values[0, :, 1, 2, 1].tolist() == [-sample for sample in order.tolist()]
