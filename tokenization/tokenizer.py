"""Tokenizer: images to codes and back, with a fingerprint of everything that determines the codes.

Every encode call has one shape, `batch_size` images with the last call padded, so codes depend on neither the
neighbours of an image nor the number of images; short calls pay for it with wasted work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenization.config import NETWORKS, TokenizerConfig
from tokenization.fingerprint import Fingerprint
from tokenization.pixels import to_network_range, to_pixels
from tokenization.vq import VQNetwork
from tokenization.weights_file import HISTORY_KEY, read_weights, resolve_weights


class Tokenizer:
    """Turn images into codes and codes into images; make one with `load`."""

    def __init__(self, *, config: TokenizerConfig, network: VQNetwork, weights_sha256: str) -> None:
        self.config = config
        self.fingerprint = Fingerprint(
            weights_sha256=weights_sha256,
            network=network.config,
            image_size_px=config.image_size_px,
            batch_size=config.batch_size,
            dtype=config.dtype,
            compile_mode=config.compile_mode,
        )
        self._network = network.eval().requires_grad_(False)
        # The layout that convolutions are fastest in: a quarter more images/s on a CPU, and the same codes.
        self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = next(network.parameters()).device
        self._encode = self._network.encode
        if config.compile_mode != "none":
            self._encode = torch.compile(self._encode, mode=config.compile_mode, dynamic=False)

    @classmethod
    def load(cls, config: TokenizerConfig, *, device: str = "cpu", num_threads: int | None = None) -> Tokenizer:
        """Return the tokenizer of a config, its weights checked and in memory.

        Args:
            config: which weights, and how they are run.
            device: torch device that does the work.
            num_threads: CPU threads of torch in this whole process; None leaves them.

        Raises:
            FileNotFoundError: the weights are neither a file nor a shipped name.
            ValueError: the file is damaged or does not fit its network, or the image size is no multiple of its patch.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        network_config = None if config.network is None else NETWORKS[config.network]
        weights = read_weights(resolve_weights(config.weights), network=network_config)
        patch_px = weights.network.patch_px
        if config.image_size_px % patch_px:
            below = config.image_size_px // patch_px * patch_px
            raise ValueError(
                f"loading tokenizer {config.weights}: image_size_px must be a multiple of {patch_px}, "
                f"got {config.image_size_px}; use {below or patch_px} or {below + patch_px}"
            )
        network = VQNetwork(weights.network)
        network.load_state_dict({**weights.state, HISTORY_KEY: network.quantize.codebook_used})
        return cls(config=config, network=network.to(device), weights_sha256=weights.sha256)

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook; codes are below it."""
        return int(self._network.config.codebook_size)

    @property
    def codes_per_side(self) -> int:
        """Codes along one side of an image."""
        return int(self.config.image_size_px // self._network.config.patch_px)

    @property
    def codes_per_image(self) -> int:
        """Codes of one image."""
        return self.codes_per_side**2

    def encode(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Return the codes of images in raster order, (N, T) int32.

        Args:
            images_NHWC: uint8 RGB, (N, image_size_px, image_size_px, 3), any N.

        Raises:
            ValueError: another dtype or shape.
        """
        side = self.config.image_size_px
        if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != (side, side, 3):
            raise ValueError(
                f"encoding images: they must be uint8 of shape (N, {side}, {side}, 3), got {images_NHWC.dtype} "
                f"{images_NHWC.shape}; crop them with tokenization.crops.make_views"
            )
        codes_NT = np.empty((len(images_NHWC), self.codes_per_image), dtype=np.int32)
        for begin in range(0, len(images_NHWC), self.config.batch_size):
            batch_NHWC = images_NHWC[begin : begin + self.config.batch_size]
            codes_BT = self._encode_batch(to_network_range(self._pad(batch_NHWC), device=self._device))
            codes_NT[begin : begin + len(batch_NHWC)] = codes_BT[: len(batch_NHWC)].cpu().numpy()
        return codes_NT

    def decode(self, codes_NT: np.ndarray) -> np.ndarray:
        """Return the images of codes, (N, image_size_px, image_size_px, 3) uint8 RGB.

        Args:
            codes_NT: any integer dtype, (N, codes_per_image), 0 <= code < codebook_size, any N.

        Raises:
            ValueError: another shape, or a code outside the codebook.
        """
        self._check_codes(codes_NT)
        side, codes_per_side = self.config.image_size_px, self.codes_per_side
        images_NHWC = np.empty((len(codes_NT), side, side, 3), dtype=np.uint8)
        for begin in range(0, len(codes_NT), self.config.batch_size):
            batch_NT = codes_NT[begin : begin + self.config.batch_size].astype(np.int64)
            codes_BHW = torch.from_numpy(self._pad(batch_NT)).view(-1, codes_per_side, codes_per_side)
            pixels_BCHW = self._decode_batch(codes_BHW.to(self._device))
            pixels_BHWC = pixels_BCHW[: len(batch_NT)].permute(0, 2, 3, 1).cpu().numpy()
            images_NHWC[begin : begin + len(batch_NT)] = pixels_BHWC
        return images_NHWC

    def _check_codes(self, codes_NT: np.ndarray) -> None:
        if codes_NT.ndim != 2 or codes_NT.shape[1] != self.codes_per_image or codes_NT.dtype.kind not in "iu":
            raise ValueError(
                f"decoding codes: they must be integers of shape (N, {self.codes_per_image}), got {codes_NT.dtype} "
                f"{codes_NT.shape}; reshape views to one image each"
            )
        if codes_NT.size and not 0 <= codes_NT.min() <= codes_NT.max() < self.codebook_size:
            raise ValueError(
                f"decoding codes: each must be in 0..{self.codebook_size - 1}, got {codes_NT.min()}..{codes_NT.max()}; "
                "decode with the tokenizer that made the codes"
            )

    def _pad(self, batch: np.ndarray) -> np.ndarray:
        missing = self.config.batch_size - len(batch)
        return np.pad(batch, [(0, missing)] + [(0, 0)] * (batch.ndim - 1))

    @torch.inference_mode()
    def _encode_batch(self, images_BCHW: Tensor) -> Tensor:
        use_bfloat16 = self.config.dtype == "bfloat16"
        # TF32 and autotuned kernels would change codes from one GPU, or one run, to the next.
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=use_bfloat16),
        ):
            return self._encode(images_BCHW)

    @torch.inference_mode()
    def _decode_batch(self, codes_BHW: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return to_pixels(self._network.decode(codes_BHW))
