"""What one learned query per head takes from a window: its keys, weighed and summed before the value projection.

    x_k = RMSnorm(table[code_k] + offsets[k]);  share_nk = softmax over k of x_k . score_weight_n
    mixed_n = sum_k share_nk x_k;               attended_n = value_weight_n mixed_n

The norm's own weight is folded into both weights. Mixing first costs one D x D product a window where projecting every
key costs K of them. The native op takes some windows at a time, so that mixed_MND stays in cache and nothing of size
(M, K, D) or (M, N, D) is kept for backward; the table's gradient is a sum in one order whatever the number of threads.

M windows, K window_size, D model_dim, N heads, H head_dim, V codebook_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.gpt import NORM_EPS
from training.ops import load_ops

WINDOWS_AT_A_TIME = 128
"""Whose mixed vectors are in cache together, on a CPU."""
ACCELERATOR_BYTES = 512 * 2**20
"""Of mixed vectors that a GPU has at a time. Parts that fit an H100's L2 cache were slower: a dozen launches each."""


def reference_mix_windows(codes_MK: Tensor, table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor) -> Tensor:
    """mixed_MND in the table's dtype, in plain torch, computed in float32 (of float64 in float64).

    Args:
        codes_MK: int64; a negative code is not attended to, and no window is made of those alone.
        table_VD: embeddings of the codes.
        offsets_KD: what is added to the code at each offset.
        score_weight_ND: the scaled query of each head, folded into its key projection and the norm's weight.
    """
    wide = torch.promote_types(table_VD.dtype, torch.float32)
    embedded_MKD = torch.nn.functional.embedding(codes_MK.clamp(min=0), table_VD).to(wide) + offsets_KD.to(wide)
    keys_MKD = embedded_MKD * torch.rsqrt(embedded_MKD.square().mean(-1, keepdim=True) + NORM_EPS)
    scores_MKN = keys_MKD @ score_weight_ND.to(wide).transpose(0, 1)
    shares_MKN = scores_MKN.masked_fill((codes_MK < 0)[..., None], float("-inf")).softmax(1)
    mixed_MND: Tensor = (shares_MKN.transpose(1, 2) @ keys_MKD).to(table_VD.dtype)
    return mixed_MND


def reference_attend_windows(
    codes_MK: Tensor, table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor, value_weight_NHD: Tensor
) -> Tensor:
    """What `attend_windows` returns, in plain torch."""
    mixed_MND = reference_mix_windows(codes_MK, table_VD, offsets_KD, score_weight_ND)
    return (mixed_MND.transpose(0, 1) @ value_weight_NHD.transpose(1, 2)).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class WindowTables:
    """What `attend_from_tables` looks up.

    A norm scales a key by one number, so its score and its value are those of its code plus those of its offset,
    scaled: V + K entries serve all V * K keys.
    """

    factors_KV: Tensor
    """The number that scales the key of a code at an offset, as the next two in float32 or wider."""
    scores_VN: Tensor
    scores_KN: Tensor
    values_VD: Tensor
    """As the next in the table's dtype."""
    values_KD: Tensor


def window_tables(
    table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor, value_weight_NHD: Tensor
) -> WindowTables:
    """Scores and values of all codes and offsets, for arguments of `attend_windows`."""
    wide = torch.promote_types(table_VD.dtype, torch.float32)
    rows_VD, rows_KD, value_weight_DD = table_VD.to(wide), offsets_KD.to(wide), value_weight_NHD.flatten(0, 1)
    factors_KV = torch.stack([((rows_VD + row).square().mean(-1) + NORM_EPS).rsqrt() for row in rows_KD])
    scores_VN, scores_KN = (rows @ score_weight_ND.to(wide).transpose(0, 1) for rows in (rows_VD, rows_KD))
    values_VD, values_KD = (rows @ value_weight_DD.transpose(0, 1) for rows in (table_VD, offsets_KD))
    return WindowTables(factors_KV, scores_VN, scores_KN, values_VD, values_KD)


