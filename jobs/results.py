"""What a run's own files say of it, by kind: is it done, how far is it, its headline measures.

The invariant: reading changes nothing and reads records alone: no weights, no codes, no pictures. Light: imports no
torch, ray or deepspeed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from pipeline.ledger import MANIFEST_NAME, read_manifest
from pipeline.storage import ArtifactError, Storage
from tokenization.config import Config
from training.checkpoint import list_checkpoints
from training.json_lines import parse_json_lines

METRICS = "metrics.jsonl"
DAMAGE = (ArtifactError, ValueError, KeyError, TypeError, IndexError, AttributeError)
"""What reading a run's files raises where they are not those of its kind."""


class Measure(Config):
    """One number of a run, with its interval where the run knows one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run's own files say."""

    is_done: bool = False
    progress: str | None = None
    measures: dict[str, float | Measure] = field(default_factory=dict)
    """Those of the files as they are; null and not finite ones included."""
    problem: str | None = None
    """What is wrong with its files."""


def find_run(storage: Storage, *, kind: str, spec: dict[str, Any]) -> Found:
    """What a run's files say of it.

    Args:
        storage: Its run_dir.
        kind: Of its spec.
        spec: The resolved spec; of a training run, whose `num_steps` may grow, the one that counts.
    """
    try:
        return _FINDERS[kind](storage, spec)
    except DAMAGE as error:
        rule = f"read the results of {storage}: its files must be those of a run of kind {kind}"
        return Found(problem=_problem_of(error, rule=rule, action="remove the directory to run it anew"))


def read_lines(storage: Storage) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none before there are any."""
    try:
        return parse_json_lines(storage.read_bytes(METRICS).decode(), where=storage.url_of(METRICS))
    except FileNotFoundError:
        return []


def _problem_of(error: Exception, *, rule: str, action: str) -> str:
    """What is wrong and what to do, in one line; an ArtifactError says both itself."""
    if isinstance(error, ArtifactError):
        return " ".join(str(error).split())
    reason = " ".join(f"{type(error).__name__} {error}".split())[:160]
    return f"{rule}, got {reason}; {action}"


def _find_train(storage: Storage, spec: dict[str, Any]) -> Found:
    """What a training run's checkpoints say, which count whatever its metrics are, and what these say."""
    steps, num_steps = list_checkpoints(storage), int(spec["num_steps"])
    is_done = bool(steps) and steps[-1] >= num_steps
    try:
        measures = _train_measures(read_lines(storage))
    except DAMAGE as error:
        rule = f"read {storage.url_of(METRICS)}: its lines must be those of a training run"
        problem = _problem_of(error, rule=rule, action="remove those that are not")
        return Found(is_done=is_done, progress=f"step {steps[-1]} of {num_steps}" if steps else None, problem=problem)
    progress = f"step {measures['steps']} of {num_steps}" if measures else None
    return Found(is_done=is_done, progress=progress, measures=measures)


def _train_measures(lines: list[dict[str, Any]]) -> dict[str, Any]:
    measures: dict[str, Any] = {}
    validation = [line for line in lines if line["split"] == "validation"]
    if validation:
        last = validation[-1]
        measures = {
            "own_draft_loss_0": last["own_draft_loss_0"],
            "loss_0": last["loss_of_offset"][0],
            "loss": last["loss"],
        }
    elif lines:
        measures = {"train_loss_0": lines[-1]["loss_of_offset"][0], "train_loss": lines[-1]["loss"]}
    if lines:
        measures |= {"steps": lines[-1]["step"], "seconds": lines[-1]["elapsed_s"]}
    return measures


def _find_sample(storage: Storage, _: dict[str, Any]) -> Found:
    record = _read_json(storage, "samples.json")
    if record is None:
        return Found()
    names = ("flip_rate", "num_backbone_calls", "images_per_s")
    return Found(is_done=True, measures={name: record[name] for name in names if record.get(name) is not None})


def _find_evaluate(storage: Storage, _: dict[str, Any]) -> Found:
    record = _read_json(storage, "evaluation.json")
    if record is None:
        return Found()
    return Found(is_done=True, measures=dict(_HEADLINE.validate_python(record["headline"])))


def _find_tokenize(storage: Storage, _: dict[str, Any]) -> Found:
    if storage.find(MANIFEST_NAME) is None:
        return Found()
    manifest = read_manifest(storage)
    measures: dict[str, float | Measure] = {
        "samples": manifest.num_samples,
        "views": manifest.num_views,
        "shards": len(manifest.shards),
        "dropped": manifest.totals.num_dropped,
        "rejected": manifest.totals.num_rejected,
    }
    return Found(is_done=True, measures=measures)


def _find_fit(storage: Storage, spec: dict[str, Any]) -> Found:
    lines, num_steps = read_lines(storage), int(spec["num_steps"])
    if not lines:
        return Found()
    last = lines[-1]
    return Found(
        is_done=last["step"] == num_steps and storage.find("tokenizer.safetensors") is not None,
        progress=f"step {last['step']} of {num_steps}",
        measures={
            "steps": last["step"],
            "psnr_db": last["held_out_psnr_db"],
            "codes_used": last["held_out_codes_used"],
        },
    )


_HEADLINE = TypeAdapter(dict[str, Measure])
_FINDERS: dict[str, Callable[[Storage, dict[str, Any]], Found]] = {
    "fit_tokenizer": _find_fit,
    "tokenize": _find_tokenize,
    "train": _find_train,
    "sample": _find_sample,
    "evaluate": _find_evaluate,
}


def _read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.read_bytes(name)))
    except FileNotFoundError:
        return None
