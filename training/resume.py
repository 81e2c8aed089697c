"""An engine's state <-> a checkpoint directory, across all ranks.

Invariant: a save either ends in a whole `step_XXXXXXXX` or leaves only a `.partial` that the next run removes; a resume
takes the newest whole checkpoint or none at all, and all ranks take the same. No random state is stored: every draw
of training is counter-based, and dropout is seeded by (seed, step, micro step, rank).
"""

from __future__ import annotations

import logging
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.storage import ArtifactError
from tokenization.fingerprint import Fingerprint
from training.checkpoint import (
    MODEL_FILE,
    CheckpointRecord,
    checkpoint_path,
    commit_checkpoint,
    hash_files,
    newest_whole_checkpoint,
    partial_path,
    read_record,
    remove_old_checkpoints,
    remove_partial,
)
from training.config import TrainConfig
from training.engine import Engine, full_weights, is_written_by, load_partitions, save_partitions
from training.ranks import Ranks
from training.weights import save_model

logger = logging.getLogger(__name__)


def save_checkpoint(
    engine: Engine, *, config: TrainConfig, ranks: Ranks, step: int, samples_consumed: int, fingerprint: Fingerprint
) -> Path:
    """Return the committed checkpoint directory of `step`; called by every rank.

    Args:
        engine: after `step` steps.
        config: of the run; enters the record.
        ranks: of the run.
        step: steps taken.
        samples_consumed: position of the loader.
        fingerprint: tokenizer of the codes.
    """
    began = time.perf_counter()
    run_dir = Path(config.run_dir)
    path = checkpoint_path(run_dir, step)
    partial = partial_path(path)
    if ranks.is_first:
        remove_partial(run_dir)
        partial.mkdir(parents=True)
    ranks.barrier()
    weights = full_weights(engine, is_kept=ranks.is_first)
    if ranks.is_first:
        save_model(partial / MODEL_FILE, weights, config=config.model, fingerprint=fingerprint, step=step)
    save_partitions(engine, partial)
    ranks.barrier()
    names = [str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file()]
    files = ranks.gather(hash_files(partial, [name for name in names if is_written_by(name, rank=ranks.rank)]))
    if ranks.is_first:
        record = CheckpointRecord(
            step=step,
            samples_consumed=samples_consumed,
            world_size=ranks.world_size,
            zero_stage=config.engine.zero_stage,
            fingerprint=fingerprint,
            spec=config.model_dump(mode="json"),
            packages={name: _version(name) for name in ("torch", "deepspeed", "tensorar")},
            files=tuple(file for part in files for file in part),
        )
        commit_checkpoint(path, record)
        remove_old_checkpoints(run_dir, keep_latest=config.checkpoint.keep_latest, newest_step=step)
        logger.info("checkpoint step=%d path=%s save_s=%.2f", step, path, time.perf_counter() - began)
    ranks.barrier()
    return path


def find_checkpoint(config: TrainConfig, *, ranks: Ranks, fingerprint: Fingerprint) -> CheckpointRecord | None:
    """Return the record of the checkpoint to resume, the same on every rank; none for a run without one.

    Raises:
        ArtifactError: all checkpoints are damaged, or the newest whole one was written by another number of ranks, by
            another ZeRO stage or from another tokenizer's codes.
    """
    found: CheckpointRecord | ArtifactError | None = None
    if ranks.is_first:
        try:
            path = newest_whole_checkpoint(Path(config.run_dir))
            found = None if path is None else read_record(path)
        except ArtifactError as error:
            found = error  # raised on every rank below, so that none waits for the others
    found = ranks.from_first(found)
    if isinstance(found, ArtifactError):
        raise found
    if found is not None:
        _check_resumable(found, config=config, world_size=ranks.world_size, fingerprint=fingerprint)
    return found


def resume_engine(engine: Engine, *, config: TrainConfig, record: CheckpointRecord) -> None:
    """Restore the engine from the checkpoint of a record that `find_checkpoint` returned; called by every rank."""
    path = checkpoint_path(Path(config.run_dir), record.step)
    load_partitions(engine, path)
    logger.info("resume step=%d path=%s", record.step, path)


def _check_resumable(
    record: CheckpointRecord, *, config: TrainConfig, world_size: int, fingerprint: Fingerprint
) -> None:
    where = f"resume {checkpoint_path(Path(config.run_dir), record.step)}"
    if record.world_size != world_size:
        raise ArtifactError(
            f"{where}: it must be resumed by as many ranks as wrote it = {record.world_size}, got {world_size}; "
            f"set cluster.num_workers: {record.world_size}"
        )
    if record.zero_stage != config.engine.zero_stage:
        raise ArtifactError(
            f"{where}: engine.zero_stage must stay {record.zero_stage}, got {config.engine.zero_stage}; set it back"
        )
    if record.fingerprint != fingerprint:
        raise ArtifactError(
            f"{where}: codes must come from tokenizer {record.fingerprint.digest}, got {fingerprint.digest}; "
            f"point data.shards at the set it was trained on, or use a new run_dir"
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
