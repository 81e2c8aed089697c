"""What the runs of a study have come to, read from their own files: state, progress and headline measures of each.

The invariant: `study.json` says nothing that is not in the runs' directories and in `outcomes/`, so it may be removed
and is written again by the next run of the study. An outcome is what a study's process last said of a run: how it
ended, with what error, and the seconds of all attempts together. Light: imports no torch, ray or deepspeed.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, ValidationError

from jobs.results import Found, Measure, find_run
from jobs.run import stored_spec
from pipeline.config import S3Config
from pipeline.storage import ArtifactError, Storage, open_storage
from tokenization.config import Config

STUDY_NAME = "study.json"
OUTCOME_NAME = "outcome.json"
EndState = Literal["stopped", "failed", "done"]
State = Literal["to do", "running", "stopped", "failed", "done"]


class Outcome(Config):
    """What a study's process last said of a run: `outcomes/NAME/outcome.json`."""

    version: Literal[1] = 1
    """Version of this format."""
    state: Literal["running", "stopped", "failed", "done"]
    """A killed process leaves `running` behind."""
    time: datetime.datetime
    """When it was written, UTC."""
    seconds_s: NonNegativeFloat
    """Seconds of all attempts that came to an end."""
    error: str | None = None
    """First line of what went wrong."""


class RunResult(Config):
    """One run of a study."""

    name: str
    cases: dict[str, str]
    """The case of each axis."""
    state: State
    progress: str | None
    """How far it is, where its kind tells."""
    measures: dict[str, Measure]
    """Headline measures of a run that is done."""
    seconds_s: NonNegativeFloat | None
    """Of all attempts of the study at it; none where it was run without the study."""
    error: str | None
    """First line of what went wrong, if it failed."""


class StudyResult(Config):
    """`study.json`."""

    version: Literal[1] = 1
    """Version of this format."""
    kind: str
    run_dir: str
    runs: tuple[RunResult, ...]
    baseline: dict[str, str] = Field(default_factory=dict)
    """Cases that the other runs are held against, by axis; empty without one."""

    def count(self, state: State) -> int:
        """How many runs are in a state."""
        return sum(run.state == state for run in self.runs)


def result_of_run(storage: Storage, claim: Storage, *, name: str, cases: dict[str, str], found: Found) -> RunResult:
    """The entry of `study.json`: what is found, in the light of what the study's processes said.

    Args:
        storage: The run_dir.
        claim: What `claim_of` gives for the run.
        name: Of the run.
        cases: Of the run.
        found: What its own files say.
    """
    outcome = read_outcome(claim)
    state = state_of(found, outcome, is_held=lambda: claim.is_held() or storage.is_held())
    finite = {name: measure for name, value in found.measures.items() if (measure := _finite(value)) is not None}
    return RunResult(
        name=name,
        cases=cases,
        state=state,
        progress=found.progress,
        measures=finite if state == "done" else {},
        seconds_s=None if outcome is None else outcome.seconds_s,
        error=found.problem if outcome is None or outcome.error is None else outcome.error,
    )


def state_of(found: Found, outcome: Outcome | None, *, is_held: Callable[[], bool]) -> State:
    """The state of a run.

    Args:
        found: What its files say.
        outcome: What a study's process last said of it.
        is_held: Whether a live process holds it; only asked where that was said.
    """
    if outcome is not None and outcome.state == "failed":
        return "failed"  # also where an older result lies there: it was refused
    if outcome is not None and outcome.state == "running" and is_held():
        return "running"
    if found.problem is not None:
        return "failed"
    if found.is_done:
        return "done"
    return "to do" if outcome is None or outcome.state == "done" else "stopped"


def claim_of(study: Storage, run: str, *, s3: S3Config) -> Storage:
    """Where a study's processes say what they do with a run; whoever works on the run holds it, from the first moment.

    Args:
        study: The study's directory.
        run: The run's name.
        s3: How S3 is reached.
    """
    return open_storage(study.url_of(f"outcomes/{run}"), s3=s3)


def read_outcome(claim: Storage) -> Outcome | None:
    """What was last said of a run; None before anything was."""
    try:
        return Outcome.model_validate_json(claim.read_bytes(OUTCOME_NAME))
    except (FileNotFoundError, ValidationError):
        return None


def write_outcome(
    claim: Storage,
    *,
    state: Literal["running", "stopped", "failed", "done"],
    seconds_s: float,
    error: str | None = None,
) -> None:
    """Say what has become of a run."""
    now = datetime.datetime.now(datetime.UTC)
    outcome = Outcome(state=state, time=now, seconds_s=round(seconds_s, 2), error=error)
    claim.write_json(OUTCOME_NAME, outcome.model_dump(mode="json"))


def read_study(url: str, *, s3: S3Config) -> StudyResult:
    """A study as it is now: its runs by `study.json`, what they have come to by their own files; changes nothing.

    Raises:
        ArtifactError: the directory holds no study.
    """
    storage = open_storage(url, s3=s3)
    try:
        before = StudyResult.model_validate_json(storage.read_bytes(STUDY_NAME))
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"status of {url}: it must hold the {STUDY_NAME} of a study; run the spec of the study to write it anew"
        ) from error
    runs = [_now(run, kind=before.kind, url=url, s3=s3, study=storage) for run in before.runs]
    return before.model_copy(update={"runs": tuple(runs)})


def _now(run: RunResult, *, kind: str, url: str, s3: S3Config, study: Storage) -> RunResult:
    storage = open_storage(f"{url.rstrip('/')}/{run.name}", s3=s3)
    try:
        found = find_run(storage, kind=kind, spec=stored_spec(storage))
    except FileNotFoundError:
        found = Found()
    except ArtifactError as error:
        found = Found(problem=str(error))
    return result_of_run(storage, claim_of(study, run.name, s3=s3), name=run.name, cases=run.cases, found=found)


def _finite(value: Any) -> Measure | None:
    measure = value if isinstance(value, Measure) else None if value is None else Measure(value=value)
    return measure if measure is not None and math.isfinite(measure.value) else None
