"""Why an image cannot be used: the one error of decoding and cropping, and the pixel limit that both rest on.

Every reason is a short word that a ledger can count; the detail names the rule and the value. Nothing is decoded
before `check_num_pixels` has seen the width and height that the header promises.
"""

from __future__ import annotations

from typing import Literal


class ImageRejectedError(ValueError):
    """An image that cannot be used; `stage` and `reason` go to the ledger, the message to a reader."""

    def __init__(self, *, stage: Literal["decode", "crop"], reason: str, detail: str) -> None:
        super().__init__(f"{'decoding' if stage == 'decode' else 'cropping'} image: {detail}")
        self.stage = stage
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and Ray pickles errors.
        return _rebuild_error, (self.stage, self.reason, self.detail)


def _rebuild_error(stage: Literal["decode", "crop"], reason: str, detail: str) -> ImageRejectedError:
    return ImageRejectedError(stage=stage, reason=reason, detail=detail)


def undecodable(reason: str, detail: str) -> ImageRejectedError:
    """Return the error of stage `decode`, to be raised."""
    return ImageRejectedError(stage="decode", reason=reason, detail=detail)


def check_num_pixels(width_px: int, height_px: int, *, max_pixels: int) -> None:
    """Raise `ImageRejectedError` with reason `too_many_pixels` when an image of this size must not be decoded."""
    if width_px * height_px > max_pixels:
        raise undecodable(
            "too_many_pixels", f"width * height must be at most {max_pixels}, got {width_px} * {height_px}"
        )
