"""Samples of a model with their features, drawn and committed batch by batch.

Invariant: sample i of a set depends on the weights, the sampler, the seed, its label and its counter alone; the sets of
a control and of its model have the same labels and counters, so they differ in nothing but the model.

N samples, T positions, K window_size, F features.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.philox import Int64Array
from tokenization.tokenizer import Tokenizer
from training.config import SamplerConfig
from training.evaluation.image_features import FloatFeatures, Images
from training.evaluation.stages import Arrays, Stages, joined
from training.sampling import sample_codes
from training.tensorar import TensorAR

Codes = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Samples of one model."""

    labels_N: Int64Array
    codes_NT: Codes
    drafts_NTK: Codes
    """Refinements, see `training.sampling.SampledCodes`."""
    features_NF: FloatFeatures
    """Of the decoded samples; (N, 0) where none were asked for."""
    calls_per_image: float
    """Passes of the backbone that an image takes part in; the mean over the images."""
    seconds_per_image: float
    """Of sampling alone, batch by batch; differs from run to run."""


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Which samples a set holds."""

    labels_N: Int64Array
    counters_N: Int64Array
    """What tells samples apart in every draw."""
    seed: int
    batch_size: int
    """Samples drawn and committed together."""


def proportional_labels(reference_labels: Int64Array, *, num_samples: int) -> Int64Array:
    """Return labels in the proportions of others, sorted: each class's count is within 1 of its share.

    Args:
        reference_labels: at least one, sorted.
        num_samples: how many.
    """
    places = (2 * np.arange(num_samples, dtype=np.int64) + 1) * len(reference_labels) // (2 * num_samples)
    return reference_labels[places]


def without_drafts(sampler: SamplerConfig) -> SamplerConfig:
    """Return a sampler for a model without windows: what it says of finals and of calls, and nothing of drafts."""
    names = ("guidance", "guidance_interval", "temperature", "top_k", "top_p", "windows_per_call")
    return SamplerConfig.model_validate({name: getattr(sampler, name) for name in names})


def draw_samples(
    stages: Stages,
    name: str,
    *,
    model: TensorAR,
    sampler: SamplerConfig,
    plan: SamplePlan,
    tokenizer: Tokenizer,
    extract: Callable[[Images], FloatFeatures] | None,
) -> SampleSet:
    """Return a set of samples; batches that are committed already are not drawn again.

    Args:
        stages: where they are committed.
        name: of the set.
        model: drawn from.
        sampler: how.
        plan: which.
        tokenizer: decodes them.
        extract: gives the features of images; none for samples that are only looked at.
    """

    def make(batch: slice) -> Arrays:
        began = time.perf_counter()
        sampled = sample_codes(
            model,
            torch.from_numpy(plan.labels_N[batch]),
            config=sampler,
            seed=plan.seed,
            sample_counters_N=torch.from_numpy(plan.counters_N[batch]),
        )
        seconds_s = time.perf_counter() - began
        codes_BT: Codes = sampled.codes_NT.numpy().astype(np.int32)
        return {
            "codes": codes_BT,
            "drafts": sampled.drafts_NTK.numpy().astype(np.int32),
            "features": np.empty((len(codes_BT), 0)) if extract is None else extract(tokenizer.decode(codes_BT)),
            "calls": sampled.calls_per_sample_N.numpy(),
            "seconds": np.array([seconds_s]),
        }

    num_samples = len(plan.labels_N)
    arrays = joined(stages.batches(name, num_samples=num_samples, batch_size=plan.batch_size, make=make))
    return SampleSet(
        labels_N=plan.labels_N,
        codes_NT=arrays["codes"],
        drafts_NTK=arrays["drafts"],
        features_NF=arrays["features"],
        calls_per_image=float(arrays["calls"].mean()),
        seconds_per_image=float(arrays["seconds"].sum()) / num_samples,
    )
