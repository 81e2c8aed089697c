"""Which predictions a loss is made of: all whose code lies in the image, or a sample of those at offsets >= 1.

Invariant: the estimate is unbiased. With stride s, offset j >= 1 of a sample is scored at every s-th position from a
random phase on, so each prediction with probability 1/s, and counts s times: divided is by the number of all
predictions, never by how many were drawn. Offset 0, the code that is kept, is always scored everywhere. Shapes do not
depend on the draw; where a phase leaves no place inside the image for the last one, it is marked and must not count.

B batch, T positions, K window_size, R predictions scored of a sample, by offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.philox import Purpose, cell_of, draw_words


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scored predictions of a micro batch and their targets."""

    positions_BR: Tensor
    """int64 in [0, T): where the prediction is made."""
    offsets_R: Tensor
    """int64 in [0, K), ascending; the prediction is of code position + offset."""
    targets_BR: Tensor
    """int64 codes."""
    is_inside_BR: Tensor
    """Bool: whether it counts; all true at stride 1."""
    num_of_offset: tuple[int, ...]
    """Predictions of a sample at each offset; they sum to R."""
    scale_of_offset: tuple[float, ...]
    """What turns a sum over the predictions that count into the mean over all of an offset, or its estimate."""
    draft_gradient_scale: float = 1.0
    """In [0, 1]: what gradients of predictions at offsets >= 1 are multiplied by where they enter the base model."""

    @property
    def gradient_scales(self) -> Tensor | None:
        """(R,) float32: what each prediction's gradient is multiplied by in the base model; none is 1."""
        if self.draft_gradient_scale == 1.0:
            return None
        ones_R = torch.ones(len(self.offsets_R), device=self.offsets_R.device)
        return ones_R.masked_fill_(self.offsets_R > 0, self.draft_gradient_scale)

    def join_offsets(self, firsts_BRX: Tensor, others_BRX: Tensor) -> Tensor:
        """(B, R, ...): predictions at offset 0 of the one, those at offsets >= 1 of the other."""
        num_firsts = self.num_of_offset[0]
        return torch.cat([firsts_BRX[:, :num_firsts], others_BRX[:, num_firsts:]], dim=1)

    def of_position(self, x_BTX: Tensor) -> Tensor:
        """(B, R, ...) of what there is of every position, (B, T, ...)."""
        return _take(x_BTX, self._firsts(x_BTX) + self.positions_BR, num_indices=2)

    def of_prediction(self, x_BTKX: Tensor) -> Tensor:
        """(B, R, ...) of what there is of every position and offset, (B, T, K, ...)."""
        indices_BR = (self._firsts(x_BTKX) + self.positions_BR) * x_BTKX.shape[2] + self.offsets_R
        return _take(x_BTKX, indices_BR, num_indices=3)

    def of_offset(self, x_KX: Tensor) -> Tensor:
        """(R, ...) of what there is of every offset, (K, ...)."""
        return _take(x_KX, self.offsets_R, num_indices=1)

    def sum_of_offset(self, x_BR: Tensor) -> Tensor:
        """(K,) sums over the predictions that count."""
        parts = torch.split(x_BR * self.is_inside_BR, list(self.num_of_offset), dim=1)
        return torch.stack([part.sum() for part in parts])

    def _firsts(self, x_BTX: Tensor) -> Tensor:
        batch, num_positions = x_BTX.shape[:2]
        return num_positions * torch.arange(batch, device=x_BTX.device)[:, None]


def scored_of_offset(num_positions: int, *, window_size: int, stride: int) -> tuple[int, ...]:
    """Return the scored predictions of a sample at each offset."""
    return tuple(-(-(num_positions - offset) // (stride if offset else 1)) for offset in range(window_size))


def draw_phases(*, window_size: int, stride: int, seed: int, step: int, sample_counters_B: Tensor) -> Tensor:
    """Return (B, K) int64 phases in [0, stride), uniform to within 2**-32; 0 at offset 0.

    Args:
        window_size: K.
        stride: s < 2**31.
        seed: in [0, 2**56).
        step: training step.
        sample_counters_B: int64, what tells the samples of a step apart.
    """
    offsets = torch.arange(window_size, device=sample_counters_B.device)
    cells, samples = cell_of(torch.zeros_like(offsets), offsets), sample_counters_B[:, None]
    words, *_ = draw_words(Purpose.SCORED_PHASES, seed=seed, samples=samples, step=step, cells=cells)
    return ((words * stride) >> 32) * (offsets > 0)


def score_predictions(
    codes_BT: Tensor,
    *,
    window_size: int,
    stride: int = 1,
    phases_BK: Tensor | None = None,
    draft_gradient_scale: float = 1.0,
) -> Scored:
    """Return what is scored of a micro batch.

    Args:
        codes_BT: int64, the true codes.
        window_size: K in [1, T].
        stride: s; 1 scores every prediction whose code lies in the image.
        phases_BK: int64 in [0, s), see `draw_phases`; none is 0.
        draft_gradient_scale: see `Scored`.

    Source: systematic sampling with a random start [ours].
    """
    batch, num_positions = codes_BT.shape
    device = codes_BT.device
    counts = scored_of_offset(num_positions, window_size=window_size, stride=stride)
    phases = torch.zeros(batch, window_size, dtype=torch.int64, device=device) if phases_BK is None else phases_BK
    columns = [
        phases[:, offset, None] + (stride if offset else 1) * torch.arange(count, device=device)
        for offset, count in enumerate(counts)
    ]
    offsets_R = torch.arange(window_size, device=device).repeat_interleave(torch.tensor(counts, device=device))
    last_R = num_positions - 1 - offsets_R
    positions_BR = torch.cat(columns, dim=1)
    is_inside_BR = positions_BR <= last_R
    positions_BR = torch.minimum(positions_BR, last_R)
    return Scored(
        positions_BR=positions_BR,
        offsets_R=offsets_R,
        targets_BR=codes_BT.gather(1, positions_BR + offsets_R),
        is_inside_BR=is_inside_BR,
        num_of_offset=counts,
        scale_of_offset=tuple(
            (stride if offset else 1) / (batch * (num_positions - offset)) for offset in range(window_size)
        ),
        draft_gradient_scale=draft_gradient_scale,
    )


def _take(x: Tensor, indices: Tensor, *, num_indices: int) -> Tensor:
    # A row is read up to K times; the gradient of `embedding` sums them in a fixed order on every device.
    rows = x.flatten(0, num_indices - 1).flatten(1)
    return F.embedding(indices, rows).view(*indices.shape, *x.shape[num_indices:])
