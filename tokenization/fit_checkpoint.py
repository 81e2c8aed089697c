"""Checkpoints of a tokenizer fit: `checkpoints/step_00001000/` with `state.safetensors` and `record.json`.

A checkpoint is staged, synced and renamed, so it is there whole or not at all; the newest whose record verifies is the
one a rerun goes on from, a damaged one is passed over with a warning, and with none whole the rerun is refused; one
that cannot be read just now may be whole, and ends the rerun. No pickle: optimiser moments are tensors with names.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from tokenization.config import Config, FitTokenizerConfig
from tokenization.synced import rename_synced, write_synced

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
NUM_KEPT = 2
FREE_FIELDS = {"run_dir", "checkpoint_every_n_steps"}
"""Fields of the config that may change between a run and its resumption."""
_DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EIO})
"""What reading a damaged checkpoint fails with: a file is gone, or lies on a bad sector."""


class _Record(Config):
    """What a checkpoint says about itself."""

    step: int
    bytes: int
    sha256: str
    """Of `state.safetensors`."""
    config: dict[str, Any]
    """Of the run."""
    images_sha256: str | None = None
    """Of the pixels trained on, in order; none in a record of before."""


def save_checkpoint(
    directory: Path, *, step: int, state: dict[str, Tensor], config: FitTokenizerConfig, images_sha256: str
) -> None:
    """Commit the state after `step` steps and remove all but the newest two checkpoints.

    Args:
        directory: `checkpoints/` of the run.
        step: steps done.
        state: name to tensor, all of the run's state.
        config: what the run does; a resumption must agree.
        images_sha256: of the pixels that it trains on; a resumption must agree.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".staged-*"):
        shutil.rmtree(leftover)
    final = directory / f"step_{step:08d}"
    staged = directory / f".staged-{final.name}"
    staged.mkdir()
    data = save({name: value.detach().cpu().contiguous() for name, value in state.items()})
    record = _Record(
        step=step,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        config=config.model_dump(mode="json", exclude=FREE_FIELDS),
        images_sha256=images_sha256,
    )
    write_synced(staged / "state.safetensors", data)
    write_synced(staged / "record.json", record.model_dump_json(indent=2).encode())
    if final.exists():
        shutil.rmtree(final)
    rename_synced(staged, final)
    for old in sorted(directory.glob("step_*"))[:-NUM_KEPT]:
        shutil.rmtree(old)


def load_newest_checkpoint(
    directory: Path, *, config: FitTokenizerConfig, images_sha256: str
) -> tuple[int, dict[str, Tensor]] | None:
    """Return the step and state of the newest whole checkpoint, None where there is none at all.

    Args:
        directory: `checkpoints/` of the run.
        config: what the run does now.
        images_sha256: of the pixels that it trains on now.

    Raises:
        ValueError: the checkpoint was made under another config or on other images, or all are damaged: starting anew
            must be somebody's decision.
        OSError: one that may be whole cannot be read just now.
    """
    paths = sorted(directory.glob("step_*"), reverse=True)
    for path in paths:
        whole = _read_whole(path)
        if whole is None:
            log.warning("event=checkpoint_damaged path=%s", path)
            continue
        record, data = whole
        check_same_config(path, recorded=record.config, config=config)
        if record.images_sha256 is None:
            log.warning("event=images_unknown path=%s next=going on with the images there are", path)
        elif record.images_sha256 != images_sha256:
            raise ValueError(
                f"resume {path}: the run must go on with the images that it began with, got others in {config.images}; "
                "put the images back or choose another run_dir"
            )
        return record.step, load(data)
    if paths:
        raise ValueError(
            f"resume {directory.parent}: a checkpoint must be whole, got {len(paths)} damaged ones; put back their "
            f"files, or move {directory} away to start from step 0"
        )
    return None


def verify_checkpoints(directory: Path) -> tuple[list[int], list[str]]:
    """Return the steps of the whole checkpoints of a run, and what is wrong with each of the others.

    Raises:
        OSError: one that may be whole cannot be read just now.
    """
    steps: list[int] = []
    problems: list[str] = []
    for path in sorted(directory.glob("step_*")):
        whole = _read_whole(path)
        if whole is not None:
            steps.append(whole[0].step)
        else:
            problems.append(
                f"checkpoint {path}: state.safetensors must have the sha256 that record.json says, got another or no "
                "file; put the files back, or run the fit again, which goes on from a whole one"
            )
    return steps, problems


def check_same_config(path: Path, *, recorded: dict[str, Any], config: FitTokenizerConfig) -> None:
    """Raise ValueError where a fit's config differs from the one recorded with what lies at `path`."""
    current = config.model_dump(mode="json", exclude=FREE_FIELDS)
    names = (current.keys() | recorded.keys()) - FREE_FIELDS
    different = sorted(name for name in names if current.get(name) != recorded.get(name))
    if different:
        raise ValueError(
            f"resume {path}: the run must go on with the config it began with, got other {', '.join(different)}; "
            "restore them or choose another run_dir"
        )


def _read_whole(path: Path) -> tuple[_Record, bytes] | None:
    try:
        record = _Record.model_validate_json((path / "record.json").read_bytes())
        data = (path / "state.safetensors").read_bytes()
    except ValidationError:
        return None
    except OSError as error:
        if error.errno in _DAMAGE:
            return None
        raise
    return (record, data) if hashlib.sha256(data).hexdigest() == record.sha256 else None
