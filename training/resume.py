"""The checkpoint that a run goes on from: found by all ranks together, read by each as far as it needs it.

Invariant: a resume takes the newest whole checkpoint or none at all, and all ranks take the same. The world size and
the ZeRO stage may differ from those that wrote it; with the same ones the run goes on bit for bit. No random state is
stored: every draw of training is counter-based, and dropout is seeded by (seed, step, micro step, rank).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.fingerprint import Fingerprint
from training.checkpoint import (
    NOT_TO_BE_READ,
    CheckpointRecord,
    SetRecord,
    all_damaged,
    checkpoint_name,
    list_checkpoints,
    read_record,
    remove_partial,
    verify_checkpoint,
    warn_of_damage,
)
from training.config import TrainConfig
from training.engine import Engine
from training.fragment_file import FragmentFile
from training.fragments import parameter_shapes, restore_fragments
from training.ranks import Ranks

logger = logging.getLogger(__name__)


def find_checkpoint(
    config: TrainConfig, *, ranks: Ranks, fingerprint: Fingerprint, training_sets: Sequence[SetRecord] = ()
) -> CheckpointRecord | None:
    """Return the record of the checkpoint to resume, the same on every rank; none for a run without one.

    Called by every rank before anything is saved: what a killed save left is removed here. The ranks share the files
    of a candidate among them to verify it.

    Args:
        config: of the run.
        ranks: of the run.
        fingerprint: tokenizer of the codes.
        training_sets: what the run is to train on.

    Raises:
        ArtifactError: all checkpoints are damaged, or the newest whole one is of another tokenizer's codes or of other
            samples: its position in their order would mean nothing here.
        StorageUnavailableError, PermissionError: one that may be whole cannot be read just now; raised on every rank.
    """
    storage = open_storage(config.run_dir, s3=config.s3)
    steps = _same_on_all(ranks, storage)
    problems: list[str] = []
    for step in reversed(steps):
        problems = _verify_together(ranks, storage, step)
        if not problems:
            record = read_record(storage, step)
            _check_tokenizer(storage, record, fingerprint=fingerprint)
            _check_sets(storage, record, config=config, now=tuple(training_sets))
            return record
        if ranks.is_first:
            warn_of_damage(storage, step, problems)
    if steps:
        raise all_damaged(storage, steps, problems)
    return None


def resume_engine(engine: Engine, *, config: TrainConfig, record: CheckpointRecord) -> None:
    """Restore the engine from the checkpoint of a record that `find_checkpoint` returned; called by every rank.

    Raises:
        ArtifactError: the checkpoint is not of this model.
    """
    began = time.perf_counter()
    storage = open_storage(config.run_dir, s3=config.s3)
    directory = checkpoint_name(record.step)
    _check_shapes(parameter_shapes(engine), record.shapes, doing=f"resume {storage.url_of(directory)}")
    nearest = files_by_nearness(len(record.files), rank=engine.global_rank, world_size=engine.world_size)
    restore_fragments(
        engine,
        (FragmentFile(storage, f"{directory}/{record.files[index].name}") for index in nearest),
        optimizer_steps=record.optimizer_steps,
        module_warmup_steps=config.optimizer.module_warmup_steps,
    )
    logger.info(
        "resume step=%d path=%s written_by=%d ranks zero_stage=%d resume_s=%.2f",
        record.step,
        storage.url_of(directory),
        record.world_size,
        record.zero_stage,
        time.perf_counter() - began,
    )


def files_by_nearness(num_files: int, *, rank: int, world_size: int) -> list[int]:
    """Return the indices of a checkpoint's files, those first in which a rank's elements most likely are; pure.

    With as many ranks as wrote it a rank's own file is all that it opens. With others its elements lie around the
    middle of its share, before and behind it, since padding moves the bounds: of 1,024 files a rank of 512 opens 3.
    """
    middle = (2 * rank + 1) * num_files  # in units of half a file's world_size-th
    return sorted(range(num_files), key=lambda index: abs((2 * index + 1) * world_size - middle))


def _same_on_all(ranks: Ranks, storage: Storage) -> list[int]:
    """Return the steps of the checkpoints, listed by rank 0 after it removed leftovers."""
    found: list[int] | ArtifactError = []
    if ranks.is_first:
        try:
            remove_partial(storage)
            found = list_checkpoints(storage)
        except ArtifactError as error:
            found = error  # raised on every rank below, so that none waits for the others
    found = ranks.from_first(found)
    if isinstance(found, ArtifactError):
        raise found
    return found


def _verify_together(ranks: Ranks, storage: Storage, step: int) -> list[str]:
    """Return what is wrong with a checkpoint, as any of the ranks found it."""
    found: list[str] | Exception
    try:
        found = verify_checkpoint(storage, step, rank=ranks.rank, world_size=ranks.world_size)
    except NOT_TO_BE_READ as error:
        found = error  # raised on every rank below, so that none waits for the others
    problems: dict[str, None] = {}
    for part in ranks.gather(found):
        if isinstance(part, Exception):
            raise part
        problems |= dict.fromkeys(part)
    return list(problems)


def _check_shapes(model: dict[str, tuple[int, ...]], checkpoint: dict[str, tuple[int, ...]], *, doing: str) -> None:
    differing = [name for name in {**model, **checkpoint} if model.get(name) != checkpoint.get(name)]
    if differing:
        name = differing[0]
        raise ArtifactError(
            f"{doing}: parameters must have the checkpoint's shapes, got {len(differing)} that differ ({name}: there "
            f"{checkpoint.get(name)}, in the model {model.get(name)}); set the model section back or use a new run_dir"
        )


def _check_tokenizer(storage: Storage, record: CheckpointRecord, *, fingerprint: Fingerprint) -> None:
    if record.fingerprint != fingerprint:
        raise ArtifactError(
            f"resume {storage.url_of(checkpoint_name(record.step))}: codes must come from tokenizer "
            f"{record.fingerprint.digest}, got {fingerprint.digest}; point data.shards at the set it was trained on, "
            f"or use a new run_dir"
        )


def _check_sets(storage: Storage, record: CheckpointRecord, *, config: TrainConfig, now: tuple[SetRecord, ...]) -> None:
    if not record.training_sets:
        logger.warning(
            "resume step=%d: its record does not say what it was trained on; the spec is trusted", record.step
        )
        return
    for part, before, found in zip(config.data.parts, record.training_sets, now, strict=True):
        if found != before:
            raise ArtifactError(
                f"resume {storage.url_of(checkpoint_name(record.step))}: {part.shards} must hold the samples that it "
                f"was trained on, {_told(before)}, got {_told(found)}; put that set back, or train on this one in a "
                f"new run_dir with warm_start: {config.run_dir}"
            )


def _told(training_set: SetRecord) -> str:
    return f"{training_set.num_samples} in {training_set.num_shards} shards ({training_set.sha256[:8]}..)"
