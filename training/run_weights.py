"""The weights in a training run's checkpoint, put together from the ranks' fragments.

Invariant: only a whole checkpoint is read. Parameters are filled from maps of the local files, or from one ranged read
of each file's region on S3, so memory is the model's float32 weights (and on S3 one rank's share of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import S3Config
from pipeline.storage import ArtifactError, Storage, open_storage
from training.checkpoint import (
    CHECKPOINTS,
    CheckpointRecord,
    checkpoint_name,
    list_checkpoints,
    newest_whole_checkpoint,
    read_record,
    step_in_name,
    verify_checkpoint,
)
from training.config import ModelConfig
from training.fragment_file import EMA, WEIGHTS, FragmentFile
from training.weights_file import ModelHeader


@dataclass(frozen=True, kw_only=True)
class RunCheckpoint:
    """A whole checkpoint of a run."""

    storage: Storage
    record: CheckpointRecord

    @property
    def url(self) -> str:
        """Path or URL of the checkpoint's directory."""
        return self.storage.url_of(checkpoint_name(self.record.step))

    @property
    def header(self) -> ModelHeader:
        """What the weights are of."""
        config = ModelConfig.model_validate(self.record.spec["model"])
        return ModelHeader(config=config, fingerprint=self.record.fingerprint, step=self.record.step)

    def read_weights(self, *, use_ema: bool = False) -> dict[str, Tensor]:
        """Return the float32 weights by name, on the CPU.

        Args:
            use_ema: whether to read their moving average instead.

        Raises:
            ArtifactError: the run keeps no average.
        """
        kind = EMA if use_ema else WEIGHTS
        if kind not in self.record.kinds:
            raise ArtifactError(
                f"read the average of {self.url}: the run must keep one, got only {', '.join(self.record.kinds)}; take "
                "the weights themselves, or train with optimizer.ema_decay"
            )
        flat = {name: np.empty(int(np.prod(shape)), dtype=np.float32) for name, shape in self.record.shapes.items()}
        for file in self.record.files:
            fragments = FragmentFile(self.storage, f"{checkpoint_name(self.record.step)}/{file.name}").read(kind)
            for name, (start, values) in fragments.items():
                flat[name][start : start + len(values)] = values
        return {name: torch.from_numpy(values).view(self.record.shapes[name]) for name, values in flat.items()}


def find_run_checkpoint(url: str, *, s3: S3Config, step: int | None = None) -> RunCheckpoint | None:
    """Return a whole checkpoint of a run; none where there is not one.

    Args:
        url: the run_dir, or one of its `checkpoints/step_XXXXXXXX`.
        s3: how S3 is reached.
        step: of the checkpoint; none is the newest whole one, or the one that `url` names.

    Raises:
        ArtifactError: the one that was asked for is damaged or missing, all are damaged, or `url` names another step.
    """
    *parents, checkpoints, name = ["", "", *url.rstrip("/").split("/")]
    named = step_in_name(name)
    if checkpoints == CHECKPOINTS and named is not None:
        if step not in (None, named):
            raise ArtifactError(
                f"find checkpoint of step {step} in {url}: the step must be the directory's own, {named}, got {step}; "
                "leave the step out, or name the run_dir"
            )
        url, step = "/".join(parents[2:]) or ".", named
    storage = open_storage(url, s3=s3)
    if step is None:
        record = newest_whole_checkpoint(storage)
        return None if record is None else RunCheckpoint(storage=storage, record=record)
    steps = list_checkpoints(storage)
    if step not in steps:
        raise ArtifactError(
            f"find checkpoint of step {step} in {url}: it must be one of {steps}, got {step}; name one of them"
        )
    problems = verify_checkpoint(storage, step)
    if problems:
        raise ArtifactError(f"read checkpoint of step {step} in {url}: it is damaged: {problems[0]}; use another one")
    return RunCheckpoint(storage=storage, record=read_record(storage, step))
