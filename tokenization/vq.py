"""LlamaGen's VQ network: images to codes and back, equal to its VQ-16 / VQ-8 to the state-dict key.

Modules are created in LlamaGen's order and under its names, so its files load with `strict=True`; `VQConfig` also gives
smaller networks. Both the encoder's output and the codebook are normalised where they are used, never where they are
stored. With `stem_patch_px` above 1 the network works on space-to-depth patches: half the side, a fraction of the time.

Legend: B batch, C channels, H height, W width, T codes per image (raster order), D code_dim, N vectors,
V codebook_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenization.config import VQConfig

NORM_EPS = 1e-6
CODE_HISTORY_LENGTH = 65536
ENTROPY_TEMPERATURE = 0.01
LOG_EPS = 1e-5


@dataclass(frozen=True)
class Quantized:
    """What the quantiser makes of encoder outputs: the nearest entries, their positions and the training losses."""

    quantized_BDHW: Tensor
    """Nearest unit-length entries, float32; the gradient passes straight through to the normalised input."""
    codes_BHW: Tensor
    """Position of each entry in the codebook, int64."""
    codebook_loss: Tensor
    """Mean squared distance that pulls the entries to the encoder's outputs, float32 scalar."""
    commitment_loss: Tensor
    """Mean squared distance that pulls the encoder's outputs to their entries, weighted, float32 scalar."""
    entropy_loss: Tensor
    """Entropy of each assignment less the entropy of their mean, weighted, float32 scalar; 0 under weight 0."""


@dataclass(frozen=True)
class VQOutput:
    """One training pass: the reconstruction and what the quantiser did on the way."""

    reconstruction_BCHW: Tensor
    """In the range of the input, about -1..1."""
    quantized: Quantized


