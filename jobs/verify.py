"""What a directory holds, checked against its own records: a shard set, a training run or a tokenizer fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.run import kind_of
from pipeline.config import S3Config
from pipeline.ledger import MANIFEST_NAME
from pipeline.local_storage import local_path
from pipeline.resume import PLAN_NAME
from pipeline.storage import ArtifactError, Storage, open_storage
from pipeline.verify import verify_shard_set
from training.checkpoint import CHECKPOINTS, list_checkpoints, verify_checkpoint


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was checked, and all that is wrong with it."""

    checked: str
    problems: list[str]


def verify_directory(url: str, *, s3: S3Config, deep: bool = False, max_differing: float = 0.0) -> Verdict:
    """What is wrong with a shard set, a training run or a tokenizer fit; no problem means that it is whole.

    Args:
        url: The run_dir of a tokenize, a train or a fit_tokenizer job.
        s3: How S3 is reached.
        deep: Whether a seeded sample of a set's codes is encoded again from the corpus.
        max_differing: Share of those codes that may differ.

    Raises:
        ArtifactError: it is none of them.
    """
    storage = open_storage(url, s3=s3)
    if any(storage.find(name) is not None for name in (PLAN_NAME, MANIFEST_NAME)):
        return _verify_shard_set(storage, s3=s3, deep=deep, max_differing=max_differing)
    if kind_of(storage) == "fit_tokenizer":
        return _verify_fit(local_path(url))
    if not storage.list(f"{CHECKPOINTS}/"):
        raise ArtifactError(
            f"verify {url}: the directory must be the run_dir of a tokenize, a train or a fit_tokenizer job, "
            "got neither plan.json nor checkpoints/ in it; check the path"
        )
    return _verify_run(storage)


def _verify_run(storage: Storage) -> Verdict:
    """Check every checkpoint; a damaged file is one problem, and the verdict says which checkpoints are whole."""
    steps = list_checkpoints(storage)
    problems = {step: verify_checkpoint(storage, step) for step in steps}
    whole = ", ".join(str(step) for step in steps if not problems[step]) or "none"
    told = f"{len(steps)} checkpoints of a training run; whole are those of step {whole}"
    return Verdict(
        checked=told if steps else "a training run without a checkpoint",
        problems=[problem for found in problems.values() for problem in found],
    )


def _verify_fit(run_dir: Path) -> Verdict:
    """Check the checkpoints of a fit and its weights, each against the hash that it carries."""
    # These import torch.
    from tokenization.fit_checkpoint import verify_checkpoints  # noqa: PLC0415
    from tokenization.fit_output import WEIGHTS_NAME  # noqa: PLC0415
    from tokenization.weights_file import read_weights  # noqa: PLC0415

    steps, problems = verify_checkpoints(run_dir / CHECKPOINTS)
    has_weights = (run_dir / WEIGHTS_NAME).exists()
    if has_weights:
        try:
            read_weights(run_dir / WEIGHTS_NAME)
        except ValueError as error:
            problems.append(str(error))
    whole = ", ".join(map(str, steps)) or "none"
    told = (
        f"a tokenizer fit {'with' if has_weights else 'without'} weights; whole checkpoints are those of step {whole}"
    )
    return Verdict(checked=told, problems=problems)


def _verify_shard_set(storage: Storage, *, s3: S3Config, deep: bool, max_differing: float) -> Verdict:
    problems = verify_shard_set(storage)
    if not deep or problems:
        return Verdict(checked="a shard set", problems=problems)
    from pipeline.code_check import check_codes  # noqa: PLC0415  (imports torch to encode)

    check = check_codes(storage, s3=s3)
    found = f"{check.num_differing} of {check.num_codes} codes of {check.num_samples} samples differ when encoded again"
    if check.differing_fraction > max_differing:
        problems = [
            f"codes of {storage}: up to {max_differing:.2%} may differ, got {check.differing_fraction:.2%} ({found}); "
            "encode on the kind of device that made them, or tokenize again"
        ]
    return Verdict(checked=f"a shard set; {found}", problems=problems)
