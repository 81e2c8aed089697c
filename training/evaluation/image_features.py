"""Features of the images that do not depend on the model: real ones, their reconstructions, and the training set's.

Invariant: a batch of features is committed once it is made; a cache, where there is one, is keyed by the images' own
pixels and the network's fingerprint, so it can never hold another image's features, whoever wrote it. Pixels exist for
a batch at a time.

N images, F features.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import S3Config
from pipeline.philox import Int64Array
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.tokenizer import Tokenizer
from training.evaluation.config import MIN_HALF, ReferenceConfig, TrainingSetConfig
from training.evaluation.features import Features
from training.evaluation.held_out import spread_indices
from training.evaluation.real_images import RealImage, choose_images, crop_images, digest_of_images
from training.evaluation.stages import Arrays, Stages, joined

logger = logging.getLogger(__name__)

FloatFeatures = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]

BATCH = 256
"""Images whose features are committed together."""


class FeatureReader:
    """Features of images, read from a cache where they are in it."""

    def __init__(self, features: Features, *, cache_dir: str | None) -> None:
        """Keep the network; `cache_dir` is made when something is first put there."""
        self.features = features
        self._cache: Storage | None = None if cache_dir is None else open_storage(cache_dir)

    def extract(self, images_NHWC: Images) -> FloatFeatures:
        """Return (N, F) features of uint8 images (N, H, W, 3); ArtifactError where the cache's are damaged."""
        if self._cache is None:
            return self.features.extract(images_NHWC)
        digest = hashlib.sha256(f"{self.features.fingerprint} {images_NHWC.shape}".encode())
        digest.update(np.ascontiguousarray(images_NHWC).data)
        key = digest.hexdigest()
        name = f"{key[:2]}/{key}.npy"
        if self._cache.find(name) is None:
            buffer = io.BytesIO()
            np.save(buffer, self.features.extract(images_NHWC))
            self._cache.write_bytes(name, buffer.getvalue())
        try:
            cached: FloatFeatures = np.load(io.BytesIO(self._cache.read_bytes(name)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ArtifactError(
                f"read {self._cache.url_of(name)}: it must be a whole array of features, got {error!r:.100}; remove it "
                "and run the job again, which makes it anew"
            ) from error
        return cached


@dataclass(frozen=True, kw_only=True)
class Half:
    """One half of the reference."""

    labels_N: Int64Array
    """-1 where an image has none."""
    captions_N: npt.NDArray[np.str_]
    """Empty where an image has none."""
    real_NF: FloatFeatures
    """Of the images."""
    decoded_NF: FloatFeatures
    """Of what their codes decode to."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The real images, as features."""

    tuning: Half
    report: Half
    num_rejected: int
    """Chosen images that could not be decoded."""
    is_one_corpus: bool = True
    """Whether both halves are of one corpus."""

    def labels_for(self, half: Half) -> Int64Array:
        """Return the labels, sorted, of the images of the corpus that `half` is of; without images that have none."""
        halves = [self.tuning, self.report] if self.is_one_corpus else [half]
        labels = np.sort(np.concatenate([half.labels_N for half in halves]))
        return labels[labels >= 0]


def reference_features(
    stages: Stages, config: ReferenceConfig, *, tokenizer: Tokenizer, reader: FeatureReader, s3: S3Config
) -> Reference:
    """Return the features of the reference; what is committed already is not made again.

    Raises:
        ArtifactError: the corpus is missing, has changed since the job began, or gives a half with too few images.
    """
    chosen = _Chosen(config, s3=s3)
    summary = stages.json("reference", chosen.summary)

    def make(batch: slice) -> Arrays:
        images = chosen.images_of(summary)[batch]
        pixels_NHWC, places = crop_images(images, image_size_px=tokenizer.config.image_size_px)
        decoded_NHWC = tokenizer.decode(tokenizer.encode(pixels_NHWC))
        return {
            "labels": np.array([images[place].label for place in places], dtype=np.int64),
            "captions": np.array([images[place].caption for place in places], dtype=np.str_),
            "in_report_half": np.array([images[place].in_report_half for place in places], dtype=np.bool_),
            "real": reader.extract(pixels_NHWC),
            "decoded": reader.extract(decoded_NHWC),
        }

    num_images = int(summary["num_images"])
    arrays = joined(stages.batches("reference", num_samples=num_images, batch_size=BATCH, make=make))
    halves = [_half(arrays, in_report_half=in_report_half) for in_report_half in (False, True)]
    return Reference(
        tuning=halves[0],
        report=halves[1],
        num_rejected=num_images - len(arrays["labels"]),
        is_one_corpus=config.report_source is None,
    )


class _Chosen:
    """The chosen images, read when they are first asked for."""

    def __init__(self, config: ReferenceConfig, *, s3: S3Config) -> None:
        self._config, self._s3 = config, s3
        self._images: list[RealImage] | None = None

    def _read(self) -> list[RealImage]:
        if self._images is None:
            self._images = choose_images(self._config, s3=self._s3)
        return self._images

    def summary(self) -> dict[str, Any]:
        """What is kept of the choice."""
        images = self._read()
        return {"num_images": len(images), "sha256": digest_of_images(images)}

    def images_of(self, summary: dict[str, Any]) -> list[RealImage]:
        """The images; raises ArtifactError where they are not those that the job began with."""
        if self._images is None and digest_of_images(self._read()) != summary["sha256"]:
            raise ArtifactError(
                "evaluate: the images of the reference must be those that the job began with, but their names or "
                "bytes have changed; set another run_dir, or put the corpus back"
            )
        return self._read()


def _half(arrays: Arrays, *, in_report_half: bool) -> Half:
    chosen = arrays["in_report_half"] == in_report_half
    if chosen.sum() < MIN_HALF:
        raise ArtifactError(
            f"evaluate: each half of the reference must hold at least {MIN_HALF} images, got {int(chosen.sum())} of "
            f"{len(chosen)} in the {'report' if in_report_half else 'tuning'} half; name a larger corpus, raise "
            "reference.num_images, or set reference.group_field or group_separator so that there are more groups"
        )
    return Half(
        labels_N=arrays["labels"][chosen],
        captions_N=arrays["captions"][chosen],
        real_NF=arrays["real"][chosen],
        decoded_NF=arrays["decoded"][chosen],
    )


class TrainingImages:
    """What the codes of the training set decode to, by index: view by view of one sample after the other."""

    def __init__(self, config: TrainingSetConfig, *, tokenizer: Tokenizer, s3: S3Config) -> None:
        """Open the set.

        Raises:
            ArtifactError: there is none, or another tokenizer wrote it.
        """
        self.shard_set = ShardSet.open(config.shards, s3=s3)
        check_codes(self.shard_set, tokenizer=tokenizer)
        self._tokenizer = tokenizer
        self._sample_indices = spread_indices(
            config.num_samples or self.shard_set.num_samples, of=self.shard_set.num_samples
        )
        self.num_views = min(config.num_views, self.shard_set.num_views)
        """Views of each sample."""

    def __len__(self) -> int:
        """Images in all."""
        return len(self._sample_indices) * self.num_views

    def decode(self, image_indices: Int64Array) -> Images:
        """Return the images of some indices, (N, H, W, 3)."""
        codes_NT, _ = self.shard_set.read_batch(
            self._sample_indices[image_indices // self.num_views], views=image_indices % self.num_views
        )
        return self._tokenizer.decode(codes_NT)

    def features(self, stages: Stages, *, reader: FeatureReader) -> FloatFeatures:
        """Return the features of all images; what is committed already is not made again."""

        def make(batch: slice) -> Arrays:
            return {"features": reader.extract(self.decode(np.arange(batch.start, batch.stop, dtype=np.int64)))}

        batches = stages.batches("training_set", num_samples=len(self), batch_size=BATCH, make=make)
        features: FloatFeatures = joined(batches)["features"]
        return features


def check_codes(shard_set: ShardSet, *, tokenizer: Tokenizer) -> None:
    """Refuse a shard set that other weights than the tokenizer's wrote.

    Raises:
        ArtifactError: weights, network or image size differ.
    """
    for name in ("weights_sha256", "network", "image_size_px"):
        ours, theirs = getattr(tokenizer.fingerprint, name), getattr(shard_set.fingerprint, name)
        if ours != theirs:
            raise ArtifactError(
                f"evaluate with {shard_set.url}: tokenizer {name} must be that of the shards, {theirs}, got {ours}; "
                "set tokenizer to the one that they were made with"
            )
