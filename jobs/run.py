"""One spec to one run: its directory remembers the spec, and running the same spec again resumes it.

A directory never mixes two specs: one whose result would differ is refused with the fields that do. Fields that change
only where and how fast a job runs are free.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from jobs.spec import Spec
from pipeline.config import S3Config, TokenizeConfig
from pipeline.local_storage import exclusive, local_path
from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.config import FitTokenizerConfig
from training.checkpoint import list_checkpoints, newest_record, set_record
from training.config import SAMPLE_FREE_FIELDS, SampleConfig, TrainConfig
from training.evaluation.config import FREE_FIELDS as EVALUATE_FREE_FIELDS
from training.evaluation.config import EvaluateConfig

SPEC_NAME = "spec.json"
EXIT_STOPPED = 75
"""Exit code of a command that was told to stop and keeps what is done (EX_TEMPFAIL: run it again to go on)."""

FREE_FIELDS: dict[str, tuple[str, ...]] = {
    "fit_tokenizer": ("checkpoint_every_n_steps",),
    "tokenize": (
        "cluster",
        "max_attempts",
        "max_poison_units",
        "max_rejected_fraction",
        "s3",
        "source.class_names",
        "source.root",
        "source.urls",
        "source.urls_file",
        "tokenizer.weights",
    ),
    "train": (
        "checkpoint",
        "cluster",
        "data.cache_dir",
        "data.max_cache_gb",
        "data.on_damage",
        "data.read_ahead_batches",
        "engine.activation_checkpointing",
        "engine.micro_batch_size",
        "engine.offload_optimizer",
        "engine.ops",
        "engine.peak_tflops",
        "engine.step_timeout_s",
        "engine.zero_stage",
        "log_every_n_steps",
        "max_skipped_steps",
        "num_steps",
        "recipe",
        "s3",
        "validation",
        "wandb_project",
    ),
    "sample": SAMPLE_FREE_FIELDS,
    "evaluate": EVALUATE_FREE_FIELDS,
}
"""Fields (with all below them) that a rerun in the same directory may change, by kind.

A recipe is a word for fields that are compared themselves. A directory may move. A corpus or weights that have moved
are told from others by their fingerprints, and a shard set by its samples (`_has_moved`).
"""

BEGUN_WITH = {
    "fit_tokenizer": ("checkpoints",),
    "tokenize": ("plan.json",),
    "sample": ("samples.json",),
    "evaluate": ("stages", "evaluation.json"),  # whose stages may be removed
}
"""What a job of each kind leaves as soon as there is something to resume; until then its spec binds nobody."""


class RunStoppedError(RuntimeError):
    """A run was told to stop and has taken a checkpoint; running the same spec again goes on."""


def run_spec(spec: Spec, *, progress: bool = True) -> Any:
    """Result of running a spec to its end; work that its run_dir already holds is not done again.

    Args:
        spec: What to run.
        progress: Whether to show live progress where the job has it.

    Returns:
        By kind: `fit_tokenizer` the Path of the weights, `tokenize` the Manifest, `train` the TrainResult, `sample` the
        path or URL of the results, `evaluate` the path or URL of the report.

    Raises:
        RunStoppedError: training was told to stop, and saved first.
        ArtifactError: the run_dir holds a run of another spec, or something that the job reads is missing or damaged.
    """
    if not _is_later_rank(spec):
        remember_spec(spec)
    # Each job brings torch or ray with it: imported when it is the one that runs.
    if isinstance(spec, FitTokenizerConfig):
        from tokenization.fit import fit_tokenizer  # noqa: PLC0415

        with exclusive(local_path(spec.run_dir)):
            return fit_tokenizer(spec)
    if isinstance(spec, TokenizeConfig):
        from pipeline.tokenize import run_tokenize  # noqa: PLC0415

        return run_tokenize(spec, progress=progress)
    if isinstance(spec, TrainConfig):
        from jobs.launch import launch_training  # noqa: PLC0415

        return launch_training(spec, progress=progress)
    if isinstance(spec, EvaluateConfig):
        from jobs.evaluation_report import evaluate_and_report  # noqa: PLC0415

        return evaluate_and_report(spec)
    assert isinstance(spec, SampleConfig)
    from training.sample import run_sample  # noqa: PLC0415

    return run_sample(spec)


def remember_spec(spec: Spec) -> None:
    """Write the resolved spec into its run_dir, or check it against the one that is there.

    A spec whose job failed before there was anything to resume is replaced: a typo in it is mended by running it again.

    Raises:
        ArtifactError: another spec is there that differs in more than its kind's free fields, or whose job is at work.
    """
    storage = open_storage(spec.run_dir, s3=S3Config() if isinstance(spec, FitTokenizerConfig) else spec.s3)
    new = spec.model_dump(mode="json")
    old = _remembered(storage, spec)
    if old is not None:
        if old == new and storage.find(SPEC_NAME) is not None:
            return
        differing = _binding_differences(storage, old, spec)
        if differing and _has_begun(storage, kind=str(old.get("kind"))):
            raise ArtifactError(
                f"run {spec.run_dir}: a directory must hold one spec's run, but these fields differ: "
                f"{_told(differing)}; set another run_dir, or remove the directory to begin anew"
            )
        with storage.exclusive():  # another job may be at work
            storage.write_json(SPEC_NAME, new)
        return
    storage.write_json(SPEC_NAME, new)


def _remembered(storage: Storage, spec: Spec) -> dict[str, Any] | None:
    """The spec that a directory holds a run of, as this version reads it; a training run's checkpoints have it too."""
    if storage.find(SPEC_NAME) is not None:
        return _with_new_fields(stored_spec(storage), spec)
    if isinstance(spec, TrainConfig):
        with contextlib.suppress(ArtifactError):  # of damaged checkpoints, which the ranks tell
            record = newest_record(storage)
            return None if record is None else _with_new_fields(record.spec, spec)
    return None