def _norm(channels: int, *, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """Norm, swish, 3x3 convolution, twice, beside a shortcut (1x1 where the channels change)."""

    def __init__(self, in_channels: int, out_channels: int, *, num_norm_groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, num_groups=num_norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, num_groups=num_norm_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the input's shortcut plus its residual; (B, out_channels, H, W)."""
        residual_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        residual_BCHW = self.conv2(F.silu(self.norm2(residual_BCHW)))
        shortcut_BCHW = self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW
        output_BCHW: Tensor = shortcut_BCHW + residual_BCHW
        return output_BCHW


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual."""

    def __init__(self, channels: int, *, num_norm_groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, num_groups=num_norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map plus what its positions read from one another; the input's shape."""
        normed_BCHW = self.norm(x_BCHW)
        q_BTC, k_BTC, v_BTC = (conv(normed_BCHW).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        weights_BTT = torch.softmax(q_BTC @ k_BTC.transpose(1, 2) * q_BTC.shape[-1] ** -0.5, dim=-1)
        read_BCHW = (weights_BTT @ v_BTC).transpose(1, 2).reshape(x_BCHW.shape)
        output_BCHW: Tensor = x_BCHW + self.proj_out(read_BCHW)
        return output_BCHW


class Downsample(nn.Module):
    """Halve both sides: one column and row of zeros at the right and bottom, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map at half the height and width."""
        downsampled: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return downsampled


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map at twice the height and width."""
        upsampled: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return upsampled


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest one, then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_res_blocks: int,
        num_norm_groups: int,
        with_attention: bool,
        resample: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        block_inputs = [in_channels] + [out_channels] * (num_res_blocks - 1)
        self.res = nn.ModuleList(
            ResBlock(channels, out_channels, num_norm_groups=num_norm_groups) for channels in block_inputs
        )
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, num_norm_groups=num_norm_groups)
            for _ in range(num_res_blocks if with_attention else 0)
        )
        if resample == "down":
            self.downsample = Downsample(out_channels)
        elif resample == "up":
            self.upsample = Upsample(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map after this level, (B, out_channels, H', W')."""
        for position, res in enumerate(self.res):
            x_BCHW = res(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[position](x_BCHW)
        if hasattr(self, "downsample"):
            x_BCHW = self.downsample(x_BCHW)
        elif hasattr(self, "upsample"):
            x_BCHW = self.upsample(x_BCHW)
        return x_BCHW


def _middle(channels: int, *, num_norm_groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResBlock(channels, channels, num_norm_groups=num_norm_groups),
            AttnBlock(channels, num_norm_groups=num_norm_groups),
            ResBlock(channels, channels, num_norm_groups=num_norm_groups),
        ]
    )


class Encoder(nn.Module):
    """Images to feature maps of one vector per code."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.stem_patch_px = config.stem_patch_px
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3 * config.stem_patch_px**2, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                in_channels,
                out_channels,
                num_res_blocks=config.num_res_blocks,
                num_norm_groups=config.num_norm_groups,
                with_attention=level == len(widths) - 1,
                resample="down" if level < len(widths) - 1 else None,
            )
            for level, (in_channels, out_channels) in enumerate(zip([config.channels, *widths], widths, strict=False))
        )
        self.mid = _middle(widths[-1], num_norm_groups=config.num_norm_groups)
        self.norm_out = _norm(widths[-1], num_groups=config.num_norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return (B, z_channels, H / patch, W / patch) for images in -1..1 whose sides are multiples of the patch."""
        x_BCHW = self.conv_in(F.pixel_unshuffle(images_BCHW, self.stem_patch_px))
        for block in [*self.conv_blocks, *self.mid]:
            x_BCHW = block(x_BCHW)
        features: Tensor = self.conv_out(F.silu(self.norm_out(x_BCHW)))
        return features


class Decoder(nn.Module):
    """Feature maps back to images; its first level is the lowest resolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.stem_patch_px = config.stem_patch_px
        widths = [config.channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], num_norm_groups=config.num_norm_groups)
        self.conv_blocks = nn.ModuleList(
            Level(
                in_channels,
                out_channels,
                num_res_blocks=config.num_res_blocks + 1,
                num_norm_groups=config.num_norm_groups,
                with_attention=level == 0,
                resample="up" if level < len(widths) - 1 else None,
            )
            for level, (in_channels, out_channels) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = _norm(widths[-1], num_groups=config.num_norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.stem_patch_px**2, 3, padding=1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return images, about -1..1, of patch_px times the map's sides."""
        x_BCHW = self.conv_in(features_BCHW)
        for block in [*self.mid, *self.conv_blocks]:
            x_BCHW = block(x_BCHW)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x_BCHW))), self.stem_patch_px)


