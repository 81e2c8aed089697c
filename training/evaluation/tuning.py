"""The sampler that a model is reported with: every combination tried, judged by the half that is not reported against.

Invariant: neither the images of the report half nor the draws of the reported samples play a part in the choice. All
combinations have the same labels and draws, so they differ in the sampler alone; equal distances keep the first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from training.config import SamplerConfig
from training.evaluation.config import TuningConfig
from training.evaluation.distances import frechet_distance
from training.evaluation.image_features import FloatFeatures
from training.evaluation.samples import SampleSet

logger = logging.getLogger(__name__)


def tune_sampler(
    config: TuningConfig,
    *,
    sampler: SamplerConfig,
    draw: Callable[[str, SamplerConfig], SampleSet],
    wanted_NF: FloatFeatures,
) -> tuple[SamplerConfig, list[dict[str, Any]]]:
    """Return the best sampler, and every one that was tried with its distance (JSON values).

    Args:
        config: what to try.
        sampler: the rest of the sampler.
        draw: gives the samples of a sampler, which it names and commits.
        wanted_NF: features of the tuning half, as `config.against` says.
    """
    samplers = config.samplers(sampler)
    tried: list[dict[str, Any]] = []
    for index, candidate in enumerate(samplers):
        features_NF = draw(f"tuning/{index:04d}", candidate).features_NF
        distance = frechet_distance(features_NF, wanted_NF)
        fields = candidate.model_dump(mode="json")
        tried.append({name: fields[name] for name in config.tried} | {"frechet_distance": distance})
        logger.info("evaluate tuning=%d of=%d frechet_distance=%.2f", index + 1, len(samplers), distance)
    best = min(range(len(samplers)), key=lambda index: tried[index]["frechet_distance"])
    return samplers[best], tried
