"""The real images of an evaluation: which ones of a corpus, in which half, and their pixels.

Invariant: the choice depends on the images' names and the numbers of their work units alone (so on the order of tars),
and the half on the group alone: not on the seed or the machine, so that every job over a corpus is measured on the same
images. One pass over a corpus; the bytes of the chosen ones are held, the pixels of a batch at a time.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import S3Config, SourceConfig
from pipeline.sources.registry import make_source
from pipeline.sources.sample import InputSample
from pipeline.storage import ArtifactError
from tokenization.config import ViewsConfig
from tokenization.crops import make_views
from tokenization.decoding import decode_image
from tokenization.image_rejection import ImageRejectedError
from training.evaluation.config import ReferenceConfig
from training.evaluation.grouping import before, group_in

logger = logging.getLogger(__name__)

NO_LABEL = -1
MAX_IMAGE_PIXELS = 100_000_000
"""Images with more are rejected before they are decoded, as in a tokenize job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RealImage:
    """One image that was chosen, not decoded yet."""

    name: str
    """Work unit and the input's own name."""
    group: str
    """What it belongs to: its concept, or itself alone."""
    label: int
    """`NO_LABEL` where it has none."""
    caption: str
    """Empty where it has none."""
    in_report_half: bool
    """Whether it is reported against; the others are tuned by."""
    data: bytes
    """Its file."""


def choose_images(config: ReferenceConfig, *, s3: S3Config) -> list[RealImage]:
    """Return the images of a reference, of each corpus those whose names hash lowest, in that order.

    Images that cannot be read are left out, and logged.

    Raises:
        ArtifactError: a corpus is missing or damaged, has no images, or shares a group with the other.
    """
    if config.report_source is None:
        return _choose("source", config.source, config=config, s3=s3)
    tuning = _choose("source", config.source, config=config, s3=s3, in_report_half=False)
    report = _choose("report_source", config.report_source, config=config, s3=s3, in_report_half=True)
    shared = {image.group for image in tuning} & {image.group for image in report}
    if config.group_field is not None and shared:
        raise ArtifactError(
            f"evaluate: no group of reference.report_source may be in reference.source, got {min(shared)!r} and "
            f"{len(shared) - 1} more in both; take them out of one, or leave report_source out"
        )
    return tuning + report


def _choose(
    name: str, of: SourceConfig, *, config: ReferenceConfig, s3: S3Config, in_report_half: bool | None = None
) -> list[RealImage]:
    """Return the images of one corpus, all in one half, or each in that of its group."""
    source = make_source(of, s3=s3)
    chosen: list[tuple[int, str, RealImage]] = []  # a heap whose first has the highest hash
    for unit in source.plan().units:
        for sample in source.read(unit):
            image_name = f"{unit.unit_index}/{sample.source}"
            if sample.problem is not None:
                logger.warning("evaluate image=%s rejected reason=%s", image_name, sample.problem.reason)
                continue
            place = -_hash(f"image {image_name}")
            if len(chosen) == config.num_images and place <= chosen[0][0]:
                continue
            image = _taken(sample, name=image_name, group=_group_of(sample, config=config), half=in_report_half)
            heapq.heappush(chosen, (place, image_name, image))
            if len(chosen) > config.num_images:
                heapq.heappop(chosen)
    if not chosen:
        raise ArtifactError(f"evaluate: reference.{name} must hold images, got none; check its paths")
    return [image for _, _, image in sorted(chosen, key=lambda entry: (-entry[0], entry[1]))]


def _taken(sample: InputSample, *, name: str, group: str, half: bool | None) -> RealImage:
    return RealImage(
        name=name,
        group=group,
        label=NO_LABEL if sample.label is None else sample.label,
        caption=(sample.caption or "").strip(),
        in_report_half=is_in_report_half(group) if half is None else half,
        data=sample.data,
    )


def is_in_report_half(group: str) -> bool:
    """Return the half that a group of images is in: a bit of its hash."""
    return _hash(f"half {group}") & 1 == 1


def _group_of(sample: InputSample, *, config: ReferenceConfig) -> str:
    group = sample.source
    if config.group_field is not None:
        group = group_in(sample.extra, config.group_field, of=f"reference.group_field, sample {sample.source}")
    return before(config.group_separator, group)


def digest_of_images(images: Sequence[RealImage]) -> str:
    """Return the hex sha256 of the names, halves, labels, captions and bytes of images."""
    digest = hashlib.sha256()
    for image in images:
        head = (image.name, image.label, image.caption, image.in_report_half, len(image.data))
        digest.update(ascii(head).encode())
        digest.update(image.data)
    return digest.hexdigest()


def crop_images(
    images: Sequence[RealImage], *, image_size_px: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the pixels of images, (N, size, size, 3) uint8, cropped as the tokenizer's, and their places in `images`.

    Images that cannot be decoded are left out, and logged with their reason.
    """
    pixels, places = [np.empty((0, image_size_px, image_size_px, 3), dtype=np.uint8)], []
    for place, image in enumerate(images):
        try:
            decoded = decode_image(image.data, max_pixels=MAX_IMAGE_PIXELS)
            pixels.append(make_views(decoded, config=ViewsConfig(), image_size_px=image_size_px).images_VHWC)
        except ImageRejectedError as error:
            logger.warning("evaluate image=%s rejected reason=%s", image.name, error.reason)
            continue
        places.append(place)
    return np.concatenate(pixels), np.array(places, dtype=np.int64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