def attend_from_tables(codes_MK: Tensor, tables: WindowTables) -> Tensor:
    """What `attend_windows` returns, looked up."""
    codes, offsets = codes_MK.clamp(min=0), torch.arange(codes_MK.shape[1], device=codes_MK.device)
    num_codes, heads = tables.scores_VN.shape

    def of_codes(values_V: Tensor, values_K: Tensor) -> Tensor:
        return torch.nn.functional.embedding(codes, values_V) + values_K

    factors_MK1 = torch.nn.functional.embedding(codes + num_codes * offsets, tables.factors_KV.flatten()[:, None])
    scores_MKN = of_codes(tables.scores_VN, tables.scores_KN) * factors_MK1
    scores_MKN = scores_MKN.masked_fill((codes_MK < 0)[..., None], float("-inf"))
    shares_MKN = (scores_MKN.softmax(1) * factors_MK1).to(tables.values_VD.dtype)
    values_MKNH = of_codes(tables.values_VD, tables.values_KD).view(*codes.shape, heads, -1)
    attended_MD: Tensor = (shares_MKN[..., None] * values_MKNH).sum(1).flatten(1)
    return attended_MD


def attend_by_tables(
    codes_MK: Tensor, table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor, value_weight_NHD: Tensor
) -> Tensor:
    """What `attend_windows` returns, from tables made for this call: cheaper where V < M."""
    return attend_from_tables(codes_MK, window_tables(table_VD, offsets_KD, score_weight_ND, value_weight_NHD))


def attend_windows(
    codes_MK: Tensor, table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor, value_weight_NHD: Tensor
) -> Tensor:
    """(M, D): attention of one query per head over each window's codes, by the native op.

    Args:
        codes_MK: int64 in [0, V), or negative where nothing is attended to; no window is made of those alone.
        table_VD: float32 or bfloat16, embeddings of the codes.
        offsets_KD: what is added to the code at each offset.
        score_weight_ND: see `reference_mix_windows`.
        value_weight_NHD: the value projection of each head, the norm's weight in it; the table's dtype.

    Returns:
        In the table's dtype; computed in float32 but for the products with value_weight_NHD.

    Raises:
        NativeOpError: the library cannot be used.
        RuntimeError: an argument has another shape or dtype, a code is beyond the table (on CUDA: a kernel stops, and
            the context with it), or the keys of a window do not fit a block's shared memory (on CUDA).
    """
    load_ops()
    attended_MD: Tensor = torch.ops.tensorar.attend_windows(
        codes_MK, table_VD, offsets_KD.float(), score_weight_ND.float(), value_weight_NHD
    )
    return attended_MD


@torch.library.custom_op("tensorar::attend_windows", mutates_args=())
def _attend(
    codes_MK: Tensor, table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor, value_weight_NHD: Tensor
) -> Tensor:
    attended_MD = table_VD.new_empty(codes_MK.shape[0], value_weight_NHD.shape[0] * value_weight_NHD.shape[1])
    weights = (table_VD.contiguous(), offsets_KD.contiguous(), score_weight_ND.contiguous())
    mix, _ = _kernels(table_VD.device)
    size = _windows_at_a_time(value_weight_NHD)
    for codes, attended in zip(torch.split(codes_MK.contiguous(), size), torch.split(attended_MD, size), strict=True):
        mixed_MND, _ = mix(codes, *weights)
        attended_MNH = attended.view(-1, *value_weight_NHD.shape[:2])
        torch.bmm(mixed_MND.transpose(0, 1), value_weight_NHD.transpose(1, 2), out=attended_MNH.transpose(0, 1))
        del mixed_MND  # before the next part's
    return attended_MD


@_attend.register_fake
def _(
    codes_MK: Tensor, table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor, value_weight_NHD: Tensor
) -> Tensor:
    return table_VD.new_empty(codes_MK.shape[0], value_weight_NHD.shape[0] * value_weight_NHD.shape[1])


