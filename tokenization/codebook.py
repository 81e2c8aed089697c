"""Keeping a codebook alive while it is fitted: spherical k-means to begin with, restarts for entries nobody uses.

Both are pure functions of their inputs and a generator, so that a resumed fit goes the same way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ASSIGNMENT_BATCH = 16384


def spherical_kmeans(vectors_ND: Tensor, *, num_clusters: int, num_rounds: int, generator: torch.Generator) -> Tensor:
    """Return unit-length cluster centres of unit vectors by angle, (num_clusters, D) float32.

    Args:
        vectors_ND: float32, unit length, at least num_clusters of them.
        num_clusters: centres to find.
        num_rounds: assignment rounds after the k-means++ seeding.
        generator: draws the seeds and the replacements of empty clusters.
    """
    centers_CD = _spread_seeds(vectors_ND, num_clusters=num_clusters, generator=generator)
    for _ in range(num_rounds):
        nearest_N = torch.cat(
            [(part @ centers_CD.T).argmax(dim=1) for part in torch.split(vectors_ND, ASSIGNMENT_BATCH)]
        )
        sums_CD = torch.zeros_like(centers_CD).index_add_(0, nearest_N, vectors_ND)
        counts_C = torch.bincount(nearest_N, minlength=num_clusters)
        empty_C = counts_C == 0
        sums_CD[empty_C] = draw_vectors(vectors_ND, count=int(empty_C.sum()), generator=generator)
        centers_CD = F.normalize(sums_CD, dim=-1)
    return centers_CD


def draw_vectors(vectors_ND: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
    """Return vectors drawn at random with replacement, (count, D)."""
    drawn = torch.randint(len(vectors_ND), (count,), generator=generator)
    return vectors_ND[drawn.to(vectors_ND.device)]


def _spread_seeds(vectors_ND: Tensor, *, num_clusters: int, generator: torch.Generator) -> Tensor:
    # k-means++: each seed is drawn by its squared distance to the seeds so far.
    first = int(torch.randint(len(vectors_ND), (1,), generator=generator))
    seeds = [vectors_ND[first]]
    distance_N = 2 - 2 * vectors_ND @ seeds[0]
    for _ in range(num_clusters - 1):
        cumulative_N = distance_N.clamp_min(1e-9).double().cumsum(0)
        threshold = torch.rand(1, generator=generator, dtype=torch.float64).to(cumulative_N.device) * cumulative_N[-1]
        position = int(torch.searchsorted(cumulative_N, threshold).clamp_max(len(vectors_ND) - 1))
        seeds.append(vectors_ND[position])
        distance_N = torch.minimum(distance_N, 2 - 2 * vectors_ND @ seeds[-1])
    return torch.stack(seeds)
