"""Pixels as people store them (uint8) and as networks take them (-1..1), the same way everywhere.

LlamaGen's rounding both ways, so that decoded images are equal to its own to the last bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_network_range(images_NHWC: np.ndarray, *, device: torch.device) -> Tensor:
    """Return uint8 (N, H, W, 3) images as float32 (N, 3, H, W) in -1..1, in the channels-last memory they come in."""
    images = torch.from_numpy(np.ascontiguousarray(images_NHWC)).to(device)
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pixels(images_BCHW: Tensor) -> Tensor:
    """Return images of about -1..1 as uint8, rounded and clamped; the input's shape."""
    return images_BCHW.float().mul(127.5).add(128.0).clamp(0, 255).to(torch.uint8)
