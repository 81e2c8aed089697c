"""Checks what a training run reads before any rank is started: seconds in one process instead of a failed launch.

It only reads records: manifests, headers of weights, the run's own checkpoint records; no codes, no tensors.
"""

from __future__ import annotations

from training.config import TrainConfig
from training.loop import open_shards


def check_inputs(config: TrainConfig) -> None:
    """Check shards, held-out shards and warm start against each other and the model.

    Raises:
        ArtifactError: something is missing, damaged, or was not made for this run; the message says what to do.
    """
    open_shards(config)
