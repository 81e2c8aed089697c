"""What a directory holds, checked against its own records: a shard set or a training run."""

from __future__ import annotations

from pathlib import Path

from pipeline.ledger import verify_shard_set
from pipeline.storage import ArtifactError
from training.checkpoint import checkpoints_dir, list_checkpoints, verify_checkpoint


def verify_directory(directory: Path) -> tuple[list[str], str]:
    """Problems of a shard set or a training run (none: it is whole), and what was checked.

    Args:
        directory: The run_dir of a tokenize or a train job.

    Raises:
        ArtifactError: it is neither.
    """
    if (directory / "ledger").is_dir() or (directory / "manifest.json").is_file():
        return verify_shard_set(directory), "a shard set"
    if not checkpoints_dir(directory).is_dir():
        raise ArtifactError(
            f"verify {directory}: the directory must be the run_dir of a tokenize or a train job, "
            "got neither ledger/ nor checkpoints/ in it; check the path"
        )
    paths = list_checkpoints(directory)
    problems = [problem for path in paths for problem in verify_checkpoint(path)]
    return problems, f"{len(paths)} checkpoints of a training run"
