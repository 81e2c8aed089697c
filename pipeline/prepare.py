"""A sample as it was read -> one that is ready to encode, or the reason why it is not; pure, called in many threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import RulesConfig, TokenizeConfig
from pipeline.rejects import RULE_STAGE, Reject
from pipeline.sources.sample import InputSample
from tokenization.crops import make_views
from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSample:
    """A sample ready to encode: its views as uint8 `(V, H, W, 3)` and the metadata that its shard will hold."""

    key: str
    images_VHWC: npt.NDArray[np.uint8]
    metadata: dict[str, Any]


def prepare_sample(
    sample: InputSample, *, key: str, config: TokenizeConfig, max_image_pixels: int
) -> PreparedSample | Reject:
    """Decode, check and crop one sample.

    Args:
        sample: as it was read.
        key: its key in the set.
        config: the job; its rules, views and image size are used.
        max_image_pixels: larger images are rejected before they are decoded.

    Returns:
        The sample ready to encode, or why it is dropped (stage `rule`) or rejected.
    """
    if sample.problem is not None:
        problem = sample.problem
        return Reject(key=key, source=sample.source, stage=problem.stage, reason=problem.reason, detail=problem.detail)
    try:
        image = decode_image(sample.data, max_pixels=max_image_pixels)
        broken = broken_rule(image.width, image.height, rules=config.rules)
        if broken is not None:
            detail = f"{image.width} x {image.height} px"
            return Reject(key=key, source=sample.source, stage=RULE_STAGE, reason=broken, detail=detail)
        views = make_views(image, config=config.views, image_size_px=config.tokenizer.image_size_px)
    except ImageRejectedError as error:
        return Reject(key=key, source=sample.source, stage=error.stage, reason=error.reason, detail=str(error))
    metadata = {
        "caption": sample.caption,
        "label": sample.label,
        "width": image.width,
        "height": image.height,
        "source": sample.source,
        "views": list(views.boxes),
        "extra": sample.extra,
    }
    return PreparedSample(key=key, images_VHWC=views.images_VHWC, metadata=metadata)


def broken_rule(width_px: int, height_px: int, *, rules: RulesConfig) -> str | None:
    """Return the name of the first rule that an image of this size breaks, or None."""
    short, long = sorted((width_px, height_px))
    if short < rules.min_side_px:
        return "min_side_px"
    if rules.max_aspect_ratio is not None and long > rules.max_aspect_ratio * short:
        return "max_aspect_ratio"
    return None
