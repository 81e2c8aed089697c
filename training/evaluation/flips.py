"""How often codes change between their drafts and the one that is kept, by place in the image and by offset.

N samples, T positions, K window_size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.integer]


def flip_rates(drafts_NTK: Codes, *, stride: int = 1) -> dict[str, Any]:
    """Return the flip rate, and its parts by position and by offset; JSON values.

    Args:
        drafts_NTK: refinement r of each position as `SampledCodes.drafts_NTK`: first draft at r = 0, final at K - 1.
        stride: of the sampler.

    Returns:
        `flip_rate`: share of positions 1 .. T - 1 whose final code differs from their first draft; `of_position`: T
        such shares over the samples, none at position 0, which has no draft; `of_offset`: K shares of the predictions
        made at each offset that differ from the final code, none at offset 0, and none at all with a stride, where most
        offsets of most positions are never predicted. All none at K = 1 or T = 1.
    """
    _, num_positions, window_size = drafts_NTK.shape
    if window_size == 1 or num_positions == 1:
        return {"flip_rate": None, "of_position": [None] * num_positions, "of_offset": [None] * window_size}
    finals_NT1 = drafts_NTK[:, :, -1:]
    differs_NTK = drafts_NTK != finals_NT1
    of_position = [None, *differs_NTK[:, 1:, 0].mean(axis=0).tolist()]
    if stride > 1:
        rate = float(differs_NTK[:, 1:, 0].mean())
        return {"flip_rate": rate, "of_position": of_position, "of_offset": [None] * window_size}
    # The prediction at offset j is refinement K - 1 - j; a position before j has none.
    of_offset = [None] + [
        float(differs_NTK[:, offset:, window_size - 1 - offset].mean()) for offset in range(1, window_size)
    ]
    return {"flip_rate": float(differs_NTK[:, 1:, 0].mean()), "of_position": of_position, "of_offset": of_offset}
