"""The native ops, `torch.ops.tensorar`: compiled by `tensorar build-ops` from csrc, loaded at their first use.

Each op is a schema and its kernels in csrc, a fake here, and a plain-torch reference that it is tested against; which
of the two a run computes with is `engine.ops` in its spec. A library that is missing, or was built from other sources,
is an error and never a fall-back.

B batch, T positions, K window_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from training.build_ops import LIBRARY, sources_mark


class NativeOpError(RuntimeError):
    """The library of native ops cannot be used; the message says what to do."""


_loaded = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def load_ops() -> bool:
    """Load the library, the first time that it is called; returns True.

    Raises:
        NativeOpError: there is none, it was built from other sources, or it does not fit this torch.
    """
    global _loaded
    if not _loaded:
        _check_library()
        try:
            torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise NativeOpError(f"load native ops {LIBRARY}: {error}; {_NEXT}") from error
        _register_fakes()
        _loaded = True
    return True


def check_ops(*, with_cuda: bool) -> None:
    """Load the library, and check that it has what a run needs.

    Args:
        with_cuda: whether tensors are on CUDA devices.

    Raises:
        NativeOpError: see `load_ops`; or it was built without CUDA.
    """
    load_ops()
    if with_cuda and sources_mark(has_cuda=True).encode() not in LIBRARY.read_bytes():
        raise NativeOpError(
            f"load native ops {LIBRARY}: they must be built with CUDA for a run on CUDA devices; run `TENSORAR_CUDA=1 "
            f"tensorar build-ops`, or set engine.ops: reference"
        )


def noise_windows(
    codes_BT: Tensor,
    *,
    betas: Sequence[float],
    codebook_size: int,
    coupling: Literal["independent", "shared"],
    seed: int,
    step: int,
    sample_counters_B: Tensor,
) -> Tensor:
    """Windows as `training.noise.noise_windows` returns them, bit for bit, in one pass over memory.

    Any element can be computed alone. Element (b, i, j) is codes[b, i + j], or 0 where i + j >= T; unless offset j has
    threshold floor(betas[j] * 2**32) above word 0 of its draw: then it is (word 1 * codebook_size) >> 32. A draw is
    Philox4x32-10 of

    * counter words: sample_counters[b] bits 0..31, bits 32..63, step, cell;
    * key words: seed bits 0..31; purpose + (seed >> 32) * 2**8;

    with cell = i * 2**16 + j and purpose 1 where the coupling is `independent`, and cell = (i + j) * 2**16 and purpose
    2 where it is `shared`.

    Args:
        codes_BT: int64 in [0, codebook_size), T <= 2**15.
        betas: K <= 256 probabilities, the first 0 (see `training.noise.beta_of_offset`).
        codebook_size: V < 2**31.
        coupling: what shares a draw; see the reference.
        seed: in [0, 2**56).
        step: training step, in [0, 2**32).
        sample_counters_B: int64, what tells the samples of a step apart.

    Returns:
        windows_BTK int64, on the device of the codes.

    Raises:
        NativeOpError: the library cannot be used.
        ValueError: beta of offset 0 is not 0.
        RuntimeError: an argument is out of range.
    """
    if betas[0] != 0.0:
        raise ValueError(f"noise windows: beta of offset 0 must be 0, got {betas[0]!r}; use beta_of_offset")
    load_ops()
    thresholds = [int(beta * 2**32) for beta in betas]
    counters = sample_counters_B.to(codes_BT.device).contiguous()
    windows_BTK: Tensor = torch.ops.tensorar.noise_windows(
        codes_BT.contiguous(), counters, thresholds, codebook_size, coupling, seed, step
    )
    return windows_BTK


def sampling_uniforms(
    *, samples_R: Tensor, positions_R: Tensor, streams_R: Tensor, codebook_size: int, seed: int
) -> Tensor:
    """(R, V) float32 in (0, 1): the uniforms behind `training.drawing.gumbel_draws`, bit for bit, on a CPU.

    Any element can be computed alone. Element (r, v) is (w + 0.5) / 2**23, w the top 23 bits of word v % 4 of
    Philox4x32-10 of

    * counter words: samples[r] bits 0..31, bits 32..63, streams[r], positions[r] * 2**16 + v // 4;
    * key words: seed bits 0..31; 5 + (seed >> 32) * 2**8.

    Args:
        samples_R: int64, sample counters.
        positions_R: int64 in [0, 2**16), positions of the codes.
        streams_R: int64 in [0, 2**32).
        codebook_size: V <= 2**18.
        seed: in [0, 2**56).

    Raises:
        NativeOpError: the library cannot be used.
        RuntimeError: an argument is out of range or not on the CPU.
    """
    load_ops()
    uniforms_RV: Tensor = torch.ops.tensorar.sampling_uniforms(
        samples_R.contiguous(), positions_R.contiguous(), streams_R.contiguous(), codebook_size, seed
    )
    return uniforms_RV


def drawn_codes(
    logits_RV: Tensor, *, rows_N: Tensor, samples_N: Tensor, positions_N: Tensor, streams_N: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Codes (N,) int64 and, for each, whether it is certain: argmax of logits + Gumbel in one pass, on a CPU.

    The Gumbels are `training.drawing.gumbel_draws`, but for the rounding of their logarithms. A code is certain where
    no rounding could make another one the largest; an uncertain one is to be drawn again with torch's own logarithm
    (about 1 of 40,000, and all whose logits are not finite at the top).

    Args:
        logits_RV: float32, V <= 2**18; -inf where a code is not drawn.
        rows_N: int64 in [0, R), the logits of each draw.
        samples_N: int64, as the next two: counters as in `sampling_uniforms`.
        positions_N: int64 in [0, 2**16).
        streams_N: int64 in [0, 2**32).
        seed: in [0, 2**56).

    Raises:
        NativeOpError: the library cannot be used.
        RuntimeError: an argument is out of range or not on the CPU.
    """
    load_ops()
    counters = (numbers.contiguous() for numbers in (rows_N, samples_N, positions_N, streams_N))
    codes_N, is_certain_N = torch.ops.tensorar.drawn_codes(logits_RV.contiguous(), *counters, seed)
    return codes_N, is_certain_N


