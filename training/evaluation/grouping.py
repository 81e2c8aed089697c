"""Which samples belong together, as a field of the source's JSON says it: the styles and skin tones of one concept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.philox import Int64Array
from pipeline.shard_set import ShardSet
from pipeline.storage import ArtifactError
from training.evaluation.config import HeldOutConfig


def group_in(extra: Mapping[str, Any], field: str, *, of: str) -> str:
    """Return the group that a sample's fields name.

    Args:
        extra: the fields that the source brought.
        field: which of them.
        of: what is told in an error: the setting, and the sample.

    Raises:
        ArtifactError: there is no such field, or it is null, which would make all such samples one group.
    """
    if extra.get(field) is None:
        has = "it is null there" if field in extra else f"it has only {', '.join(extra) or 'none'}"
        raise ArtifactError(
            f"evaluate: {of}: group_field must be a field of every sample, got {field!r}, but {has}; name another"
        )
    return str(extra[field])


def before(separator: str | None, group: str) -> str:
    """Return what of a group's name counts."""
    return group if separator is None else group.split(separator, 1)[0]


def held_out_groups(config: HeldOutConfig, shard_set: ShardSet, *, sample_indices: Int64Array) -> Int64Array | None:
    """Return the group of each sample as a number from 0 on; none where the config names no field.

    Raises:
        ArtifactError: a sample has no such field, or all are of one group, of which no other draw can be made.
    """
    if config.group_field is None:
        return None
    names = []
    for index in sample_indices.tolist():
        extra = shard_set.metadata(index).get("extra") or {}
        of = f"held_out.group_field, sample {shard_set.sample_name(index)}"
        names.append(before(config.group_separator, group_in(extra, config.group_field, of=of)))
    groups, groups_N = np.unique(names, return_inverse=True)
    if len(groups) < 2:
        raise ArtifactError(
            f"evaluate: held_out.group_field must tell 2 or more groups of samples apart, got {names[0]!r} for all "
            f"{len(names)}; name another field, or none"
        )
    return groups_N.astype(np.int64)
