"""The input encoder's attention by the native op: as in float64, the same bits on any number of threads."""

import pytest
import torch
from torch import Tensor

from training.config import ModelConfig
from training.mixing import (
    attend_by_tables,
    attend_windows,
    mix_backward_by_torch,
    mix_by_torch,
    reference_attend_windows,
    reference_mix_windows,
)
from training.ops import load_ops
from training.tensorar import build_model

SHAPES = [  # windows, window_size, heads, dim, codebook_size
    (1, 1, 1, 16, 1),
    (37, 5, 3, 24, 50),
    (300, 4, 6, 48, 30),
    (21, 3, 5, 20, 9),
    (33, 8, 7, 112, 90),
    (530, 2, 4, 64, 700),
    (2800, 4, 4, 768, 100),  # a result that is written past the caches
]


def _inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    windows, size, heads, dim, codebook_size = shape
    torch.manual_seed(windows)
    codes = torch.randint(codebook_size, (windows, size))
    codes[::3, 1 + size // 2 :] = -1
    weights = [torch.randn(codebook_size, dim), torch.randn(size, dim), torch.randn(heads, dim) * 0.2]
    return codes, [weight.to(dtype) for weight in (*weights, torch.randn(heads, dim // heads, dim) * 0.2)]


def _by_loops(codes: Tensor, weights: list[Tensor]) -> Tensor:
    """Window by window and head by head, keys projected before they are weighed."""
    table, offsets, score_weight, value_weight = weights
    rows = []
    for window in codes.tolist():
        keys = [table[code] + offsets[j] for j, code in enumerate(window) if code >= 0]
        keys = [key / (key.square().mean() + 1e-5).sqrt() for key in keys]
        heads = []
        for score, value in zip(score_weight, value_weight, strict=True):
            shares = torch.stack([key @ score for key in keys]).softmax(0)
            heads.append(sum(share * (value @ key) for share, key in zip(shares, keys, strict=True)))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def _gradients(attend: object, codes: Tensor, weights: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    out = attend(codes, *leaves)  # type: ignore[operator]
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("attend", [reference_attend_windows, attend_by_tables])
def test_plain_torch_is_attention_of_a_query_a_head_over_the_codes_there_are(attend: object) -> None:
    codes, weights = _inputs(SHAPES[1], torch.float64)
    torch.testing.assert_close(attend(codes, *weights), _by_loops(codes, weights))  # type: ignore[operator]


def test_the_reference_has_the_gradients_of_its_values() -> None:
    codes, weights = _inputs((5, 3, 2, 8, 4), torch.float64)
    leaves = [weight.requires_grad_() for weight in weights[:3]]
    assert torch.autograd.gradcheck(lambda *leaves: reference_mix_windows(codes, *leaves), leaves)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_reference_in_float64(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, bound: float
) -> None:
    codes, weights = _inputs(shape, dtype)
    grad = torch.randn(len(codes), shape[2] * (shape[3] // shape[2])).to(dtype)
    got = _gradients(attend_windows, codes, weights, grad)
    expected = _gradients(reference_attend_windows, codes, [weight.double() for weight in weights], grad)
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_have_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    load_ops()
    codes, weights = _inputs((700, 4, 6, 48, 5), dtype)  # each code some hundred times
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        small = [weights[0], weights[1].float(), weights[2].float()]
        mixed, shares = torch.ops.tensorar.mix_windows(codes, *small)
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in small]
        torch.ops.tensorar.mix_windows_backward(mixed, shares, codes, *small, *sums)
        results.append([mixed, shares, *sums])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_kernels_add_the_same_gradients(dtype: torch.dtype) -> None:
    load_ops()
    codes, weights = _inputs(SHAPES[1], dtype)
    small = [weights[0], weights[1].float(), weights[2].float()]
    results = []
    for mix, mix_backward in (
        (mix_by_torch, mix_backward_by_torch),
        (torch.ops.tensorar.mix_windows, torch.ops.tensorar.mix_windows_backward),
    ):
        sums = [torch.ones_like(weight, dtype=torch.float32) for weight in small]
        mixed, shares = mix(codes, *small)
        mix_backward(mixed, shares, codes, *small, *sums)
        results.append([mixed, *sums])
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for by_torch, native in zip(*results, strict=True):
        torch.testing.assert_close(by_torch, native, rtol=bound, atol=bound)


def test_torch_finds_nothing_wrong_with_the_registration() -> None:
    load_ops()
    codes, weights = _inputs(SHAPES[1], torch.float32)
    leaves = [weight.requires_grad_() for weight in weights]
    torch.library.opcheck(torch.ops.tensorar.attend_windows.default, (codes, *leaves))
    small = [weight.detach() for weight in weights[:3]]
    torch.library.opcheck(torch.ops.tensorar.mix_windows.default, (codes, *small))
    mixed, shares = torch.ops.tensorar.mix_windows(codes, *small)
    sums = [torch.zeros_like(weight) for weight in small]
    torch.library.opcheck(torch.ops.tensorar.mix_windows_backward.default, (mixed, shares, codes, *small, *sums))


def test_a_model_with_native_ops_computes_what_one_without_does() -> None:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(
            num_layers=1, num_heads=2, model_dim=16, codebook_size=90, codes_per_side=4, window_size=4, dropout=0.0
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    windows, labels = torch.randint(90, (3, 16, 4)), torch.tensor([0, 1, 2])
    results = []
    for _ in range(2):
        model.zero_grad()
        logits = model(windows, labels)
        logits.logsumexp(-1).sum().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
        model.use_native_ops()
    for reference, native in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-4)


def test_the_model_compiles_without_graph_breaks_around_the_op() -> None:
    load_ops()
    codes, weights = _inputs(SHAPES[1], torch.float32)
    compiled = torch.compile(attend_windows, fullgraph=True, backend="aot_eager")
    grad = torch.randn(len(codes), 24)
    plain = _gradients(attend_windows, codes, weights, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, _gradients(compiled, codes, weights, grad), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes, weights: codes.fill_(50), r"codes must be below the table's 50 rows, got 50"),
        (lambda codes, weights: weights.__setitem__(0, weights[0].double()), "table must be float32 or bfloat16"),
        (lambda codes, weights: weights.__setitem__(1, weights[1][:2]), r"offsets must be .* of shape \(5, 24\)"),
        (
            lambda codes, weights: weights.__setitem__(2, weights[2][:, :8]),
            r"score_weight must be .* of shape \(3, 24\)",
        ),
    ],
)
def test_what_the_kernel_could_not_read_is_refused(change: object, message: str) -> None:
    codes, weights = _inputs(SHAPES[1], torch.float32)
    change(codes, weights)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=message):
        attend_windows(codes, *weights)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_nan_of_any_bits_is_seen_in_what_is_mixed(bits: int) -> None:
    """Devices make NaNs whose bits, rounded to bfloat16 as a number's, are those of -0."""
    codes, (table, offsets, score_weight, value_weight) = _inputs(SHAPES[2], torch.bfloat16)
    offsets = offsets.float()
    offsets[1] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    attended = attend_windows(codes, table, offsets, score_weight.float(), value_weight)
    assert attended.isnan().all()
