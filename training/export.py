"""A training run's checkpoint as one file: our safetensors, or the `.pt` that LlamaGen's own training writes.

Only a whole checkpoint is exported, local or on S3; memory is the model's float32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config import S3Config
from pipeline.storage import ArtifactError
from training.llamagen import save_base_weights
from training.run_weights import find_run_checkpoint
from training.weights import save_model


@dataclass(frozen=True, kw_only=True)
class RunExport:
    """What was written."""

    what: Literal["weights", "average of the weights"]
    step: int
    """Training steps behind it."""
    num_tensors: int


def export_run(url: str, *, to: str, output: str, use_ema: bool, step: int | None, s3: S3Config) -> RunExport:
    """Write the weights of a run as one file and return what they are.

    Args:
        url: the run_dir of a train job, or one of its checkpoints.
        to: `safetensors` (the whole model, ours) or `llamagen` (the base model, with LlamaGen's keys).
        output: path or `s3://` URL of the file; an older one is replaced.
        use_ema: whether to take the moving average instead of the weights.
        step: of the checkpoint; none is the newest whole one.
        s3: how S3 is reached.

    Raises:
        ArtifactError: there is no such whole checkpoint, or no average in it; or the file's name is not of its kind.
    """
    suffix = ".pt" if to == "llamagen" else ".safetensors"
    if not output.endswith(suffix):
        raise ArtifactError(
            f"export {url}: --output must be a file that ends in {suffix} for --to {to}, got {output!r}; rename it"
        )
    checkpoint = find_run_checkpoint(url, s3=s3, step=step)
    if checkpoint is None:
        raise ArtifactError(f"export {url}: the run must have a checkpoint, got none; run the train job")
    state, header = checkpoint.read_weights(use_ema=use_ema), checkpoint.header
    if to == "llamagen":
        num_tensors = save_base_weights(output, state, step=header.step, s3=s3)
    else:
        save_model(output, state, config=header.config, fingerprint=header.fingerprint, step=header.step, s3=s3)
        num_tensors = len(state)
    what: Literal["weights", "average of the weights"] = "average of the weights" if use_ema else "weights"
    return RunExport(what=what, step=header.step, num_tensors=num_tensors)
