"""Pictures for HTML pages: data URIs of small images, enlarged so that a pixel stays a square."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.ledger import read_manifest
from pipeline.preview import png_data_uri
from pipeline.set_tokenizer import load_set_tokenizer
from pipeline.shards import read_shard
from pipeline.storage import ArtifactError, open_storage
from tokenization.reconstruction import psnr_of_images

Images = npt.NDArray[np.uint8]

ENLARGEMENT = 3


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A held-out image beside what its codes decode to."""

    source: str
    caption: str
    class_name: str
    original_HWC: Images
    decoded_HWC: Images

    @property
    def psnr_db(self) -> float:
        """Peak signal-to-noise ratio in dB; higher is better, 78 for equal images."""
        return float(psnr_of_images(self.decoded_HWC[np.newaxis], self.original_HWC[np.newaxis])[0])


def data_uri(image_HWC: Images) -> str:
    """`data:` URI of an image as PNG, `ENLARGEMENT` times its size.

    Args:
        image_HWC: RGB, uint8.
    """
    return png_data_uri(image_HWC.repeat(ENLARGEMENT, axis=0).repeat(ENLARGEMENT, axis=1))


def held_out_pairs(shard_dir: Path, *, images_dir: Path) -> list[Pair]:
    """Every sample of a shard set of one view, beside its original.

    Args:
        shard_dir: The run_dir of a tokenize job.
        images_dir: A class-per-folder tree with the originals, named by the sample's `source`.

    Raises:
        ArtifactError: the shard set or an original is missing, or the tokenizer has changed since.
    """
    storage = open_storage(str(shard_dir))
    manifest = read_manifest(storage)
    tokenizer = load_set_tokenizer(manifest, manifest.tokenizer, doing=f"decode {shard_dir}")
    samples = [sample for shard in manifest.shards for sample in read_shard(storage, f"shards/{shard.name}")]
    decoded_NHWC = tokenizer.decode(np.stack([sample.codes_VT[0] for sample in samples]).astype(np.int32))
    return [
        _pair(sample.metadata, decoded_HWC, images_dir=images_dir)
        for sample, decoded_HWC in zip(samples, decoded_NHWC, strict=True)
    ]


def _pair(metadata: dict[str, Any], decoded_HWC: Images, *, images_dir: Path) -> Pair:
    source, class_name = str(metadata["source"]), str(metadata["extra"]["class"])
    path = images_dir / class_name / f"{source}.png"
    if not path.is_file():
        raise ArtifactError(f"compare {source}: its original must be at {path}; fetch the corpus again: tensorar demo")
    original = np.asarray(Image.open(path).convert("RGB"))
    return Pair(
        source=source,
        caption=str(metadata["caption"] or source),
        class_name=class_name,
        original_HWC=original,
        decoded_HWC=decoded_HWC,
    )
