"""Weights & Biases as one more board that a run's metrics are shown on, where the spec names a project.

The package is no dependency: it is looked for before training starts and imported only by rank 0. A run_dir keeps the
id of its W&B run, drawn at its first start, so that a run that is resumed, or was moved, goes on as the same one and
never as that of another directory with the same name. Account and mode come from W&B's variables (WANDB_API_KEY,
WANDB_MODE).
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from pathlib import Path
from typing import Any

from pipeline.storage import Storage, open_storage
from training.config import TrainConfig

WANDB_ID = "wandb_id.txt"
"""The file of a run_dir that holds the id of its W&B run."""


def check_wandb(config: TrainConfig) -> None:
    """Check that the package is there if the spec asks for it.

    Raises:
        ValueError: it is not installed.
    """
    if config.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log to W&B: wandb_project needs the package wandb, got {config.wandb_project!r} and no such package; "
            f"pip install wandb on every node, or remove wandb_project"
        )


def run_id(storage: Storage) -> str:
    """Return the id of a run's W&B run, kept in its storage from the first time on."""
    if storage.find(WANDB_ID) is None:
        storage.write_bytes(WANDB_ID, f"{secrets.token_hex(8)}\n".encode())
    return storage.read_bytes(WANDB_ID).decode().strip()


class WandbBoard:
    """A run on W&B; only rank 0 has one."""

    def __init__(self, config: TrainConfig, *, directory: Path) -> None:
        """Begin or go on.

        Args:
            config: of the run, with a `wandb_project`; shown with it.
            directory: where W&B keeps its own files.
        """
        wandb: Any = importlib.import_module("wandb")  # by name: not installed where nobody asks for it
        self._run = wandb.init(
            project=config.wandb_project,
            id=run_id(open_storage(config.run_dir, s3=config.s3)),
            name=config.run_dir.rstrip("/"),
            config=config.model_dump(mode="json"),
            dir=str(directory),
            resume="allow",
        )
        # W&B's own step can only rise, so that what a resume repeats would be lost; charts are drawn over ours.
        self._run.define_metric("*", step_metric="step")

    def show(self, step: int, numbers: dict[str, float]) -> None:
        """Add numbers of a step; the same step may come again, for validation or after a resume."""
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
