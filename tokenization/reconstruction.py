"""How far reconstructions are from their images: the loss that a fit lowers and the PSNR that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenization.pixels import to_network_range, to_pixels
from tokenization.vq import VQNetwork

NUM_HALVINGS = 3
EVALUATION_BATCH = 32
MIN_SQUARED_ERROR = 1e-3
"""Keeps the PSNR of a perfect reconstruction finite (78 dB)."""


@dataclass(frozen=True)
class Evaluation:
    """How well a network reconstructs a set of images."""

    psnr_db: float
    """Mean over the images of `psnr_of_images`."""
    num_codes_used: int
    """Distinct codes over the set."""


def reconstruction_loss(
    reconstruction_BCHW: Tensor, images_BCHW: Tensor, *, gradient_weight: float = 1.0, squared_weight: float = 0.0
) -> Tensor:
    """Return the mean absolute error of pixels, of gradients and of pixels at 1/2, 1/4 and 1/8 size, summed; a scalar.

    Args:
        reconstruction_BCHW: any float dtype, in the network's range [-1, 1].
        images_BCHW: float32, same shape and range.
        gradient_weight: of the horizontal and vertical gradients' errors.
        squared_weight: of the mean squared error of pixels, which is added where it is above 0.
    """
    error_BCHW = reconstruction_BCHW.float() - images_BCHW
    gradient_error = error_BCHW.diff(dim=2).abs().mean() + error_BCHW.diff(dim=3).abs().mean()
    loss = error_BCHW.abs().mean() + gradient_weight * gradient_error
    if squared_weight:
        loss = loss + squared_weight * error_BCHW.square().mean()
    for _ in range(NUM_HALVINGS):
        error_BCHW = F.avg_pool2d(error_BCHW, 2)
        loss = loss + error_BCHW.abs().mean()
    return loss


def psnr_of_images(reconstructions_NHWC: np.ndarray, images_NHWC: np.ndarray) -> np.ndarray:
    """Return 10 log10(255^2 / mean squared error) of each pair of uint8 images in dB, (N,) float64."""
    error_NHWC = reconstructions_NHWC.astype(np.float64) - images_NHWC.astype(np.float64)
    squared_error_N = np.maximum(np.square(error_NHWC).mean(axis=(1, 2, 3)), MIN_SQUARED_ERROR)
    psnr_N: np.ndarray = 10 * np.log10(255.0**2 / squared_error_N)
    return psnr_N


@torch.no_grad()
def evaluate_reconstruction(network: VQNetwork, images_NHWC: np.ndarray) -> Evaluation:
    """Return how well a network reconstructs uint8 images (N, H, W, 3), in float32."""
    device = next(network.parameters()).device
    psnrs: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    for begin in range(0, len(images_NHWC), EVALUATION_BATCH):
        batch_NHWC = images_NHWC[begin : begin + EVALUATION_BATCH]
        quantized = network.quantize(network.pre_quantize(to_network_range(batch_NHWC, device=device)))
        pixels_BHWC = to_pixels(network.decode_vectors(quantized.quantized_BDHW)).permute(0, 2, 3, 1).cpu().numpy()
        psnrs.append(psnr_of_images(pixels_BHWC, batch_NHWC))
        codes.append(quantized.codes_BHW.flatten().cpu().numpy())
    return Evaluation(psnr_db=float(np.concatenate(psnrs).mean()), num_codes_used=len(np.unique(np.concatenate(codes))))
