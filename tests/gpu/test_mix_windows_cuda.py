"""mix_windows and its backward on a CUDA device: against float64 and the CPU, the same bits each time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.mixing import attend_windows, reference_attend_windows, reference_mix_windows
from training.ops import load_ops

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 4e-3}
SHAPES = [  # windows, window_size, heads, dim, codebook_size
    (1, 1, 1, 16, 1),
    (37, 5, 3, 24, 50),
    (21, 3, 5, 20, 9),  # rows that start on no 16 bytes
    (33, 8, 7, 112, 90),
    (5, 4, 3, 36, 11),  # rows of float32 with an odd number of 16 bytes
    (3, 8, 5, 300, 11),
    (1365, 4, 12, 768, 16384),  # B's part of a micro batch: four windows a block
    (300, 4, 20, 1280, 16384),  # two
    (122, 4, 32, 3200, 16384),  # one
    (40, 16, 32, 2048, 1000),  # 130 KiB of keys a window
]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    load_ops()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def _inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    windows, size, heads, dim, codebook_size = shape
    torch.manual_seed(windows)
    codes = torch.randint(codebook_size, (windows, size))
    codes[::3, 1 + size // 2 :] = -1
    weights = [torch.randn(codebook_size, dim).to(dtype), torch.randn(size, dim)]
    weights.append(torch.randn(heads, dim) * 1.5 / dim**0.5)
    return [codes, *weights], torch.randn(windows, heads, dim).to(dtype)


def _run(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    mixed, shares = torch.ops.tensorar.mix_windows(*tensors)
    sums = [torch.ones_like(weight, dtype=torch.float32) for weight in tensors[1:]]
    torch.ops.tensorar.mix_windows_backward(grad, shares, *tensors, *sums)
    return [mixed, shares, *sums]


def _in_float64(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [weight.double().requires_grad_() for weight in tensors[1:]]
    mixed = reference_mix_windows(tensors[0], *leaves)
    return [mixed.detach(), *torch.autograd.grad(mixed, leaves, grad.double())]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_device_gives_the_values_and_gradients_of_float64(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    tensors, grad = _inputs(shape, dtype)
    mixed, _, *sums = _run([tensor.cuda() for tensor in tensors], grad.cuda())
    wanted_mixed, *wanted_sums = _in_float64(tensors, grad)
    assert (mixed.cpu().double() - wanted_mixed).abs().max() <= BOUNDS[dtype] * wanted_mixed.abs().max()
    for actual, wanted in zip(sums, wanted_sums, strict=True):
        largest = (wanted + 1).abs().max()
        assert (actual.cpu().double() - 1 - wanted).abs().max() <= BOUNDS[torch.float32] * largest


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_device_gives_the_same_bits_each_time(dtype: torch.dtype) -> None:
    tensors, grad = _inputs((1365, 4, 12, 768, 40), dtype)  # each code some hundred times
    on_device = [tensor.cuda() for tensor in tensors]
    first = _run(on_device, grad.cuda())
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, _run(on_device, grad.cuda()), strict=True))


def test_unaligned_slices_give_the_bits_of_aligned_ones() -> None:
    tensors, grad = _inputs((37, 4, 3, 64, 50), torch.bfloat16)
    moved = [torch.cat([t.new_zeros(1), t.flatten()]).cuda()[1:].view(t.shape) for t in (*tensors, grad)]
    want = _run([tensor.cuda() for tensor in tensors], grad.cuda())
    assert all(torch.equal(a, b) for a, b in zip(want, _run(moved[:-1], moved[-1]), strict=True))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    tensors, grad = _inputs((37, 4, 3, 64, 50), dtype)
    tensors[0][5], tensors[1][7, 3] = 7, float("nan")
    mixed, *_ = _run([tensor.cuda() for tensor in tensors], grad.cuda())
    has_code = ((tensors[0] == 7).any(1))[:, None, None].expand_as(mixed)
    assert torch.equal(mixed.isnan().cpu(), has_code)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_encoders_attention_trains_as_the_reference_does_in_parts(dtype: torch.dtype) -> None:
    tensors, _ = _inputs((3000, 4, 12, 768, 16384), dtype)
    codes, *weights = [tensor.cuda() for tensor in tensors]
    weights = [weight.to(dtype) for weight in weights]
    weights.append((torch.randn(12, 64, 768) / 768**0.5).to(dtype).cuda())
    grad = torch.randn(3000, 768).to(dtype).cuda()
    results = []
    for attend, leaves in ((attend_windows, weights), (reference_attend_windows, [w.double() for w in weights])):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        out = attend(codes, *leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    for actual, wanted in zip(*results, strict=True):
        assert (actual.double() - wanted).abs().max() <= bound * wanted.abs().max()


def test_the_kernels_run_on_the_current_stream() -> None:
    tensors, grad = _inputs((64, 4, 3, 64, 50), torch.float32)
    want = _run([tensor.cuda() for tensor in tensors], grad.cuda())
    late = [torch.zeros_like(tensor, device="cuda") for tensor in tensors]
    on_device = [tensor.cuda() for tensor in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, tensor in zip(late, on_device, strict=True):
            to.copy_(tensor)
        got = _run(late, grad.cuda())
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_keys_that_fit_no_block_are_refused() -> None:
    tensors, _ = _inputs((4, 64, 2, 2048, 50), torch.float32)
    with pytest.raises(RuntimeError, match=r"a block must need at most the \d+ bytes of shared memory"):
        torch.ops.tensorar.mix_windows(*[tensor.cuda() for tensor in tensors])
