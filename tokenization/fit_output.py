"""What a fit leaves in its run_dir beside its checkpoints: the weights and `metrics.jsonl`.

Weights are there from the first checkpoint on whose codebook has been fitted, and are always finite. `metrics.jsonl`
has one line a checkpoint, in step order; after a resumption it reads as if the fit had never stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.config import FitTokenizerConfig
from tokenization.fingerprint import Fingerprint
from tokenization.fit_checkpoint import check_same_config
from tokenization.reconstruction import EVALUATION_BATCH, Evaluation
from tokenization.weights_file import hash_weights, not_finite, read_weights, write_weights

log = logging.getLogger(__name__)

WEIGHTS_NAME = "tokenizer.safetensors"
METRICS_NAME = "metrics.jsonl"


def stored_weights(state: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
    """Return the weights of a network after `step` steps as the file stores them, float16.

    Raises:
        FloatingPointError: one is not finite, or too large.
    """
    stored = {name: value.half() for name, value in state.items()}
    broken = not_finite(stored)
    if broken:
        raise FloatingPointError(
            f"fit step {step}: every weight must be finite in float16, got NaN or infinity in {len(broken)} tensors, "
            f"{broken[0]} first; lower learning_rate in a new run_dir"
        )
    return stored


def write_fit(
    run_dir: Path,
    *,
    state: dict[str, Tensor],
    config: FitTokenizerConfig,
    step: int,
    held_out: Evaluation,
    num_held_out: int,
    num_train_codes_used: int,
) -> None:
    """Commit the weights of a fit.

    Args:
        run_dir: of the fit.
        state: `stored_weights`.
        config: of the fit.
        step: steps done.
        held_out: what the weights reach on held-out images.
        num_held_out: how many those are.
        num_train_codes_used: distinct codes over training images.
    """
    fingerprint = Fingerprint(
        weights_sha256=hash_weights(state),
        network=config.network,
        image_size_px=config.image_size_px,
        batch_size=EVALUATION_BATCH,
        dtype="float32",
    )
    metadata = {
        "fingerprint": fingerprint.model_dump(mode="json"),
        "fit": config.model_dump(mode="json", exclude={"run_dir"}),
        "step": step,
        "held_out_psnr_db": round(held_out.psnr_db, 3),
        "num_held_out_images": num_held_out,
        "held_out_codes_used": held_out.num_codes_used,
        "train_codes_used": num_train_codes_used,
    }
    write_weights(run_dir / WEIGHTS_NAME, network=config.network, state=state, metadata=metadata)


def written_step(run_dir: Path, *, config: FitTokenizerConfig) -> int | None:
    """Return the step of the weights in a run_dir; None where there are none, or damaged ones.

    Raises:
        ValueError: they are those of a fit with another config.
    """
    path = run_dir / WEIGHTS_NAME
    if not path.is_file():
        return None
    try:
        metadata = read_weights(path).metadata
    except ValueError as error:
        log.warning("event=weights_damaged next=writing them again error=%s", error)
        return None
    check_same_config(path, recorded=metadata.get("fit", {}), config=config)
    return int(metadata["step"])


def cut_metrics(run_dir: Path, *, step: int) -> None:
    """Cut off what the metrics say of steps beyond `step`, a torn last line included."""
    path = run_dir / METRICS_NAME
    if not path.exists():
        return
    num_bytes = 0
    with path.open("rb") as file:
        for line in file:
            if _step_of(line) > step:
                break
            num_bytes += len(line)
    os.truncate(path, num_bytes)


def write_metrics(run_dir: Path, line: dict[str, Any]) -> None:
    """Append a line to the metrics, kept by a crash of the machine too; their directory is made where it is missing."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / METRICS_NAME).open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _step_of(line: bytes) -> float:
    if line.endswith(b"\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return float("inf")