@torch.library.custom_op("tensorar::attend_windows_backward", mutates_args=())
def _attend_backward(
    grad_MD: Tensor,
    codes_MK: Tensor,
    table_VD: Tensor,
    offsets_KD: Tensor,
    score_weight_ND: Tensor,
    value_weight_NHD: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, head_dim, _ = value_weight_NHD.shape
    weights = (table_VD.contiguous(), offsets_KD.contiguous(), score_weight_ND.contiguous())
    sums = tuple(torch.zeros_like(weight, dtype=torch.float32) for weight in weights)
    value_grad_NHD: Tensor | None = None
    mix, mix_backward = _kernels(table_VD.device)
    size = _windows_at_a_time(value_weight_NHD)
    for codes, grad in zip(torch.split(codes_MK.contiguous(), size), torch.split(grad_MD, size), strict=True):
        mixed_MND, shares_MNK = mix(codes, *weights)
        grad_NMH = grad.view(-1, heads, head_dim).transpose(0, 1)
        of_part = grad_NMH.transpose(1, 2) @ mixed_MND.transpose(0, 1)
        value_grad_NHD = of_part if value_grad_NHD is None else value_grad_NHD.float().add_(of_part)
        torch.bmm(grad_NMH, value_weight_NHD, out=mixed_MND.transpose(0, 1))
        mix_backward(mixed_MND, shares_MNK, codes, *weights, *sums)
        del mixed_MND  # before the next part's
    assert value_grad_NHD is not None  # a split has a part, of no windows too
    table_grad_VD, offset_grads_KD, score_grad_ND = sums
    return table_grad_VD.to(table_VD.dtype), offset_grads_KD, score_grad_ND, value_grad_NHD.to(value_weight_NHD.dtype)


@_attend_backward.register_fake
def _(
    grad_MD: Tensor,
    codes_MK: Tensor,
    table_VD: Tensor,
    offsets_KD: Tensor,
    score_weight_ND: Tensor,
    value_weight_NHD: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (table_VD, offsets_KD, score_weight_ND, value_weight_NHD)
    table_grad, offset_grads, score_grad, value_grad = (torch.empty_like(tensor) for tensor in inputs)
    return table_grad, offset_grads, score_grad, value_grad


def _keep_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors  # type: ignore[attr-defined]
    return None, *torch.ops.tensorar.attend_windows_backward(grad_MD.contiguous(), *inputs)


_attend.register_autograd(_backward, setup_context=_keep_inputs)


def _kernels(device: torch.device) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., None]]:
    """What mixes some windows and takes their gradient back: ours on a CPU and on CUDA, else torch's own kernels."""
    if device.type in ("cpu", "cuda"):
        return torch.ops.tensorar.mix_windows, torch.ops.tensorar.mix_windows_backward
    return mix_by_torch, mix_backward_by_torch


def mix_by_torch(
    codes_MK: Tensor, table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """mixed_MND, and an empty tensor where the native kernel returns the shares."""
    return reference_mix_windows(codes_MK, table_VD, offsets_KD, score_weight_ND), offsets_KD.new_empty(0)


def mix_backward_by_torch(
    grad_MND: Tensor,
    shares: Tensor,
    codes_MK: Tensor,
    table_VD: Tensor,
    offsets_KD: Tensor,
    score_weight_ND: Tensor,
    table_grad_VD: Tensor,
    offset_grads_KD: Tensor,
    score_weight_grad_ND: Tensor,
) -> None:
    """Adds to the last three; a row's gradients are sorted by torch, so that their sum has one order on any device."""
    rows = torch.nn.functional.embedding(codes_MK.clamp(min=0), table_VD).float().flatten(0, 1)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (rows, offsets_KD, score_weight_ND)]
        places_MK = torch.arange(codes_MK.numel(), device=rows.device).view_as(codes_MK)
        mixed_MND = reference_mix_windows(places_MK.masked_fill(codes_MK < 0, -1), *leaves)
        row_grads, *small = torch.autograd.grad(mixed_MND, leaves, grad_MND.float())
    table_grad_VD.index_put_((codes_MK.flatten().clamp(min=0),), row_grads, accumulate=True)  # 0 where there is no code
    offset_grads_KD += small[0]
    score_weight_grad_ND += small[1]


def _windows_at_a_time(value_weight_NHD: Tensor) -> int:
    if value_weight_NHD.device.type == "cpu":
        return WINDOWS_AT_A_TIME
    heads, _, dim = value_weight_NHD.shape
    return max(1, ACCELERATOR_BYTES // (heads * dim * value_weight_NHD.element_size()))
