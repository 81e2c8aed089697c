"""The sampler that a model is reported with: every combination tried, judged by the half that is not reported against.

Invariant: neither the images of the report half nor the draws of the reported samples play a part in the choice. All
combinations have the same labels and draws, so they differ in the sampler alone; equal distances keep the first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from training.config import SamplerConfig
from training.evaluation.config import TuningConfig
from training.evaluation.distances import frechet_distance
from training.evaluation.image_features import FloatFeatures
from training.evaluation.samples import SampleSet

logger = logging.getLogger(__name__)

LIMITS = (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("guidance", 0.0))
"""Values that nothing lies beyond."""


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
    if at_edge := fields_at_edge(tried):
        logger.warning(
            "evaluate tuning: the best %s lies at the edge of what was tried; try values beyond it in another run_dir",
            ", ".join(f"{name} = {tried[best][name]:g}" for name in at_edge),
        )
    return samplers[best], tried


def fields_at_edge(tried: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the fields whose best value is the least or the greatest of several, so that a better one may lie beyond.

    Args:
        tried: as `tune_sampler` returns it, at least one.
    """
    best = min(tried, key=lambda entry: float(entry["frechet_distance"]))
    return tuple(name for name in best if name != "frechet_distance" and _is_at_edge(name, best, tried))


def _is_at_edge(name: str, best: dict[str, Any], tried: Sequence[dict[str, Any]]) -> bool:
    if isinstance(best[name], str):
        return False

    def of(entry: dict[str, Any]) -> float:
        return math.inf if name == "top_k" and entry[name] == 0 else float(entry[name])

    others = {key for key in best if key not in (name, "frechet_distance")}
    if len({entry["frechet_distance"] for entry in tried if all(entry[key] == best[key] for key in others)}) == 1:
        return False  # it makes no difference: a draft's setting of a model without windows
    values = {of(entry) for entry in tried}
    return len(values) > 1 and of(best) in (min(values), max(values)) and (name, best[name]) not in LIMITS
