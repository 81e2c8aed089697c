"""The fingerprint of a tokenizer: everything that determines the codes of an image, and a short digest of it.

Light: imports no torch. Two tokenizers with equal digests give equal codes for equal image bytes (on one kind of
device); shards, models and samples carry it so that codes of different tokenizers never meet.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import PositiveInt

from tokenization.config import Config, VQConfig

PREPROCESSING: Literal["adm_bicubic_v1"] = "adm_bicubic_v1"
CODE_VERSION = 1
"""Raised when the encoder's arithmetic changes so that codes may change."""


class Fingerprint(Config):
    """All that determines the codes of an image."""

    weights_sha256: str
    """SHA-256 over the names, shapes and float32 values of all weights; the same for every file format."""
    network: VQConfig
    """Shape of the network."""
    image_size_px: PositiveInt
    """Side in px of the image that is encoded."""
    batch_size: PositiveInt
    """Images per encode call, padding included."""
    dtype: Literal["float32", "bfloat16"]
    """Arithmetic of the encoder."""
    compile_mode: Literal["none", "default", "max-autotune"] = "none"
    """How the encoder is compiled, which decides how it rounds."""
    preprocessing: Literal["adm_bicubic_v1"] = PREPROCESSING
    """How bytes become pixels: RGB on white, EXIF applied, ADM's halving and bicubic centre crop."""
    code_version: PositiveInt = CODE_VERSION
    """Version of the encoding code."""

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON of all fields."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