def project_states(states: Tensor, weight_VD: Tensor) -> Tensor:
    """(..., V): `F.linear(states, weight_VD)` in one pass over the weight, for some dozen states; without gradient.

    An element is one sum over d in order, so it does not depend on the number of states; it differs from `F.linear` by
    rounding.

    Args:
        states: (..., D) float32 on the CPU, as the next.
        weight_VD: contiguous.

    Raises:
        NativeOpError: the library cannot be used.
        RuntimeError: an argument has another shape, dtype or device.
    """
    load_ops()
    states_RD = states.reshape(-1, states.shape[-1]).contiguous()
    projected_RV: Tensor = torch.ops.tensorar.project_states(states_RD, weight_VD)
    return projected_RV.view(*states.shape[:-1], len(weight_VD))


def cross_entropy_rows(
    logits_RV: Tensor, targets_R: Tensor, *, row_weights_R: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Entropies (R,) float32 in nats and hits (R,) bool of rows of logits, in one pass over memory, on CUDA.

    Args:
        logits_RV: float32 or bfloat16, contiguous; with `needs_grad` it ends as the gradient of the sum of row weight
            times entropy: row weight times (softmax - one-hot of the target).
        targets_R: int64 in [0, V).
        row_weights_R: float32.
        needs_grad: whether the logits are replaced.

    Returns:
        log(sum(exp(row))) - row[target], and whether the first largest logit is the target's. Sums are float32, in an
        order that the shapes alone determine.

    Raises:
        NativeOpError: the library cannot be used.
        RuntimeError: an argument has another shape, dtype or device, or a target is no column (then a kernel stops, and
            the context with it).
    """
    load_ops()
    arguments = (targets_R.contiguous(), row_weights_R.contiguous(), needs_grad)
    entropies_R, hits_R = torch.ops.tensorar.cross_entropy_rows(logits_RV, *arguments)
    return entropies_R, hits_R


_NEXT = "run `tensorar build-ops`, or set engine.ops (of a sample job: ops): reference"


def _check_library() -> None:
    if not LIBRARY.exists():
        raise NativeOpError(f"load native ops {LIBRARY}: there is no such file; {_NEXT}")
    if sources_mark().encode() not in LIBRARY.read_bytes():
        raise NativeOpError(
            f"load native ops {LIBRARY}: it must be built from the sources beside it, which have changed; {_NEXT}"
        )


def _register_fakes() -> None:
    @torch.library.register_fake("tensorar::noise_windows")  # type: ignore[untyped-decorator]
    def _(codes_BT: Tensor, sample_counters_B: Tensor, thresholds: Sequence[int], *rest: object) -> Tensor:
        return codes_BT.new_empty((*codes_BT.shape, len(thresholds)))

    @torch.library.register_fake("tensorar::sampling_uniforms")  # type: ignore[untyped-decorator]
    def _(samples_R: Tensor, positions_R: Tensor, streams_R: Tensor, codebook_size: int, seed: int) -> Tensor:
        return torch.empty((len(samples_R), codebook_size), device=samples_R.device)

    @torch.library.register_fake("tensorar::drawn_codes")  # type: ignore[untyped-decorator]
    def _(logits_RV: Tensor, rows_N: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        return torch.empty_like(rows_N), torch.empty_like(rows_N, dtype=torch.bool)

    @torch.library.register_fake("tensorar::project_states")  # type: ignore[untyped-decorator]
    def _(states_RD: Tensor, weight_VD: Tensor) -> Tensor:
        return states_RD.new_empty(len(states_RD), len(weight_VD))

    @torch.library.register_fake("tensorar::mix_windows")  # type: ignore[untyped-decorator]
    def _(codes_MK: Tensor, table_VD: Tensor, offsets_KD: Tensor, score_weight_ND: Tensor) -> tuple[Tensor, Tensor]:
        num_windows, window_size = codes_MK.shape
        heads, dim = score_weight_ND.shape
        shares_MNK = offsets_KD.new_empty(num_windows, heads, window_size)
        return table_VD.new_empty(num_windows, heads, dim), shares_MNK

    @torch.library.register_fake("tensorar::cross_entropy_rows")  # type: ignore[untyped-decorator]
    def _(logits_RV: Tensor, targets_R: Tensor, row_weights_R: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(row_weights_R), torch.empty_like(targets_R, dtype=torch.bool)

    @torch.library.register_fake("tensorar::mix_windows_backward")  # type: ignore[untyped-decorator]
    def _(*arguments: Tensor) -> None:
        return None
