"""What a tokenizer, a view and a `fit_tokenizer` job are, as validated values.

Light: imports no torch, so that `tensorar validate` answers at once. `Config` is the base of every config of the
project: frozen, and an unknown field is an error.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

MIN_FIT_SIZE_PX = 8
"""The loss of a fit halves images three times."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _check_place(value: str) -> str:
    if not value.strip():
        raise ValueError(f"a path or URL must be given, got {value!r}; name one")
    if "$" in value:
        raise ValueError(f"environment variables are not expanded, got {value!r}; write the path out")
    scheme, colon, rest = value.partition(":/")
    if colon and scheme.isalnum() and not rest.startswith("/"):
        raise ValueError(f"a URL must have two slashes after its scheme, got {value!r}; write {scheme}://{rest}")
    return value


def _check_local(value: str) -> str:
    if "://" in value:
        raise ValueError(f"it must be local or mounted, got {value!r}; use a directory path")
    return value


Place = Annotated[str, AfterValidator(_check_place)]
"""A path, or a URL where its field takes one."""
LocalPlace = Annotated[Place, AfterValidator(_check_local)]
"""A path alone."""


class Config(BaseModel):
    """Base of every config: frozen, unknown fields and infinite numbers are errors, attribute docstrings are the field
    descriptions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class VQConfig(Config):
    """Shape of a LlamaGen-style VQ network; the defaults are LlamaGen's VQ-16."""

    codebook_size: PositiveInt = 16384
    """Entries of the codebook."""
    code_dim: PositiveInt = 8
    """Dimensions of one codebook entry."""
    channels: PositiveInt = 128
    """Channels at the highest resolution; a multiple of num_norm_groups."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    """Channels of each level over `channels`, highest resolution first; each level after the first halves the side."""
    num_res_blocks: PositiveInt = 2
    """Residual blocks per encoder level; the decoder has one more."""
    num_norm_groups: PositiveInt = 32
    """Groups of every GroupNorm. With one channel per group, an image's colours are normalised away: keep four."""
    z_channels: PositiveInt = 256
    """Channels between encoder and quantiser."""
    stem_patch_px: PositiveInt = 1
    """Side in px of the space-to-depth patch before the encoder and after the decoder; 1 is LlamaGen's (none)."""

    @property
    def patch_px(self) -> int:
        """Side in px of the image patch behind one code."""
        return int(self.stem_patch_px * 2 ** (len(self.channel_multipliers) - 1))

    @model_validator(mode="after")
    def _check_channels(self) -> VQConfig:
        if self.channels % self.num_norm_groups:
            raise ValueError(
                f"channels must be a multiple of num_norm_groups {self.num_norm_groups}, got {self.channels}"
            )
        return self


VQ16 = VQConfig()
VQ8 = VQConfig(channel_multipliers=(1, 2, 2, 4))
NETWORKS: dict[str, VQConfig] = {"vq16": VQ16, "vq8": VQ8}
"""The named networks a spec may ask for where a weights file does not carry its own shape."""


class ViewsConfig(Config):
    """Which crops of an image get codes of their own."""

    kind: Literal["center", "flip", "ten_crop"] = "center"
    """`center` (1 view), `flip` (the centre crop and its mirror, 2) or `ten_crop` (5 crops and their mirrors, 10)."""
    crop_range: Annotated[float, Field(ge=1.0, le=2.0)] = 1.1
    """`ten_crop` only: side of the centre crop that the ten are taken from, over the image side."""

    @property
    def num_views(self) -> int:
        """Views per image."""
        return {"center": 1, "flip": 2, "ten_crop": 10}[self.kind]


class TokenizerConfig(Config):
    """A tokenizer and the exact way it is run; all of it enters the fingerprint."""

    weights: str
    """A shipped name (`open-emoji-64`), our `.safetensors`, or LlamaGen's `.pt`."""
    network: Literal["vq16", "vq8"] | None = None
    """Shape of the network; required for `.pt` files, read from the file's metadata for ours."""
    image_size_px: PositiveInt = 256
    """Side in px of the square image that is encoded."""
    batch_size: PositiveInt = 32
    """Images per encode call; short batches are padded to it, so that codes do not depend on neighbours."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the encoder; bfloat16 changes about 6 % of the codes."""
    compile_mode: Literal["none", "default", "max-autotune"] = "none"
    """torch.compile of the encoder: half a minute at the first start, faster from then on; codes may differ."""


class FitTokenizerConfig(Config):
    """`kind: fit_tokenizer`: train a small VQ tokenizer on a folder of images."""

    kind: Literal["fit_tokenizer"]
    run_dir: LocalPlace
    """Directory of this run: checkpoints, metrics and the final weights."""
    images: LocalPlace
    """Folder of training images, searched recursively (a class-per-folder tree works)."""
    validation_images: LocalPlace
    """Folder of held-out images, searched recursively."""
    image_size_px: PositiveInt = 64
    """Side in px that images are cropped to."""
    network: VQConfig = VQConfig(
        codebook_size=512,
        channels=32,
        channel_multipliers=(1, 2, 4),
        num_res_blocks=1,
        num_norm_groups=8,
        z_channels=32,
        stem_patch_px=2,
    )
    """Shape of the network."""
    num_steps: PositiveInt = 6000
    """Optimiser steps, the plain-autoencoder ones included."""
    autoencoder_steps: NonNegativeInt = 400
    """First steps without the quantiser; its codebook is then initialised by k-means."""
    batch_size: PositiveInt = 32
    """Images per step."""
    learning_rate: PositiveFloat = 1e-3
    """Peak of the cosine schedule (AdamW)."""
    commitment_weight: PositiveFloat = 0.25
    """Weight of the commitment term of the VQ loss."""
    gradient_weight: NonNegativeFloat = 1.0
    """Weight of the absolute error of image gradients (sharp edges) beside that of pixels, which is 1."""
    squared_weight: NonNegativeFloat = 0.0
    """Weight of the squared error of pixels, which punishes a wrong colour most and is what PSNR measures."""
    warm_start: Place | None = None
    """Tokenizer weights to begin from, of the same network; then there is no plain-autoencoder phase."""
    ema_decay: Fraction = 0.999
    """Decay of the weight average that is saved."""
    checkpoint_every_n_steps: PositiveInt = 500
    """Steps between checkpoints; a rerun goes on from the newest."""
    seed: NonNegativeInt = 0
    """Seed of initialisation and batches."""

    @model_validator(mode="after")
    def _check_phases(self) -> FitTokenizerConfig:
        if self.warm_start is not None and self.autoencoder_steps:
            raise ValueError(f"autoencoder_steps must be 0 with warm_start, got {self.autoencoder_steps}")
        if self.autoencoder_steps >= self.num_steps:
            raise ValueError(
                f"autoencoder_steps must be below num_steps {self.num_steps}, got {self.autoencoder_steps}; the "
                "codebook is fitted in the steps that are left"
            )
        return self

    @model_validator(mode="after")
    def _check_image_size(self) -> FitTokenizerConfig:
        patch_px = self.network.patch_px
        smallest = math.ceil(MIN_FIT_SIZE_PX / patch_px) * patch_px
        if self.image_size_px % patch_px or self.image_size_px < smallest:
            below = max(smallest, self.image_size_px // patch_px * patch_px)
            raise ValueError(
                f"image_size_px must be a multiple of the network's patch {patch_px}, {smallest} at least, got "
                f"{self.image_size_px}; use {below} or {below + patch_px}"
            )
        return self