class Quantizer(nn.Module):
    """The codebook: nearest entry by angle, since vectors and entries are normalised at use."""

    codebook_used: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / config.codebook_size, 1.0 / config.codebook_size)
        self.register_buffer("codebook_used", torch.zeros(CODE_HISTORY_LENGTH))

    def entries(self) -> Tensor:
        """Return the unit-length codebook, (V, D) float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def distances(self, z_ND: Tensor) -> Tensor:
        """Return squared distances of unit vectors to all entries, (N, V)."""
        entries_VD = self.entries()
        return z_ND.square().sum(1, keepdim=True) + entries_VD.square().sum(1) - 2 * z_ND @ entries_VD.T

    def forward(self, z_BDHW: Tensor, *, commitment_weight: float = 0.25, entropy_weight: float = 0.0) -> Quantized:
        """Return the nearest entries of a map of vectors with the losses; runs in float32 whatever the autocast.

        Args:
            z_BDHW: encoder outputs after `quant_conv`, any length, floating.
            commitment_weight: weight of the commitment loss, >= 0.
            entropy_weight: weight of the entropy loss, >= 0.
        """
        with torch.autocast(z_BDHW.device.type, enabled=False):
            z_BHWD = F.normalize(z_BDHW.float().permute(0, 2, 3, 1), dim=-1)
            distances_NV = self.distances(z_BHWD.flatten(0, 2))
            codes_BHW = distances_NV.argmin(dim=1).view(z_BHWD.shape[:3])
            nearest_BHWD = F.normalize(self.embedding(codes_BHW).float(), dim=-1)
            entropy_loss = z_BHWD.new_zeros(())
            if entropy_weight:
                entropy_loss = entropy_weight * assignment_entropy_gap(distances_NV)
            return Quantized(
                quantized_BDHW=(z_BHWD + (nearest_BHWD - z_BHWD).detach()).permute(0, 3, 1, 2).contiguous(),
                codes_BHW=codes_BHW,
                codebook_loss=(nearest_BHWD - z_BHWD.detach()).square().mean(),
                commitment_loss=commitment_weight * (nearest_BHWD.detach() - z_BHWD).square().mean(),
                entropy_loss=entropy_loss,
            )

    @torch.no_grad()
    def remember(self, codes: Tensor) -> None:
        """Append codes to the history of the last 65,536 that `used_codes` reads (LlamaGen's `codebook_used`)."""
        recent = codes.flatten()[-CODE_HISTORY_LENGTH:].to(self.codebook_used.dtype)
        self.codebook_used.copy_(torch.cat([self.codebook_used[len(recent) :], recent]))

    def used_codes(self) -> Tensor:
        """Return the distinct codes in the history, ascending int64; code 0 is in it until the history is full."""
        used: Tensor = torch.unique(self.codebook_used)
        return used.long()


def assignment_entropy_gap(distances_NV: Tensor) -> Tensor:
    """Return the mean entropy of soft assignments less the entropy of their mean, as LlamaGen computes it.

    Args:
        distances_NV: squared distances to the codebook.

    Returns:
        Scalar; low when each vector is sure of its entry and all entries are used alike.
    """
    logits_NV = -distances_NV / ENTROPY_TEMPERATURE
    probs_NV = logits_NV.softmax(dim=-1)
    sample_entropy = -(probs_NV * (logits_NV + LOG_EPS).log_softmax(dim=-1)).sum(dim=-1).mean()
    mean_probs_V = probs_NV.mean(dim=0)
    return sample_entropy + (mean_probs_V * (mean_probs_V + LOG_EPS).log()).sum()


class VQNetwork(nn.Module):
    """The whole network; its state dict has LlamaGen's keys, shapes and order."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    def pre_quantize(self, images_BCHW: Tensor) -> Tensor:
        """Return the encoder's vectors before normalisation, (B, D, H / patch, W / patch)."""
        vectors: Tensor = self.quant_conv(self.encoder(images_BCHW))
        return vectors

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return the codes of images in -1..1, (B, T) int64 in raster order."""
        quantized: Quantized = self.quantize(self.pre_quantize(images_BCHW))
        return quantized.codes_BHW.flatten(1)

    def decode_vectors(self, vectors_BDHW: Tensor) -> Tensor:
        """Return the images, about -1..1, of a map of unit vectors."""
        images: Tensor = self.decoder(self.post_quant_conv(vectors_BDHW))
        return images

    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Return the images, about -1..1, of maps of codes (any integer dtype)."""
        vectors_BHWD = F.embedding(codes_BHW.long(), self.quantize.entries())
        return self.decode_vectors(vectors_BHWD.permute(0, 3, 1, 2).contiguous())

    def forward(self, images_BCHW: Tensor, *, commitment_weight: float = 0.25, entropy_weight: float = 0.0) -> VQOutput:
        """Return the reconstruction of images in -1..1 and the quantiser's losses."""
        quantized: Quantized = self.quantize(
            self.pre_quantize(images_BCHW), commitment_weight=commitment_weight, entropy_weight=entropy_weight
        )
        return VQOutput(self.decode_vectors(quantized.quantized_BDHW), quantized)
