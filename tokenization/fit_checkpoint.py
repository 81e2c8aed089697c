"""Checkpoints of a tokenizer fit: `checkpoints/step_00001000/` with `state.safetensors` and `record.json`.

A checkpoint is staged, synced and renamed, so it is there whole or not at all; the newest whose record verifies is the
one a rerun goes on from, and a damaged one is passed over with a warning. No pickle: optimiser moments are tensors with
names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from tokenization.config import FitTokenizerConfig

log = logging.getLogger(__name__)

NUM_KEPT = 2
FREE_FIELDS = {"run_dir", "checkpoint_every_n_steps"}
"""Fields of the config that may change between a run and its resumption."""


def save_checkpoint(directory: Path, *, step: int, state: dict[str, Tensor], config: FitTokenizerConfig) -> None:
    """Commit the state after `step` steps and remove all but the newest two checkpoints.

    Args:
        directory: `checkpoints/` of the run.
        step: steps done.
        state: name to tensor, all of the run's state.
        config: what the run does; a resumption must agree.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".staged-*"):
        shutil.rmtree(leftover)
    final = directory / f"step_{step:08d}"
    staged = directory / f".staged-{final.name}"
    staged.mkdir()
    data = save({name: value.detach().cpu().contiguous() for name, value in state.items()})
    record = {
        "step": step,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "config": config.model_dump(mode="json", exclude=FREE_FIELDS),
    }
    _write_synced(staged / "state.safetensors", data)
    _write_synced(staged / "record.json", json.dumps(record, indent=2).encode())
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    _sync_directory(directory)
    for old in sorted(directory.glob("step_*"))[:-NUM_KEPT]:
        shutil.rmtree(old)


def load_newest_checkpoint(directory: Path, *, config: FitTokenizerConfig) -> tuple[int, dict[str, Tensor]] | None:
    """Return the step and state of the newest whole checkpoint, None where there is none.

    Args:
        directory: `checkpoints/` of the run.
        config: what the run does now.

    Raises:
        ValueError: the checkpoint was made under another config.
    """
    for path in sorted(directory.glob("step_*"), reverse=True):
        data = _read_whole(path)
        if data is None:
            log.warning("event=checkpoint_damaged path=%s next=resuming from the one before", path)
            continue
        record = json.loads((path / "record.json").read_text())
        _check_same_config(path, recorded=record["config"], config=config)
        return int(record["step"]), load(data)
    return None


def _read_whole(path: Path) -> bytes | None:
    try:
        record = json.loads((path / "record.json").read_text())
        data = (path / "state.safetensors").read_bytes()
    except (OSError, json.JSONDecodeError):
        return None
    return data if hashlib.sha256(data).hexdigest() == record.get("sha256") else None


def _check_same_config(path: Path, *, recorded: dict[str, object], config: FitTokenizerConfig) -> None:
    current = config.model_dump(mode="json", exclude=FREE_FIELDS)
    different = sorted(name for name in current.keys() | recorded.keys() if current.get(name) != recorded.get(name))
    if different:
        raise ValueError(
            f"resume {path}: the run must go on with the config it began with, got other {', '.join(different)}; "
            "restore them or choose another run_dir"
        )


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