def difference_from(storage: Storage, spec: Spec) -> str | None:
    """Fields in which the spec that a directory was run with differs from this one; None if nothing binding does.

    Raises:
        ArtifactError: the directory's spec.json is damaged.
    """
    if storage.find(SPEC_NAME) is None:
        return None
    differing = _binding_differences(storage, _with_new_fields(stored_spec(storage), spec), spec)
    return _told(differing) if differing else None


def _binding_differences(storage: Storage, old: dict[str, Any], spec: Spec) -> list[tuple[str, Any, Any]]:
    """The differences of a spec from the one of its directory in fields that are not free."""
    differences = _differences(old, spec.model_dump(mode="json"))
    return [one for one in differences if not (_is_free(one[0], spec.kind) or _has_moved(storage, one[0], spec))]


def _has_moved(storage: Storage, name: str, spec: Spec) -> bool:
    """Whether a field is the place of a shard set that holds what the run's newest checkpoint was trained on."""
    if name != "data.shards" or not isinstance(spec, TrainConfig) or spec.data.shards is None:
        return False
    record = newest_record(storage)
    if record is None or not record.training_sets:
        return False
    from pipeline.ledger import read_manifest  # noqa: PLC0415  (brings numpy)

    return record.training_sets == (set_record(read_manifest(open_storage(spec.data.shards, s3=spec.s3))),)


def kind_of(storage: Storage) -> str | None:
    """The kind of the spec that a directory was run with; None where nothing there tells."""
    with contextlib.suppress(ArtifactError, FileNotFoundError):
        kind = stored_spec(storage).get("kind")
        return kind if isinstance(kind, str) else None
    return None


def stored_spec(storage: Storage) -> dict[str, Any]:
    """The data of the spec that a directory was run with.

    Raises:
        FileNotFoundError: it holds none.
        ArtifactError: its spec.json is damaged.
    """
    with contextlib.suppress(ValueError):
        value = json.loads(storage.read_bytes(SPEC_NAME))
        if isinstance(value, dict):
            return value
    raise ArtifactError(
        f"read {storage.url_of(SPEC_NAME)}: it must be the JSON of a spec; remove the file if the run is to go on"
    )


def _with_new_fields(old: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """A stored spec as this version reads it: fields that were added since it was written have their defaults.

    So has a train spec whose recipe would fill them in otherwise now: the run was begun without them.
    """
    recipe = {"recipe": "paper"} if isinstance(spec, TrainConfig) else {}
    with contextlib.suppress(ValidationError):
        return type(spec).model_validate(old | recipe).model_dump(mode="json")
    return old


def _is_later_rank(spec: Spec) -> bool:
    """Whether this is one of torchrun's processes other than the first, which alone keeps the directory."""
    is_torchrun = isinstance(spec, TrainConfig) and spec.cluster.launcher == "torchrun"
    return is_torchrun and os.environ.get("RANK", "0") != "0"


def _has_begun(storage: Storage, *, kind: str) -> bool:
    if kind == "train":
        return bool(list_checkpoints(storage))  # a killed save leaves none behind
    if kind not in BEGUN_WITH:
        return True
    return any(storage.find(name) is not None or bool(storage.list(f"{name}/")) for name in BEGUN_WITH[kind])


def _told(differing: list[tuple[str, Any, Any]]) -> str:
    """The fields that differ, in one line; of specs of two kinds the kinds, which explain the rest."""
    kinds = [difference for difference in differing if difference[0] == "kind"]
    return ", ".join(f"{name} (there {have!r}, in the spec {want!r})" for name, have, want in kinds or differing)


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every leaf that differs; a missing one counts as None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new


def _is_free(name: str, kind: str) -> bool:
    return name == "run_dir" or any(name == free or name.startswith(f"{free}.") for free in FREE_FIELDS[kind])
