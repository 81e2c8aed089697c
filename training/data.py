"""The shard sets of a train spec, opened and checked against each other and against its model.

Invariant: codes of two tokenizers never meet in a run, and a model never reads codes of another shape than its own.
"""

from __future__ import annotations

import math
import resource

from pipeline.loader import check_room, open_cache, open_parts
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError
from training.config import TrainConfig


def open_shards(config: TrainConfig, *, is_here: bool = True) -> tuple[tuple[ShardSet, ...], ShardSet | None]:
    """Return the training sets, in the order of the mixture, and the held-out set where there is one.

    Args:
        config: of the run.
        is_here: whether this machine will read them; then its disk must have room for the cache.

    Raises:
        ArtifactError: a set is missing or empty, was not made for this model, or the cache has no room for them.
    """
    _allow_open_files()
    held_out_urls = [] if config.validation is None else [config.validation.shards]
    batch_size = config.engine.global_batch_size
    cache = open_cache(config.data, urls=[*(part.shards for part in config.data.parts), *held_out_urls])
    shard_sets = open_parts(config.data, s3=config.s3, cache=cache)
    for shard_set in shard_sets:
        _check_fits_model(shard_set, config=config)
    held_out = None
    if config.validation is not None:
        fingerprint = shard_sets[0].fingerprint
        held_out = ShardSet.open(config.validation.shards, fingerprint=fingerprint, s3=config.s3, cache=cache)
    if cache is not None:
        read = [*shard_sets, *([] if held_out is None else [held_out])]
        check_room(read, cache=cache, config=config.data, global_batch_size=batch_size, is_here=is_here)
    return shard_sets, held_out


def _allow_open_files() -> None:
    """Raise the soft limit of open files, often 1,024, to the hard one: a mapping keeps its shard's descriptor."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check_fits_model(shard_set: ShardSet, *, config: TrainConfig) -> None:
    side = math.isqrt(shard_set.codes_per_image)
    for field, of_shards in (("codebook_size", shard_set.codebook_size), ("codes_per_side", side)):
        of_model = getattr(config.model, field)
        if of_model != of_shards:
            raise ArtifactError(
                f"train on {shard_set.url}: model.{field} must be that of the codes = {of_shards}, "
                f"got {of_model}; set model.{field}: {of_shards}"
            )
