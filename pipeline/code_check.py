"""Do the codes of a set come out again? Re-encodes a seeded sample of them from the corpus and counts the differences.

The invariant: the corpus is read by the spec that the set remembers, and encoded as the job does it. On the kind of
device that made the set no code differs; elsewhere rounding may turn a few. Cost: whole passes over the inputs of the
units that hold the sampled samples, so these are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipeline.config import S3Config, TokenizeConfig
from pipeline.ledger import read_manifest
from pipeline.prepare import prepare_sample
from pipeline.rejects import Reject
from pipeline.resume import with_begun_keys
from pipeline.retry import Pick, RetrySource, find_picks, max_image_pixels_of, with_retries
from pipeline.set_tokenizer import load_set_tokenizer
from pipeline.shards import open_shard
from pipeline.sources.plan import WorkUnit
from pipeline.sources.registry import make_source
from pipeline.sources.sample import InputSample
from pipeline.storage import ArtifactError, Storage
from tokenization.messages import reason_of

SPEC_NAME = "spec.json"
MAX_UNITS = 8


@dataclass(frozen=True, kw_only=True)
class CodeCheck:
    """What came of encoding samples again."""

    num_samples: int
    """Samples that were encoded again."""
    num_codes: int
    """Their codes, over all views."""
    num_differing: int
    """Codes that came out differently."""

    @property
    def differing_fraction(self) -> float:
        """Share of codes that came out differently."""
        return self.num_differing / self.num_codes


def check_codes(storage: Storage, *, s3: S3Config, num_samples: int = 64, seed: int = 0) -> CodeCheck:
    """Return how many codes of a seeded sample of a finished set come out differently when encoded again.

    Args:
        storage: the set.
        s3: how the corpus is reached, where it lies on S3.
        num_samples: samples to encode again, at most; taken from up to 8 shards.
        seed: of the choice.

    Raises:
        ArtifactError: the set is not finished, its corpus or tokenizer is not what it was, or a sample is gone.
    """
    manifest, config = read_manifest(storage), _read_config(storage)
    tokenizer = load_set_tokenizer(manifest, config.tokenizer, doing=f"check codes of {storage}")
    source = make_source(config.source, s3=s3)
    plan = with_retries(storage, with_begun_keys(storage, source.plan()))
    generator = np.random.default_rng(seed)
    num_shards = min(MAX_UNITS, len(manifest.shards), num_samples)
    num_differing = num_codes = num_checked = 0
    for shard_index in sorted(generator.choice(len(manifest.shards), num_shards, replace=False)):
        reader = open_shard(storage, f"shards/{manifest.shards[shard_index].name}")
        num_wanted = min(reader.num_samples, -(-num_samples // num_shards))
        positions = sorted(generator.choice(reader.num_samples, num_wanted, replace=False))
        stored = [reader.sample(int(position)) for position in positions]
        unit = plan.units[int(manifest.shards[shard_index].name.partition(".")[0])]
        picks = [Pick(plan.keys.split(sample.key)[1], sample.metadata["source"]) for sample in stored]
        samples = find_picks(RetrySource(source).read(unit), picks, unit_name=unit.name)
        images = [_prepare(sample, unit, config=config, where=str(storage)) for sample in samples]
        again = tokenizer.encode(np.concatenate(images))
        before = np.concatenate([sample.codes_VT for sample in stored])
        num_differing += int((again != before).sum())
        num_codes += before.size
        num_checked += len(stored)
    return CodeCheck(num_samples=num_checked, num_codes=num_codes, num_differing=num_differing)


def _prepare(sample: InputSample, unit: WorkUnit, *, config: TokenizeConfig, where: str) -> npt.NDArray[np.uint8]:
    """Return the views of a sample of a unit, cropped as the job does it."""
    limit = max_image_pixels_of(unit, config=config)
    prepared = prepare_sample(sample, key="", config=config, max_image_pixels=limit)
    if isinstance(prepared, Reject):
        raise ArtifactError(
            f"check codes of {where}: {unit.name} must still hold {sample.source} as it was, got {prepared.reason}: "
            f"{prepared.detail}; put the corpus back as it was"
        )
    return prepared.images_VHWC


def _read_config(storage: Storage) -> TokenizeConfig:
    try:
        return TokenizeConfig.model_validate_json(storage.read_bytes(SPEC_NAME))
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"check codes of {storage}: spec.json must hold the tokenize spec, got {reason_of(error)}; run the job's "
            "spec again"
        ) from error
