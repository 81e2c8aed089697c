"""Runs a study: the runs of a spec's grid one after another, with one table and one report of what they came to.

Invariant: a run of a study is a job like any other in a directory of its own, and all that is known of it is read from
there; so the study resumes by running it again, and any number of processes may work on it at once. Each takes runs
that nobody holds, and comes back to the others until every one is done or has failed. A run that fails does not stop
the rest; it is tried again when the study is.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from jobs.grid import Study, StudyRun
from jobs.results import Found, find_run
from jobs.run import RunStoppedError, difference_from, remember_spec, run_spec
from jobs.study_report import REPORT_NAME, report_page
from jobs.study_results import (
    STUDY_NAME,
    EndState,
    StudyResult,
    claim_of,
    read_outcome,
    result_of_run,
    write_outcome,
)
from jobs.study_table import markdown
from pipeline.sigterm import Sigterm, TerminatedError, raised_on_sigterm
from pipeline.storage import ArtifactError, DirectoryInUseError, Storage, open_storage

logger = logging.getLogger(__name__)

TABLE_NAME = "table.md"
WAIT_S = 2.0
"""Pause before runs that other processes hold are looked at again."""
MAX_LOCKED_S = 60.0
"""How long another process may be at writing the report."""


class StudyFailedError(RuntimeError):
    """Runs of a study failed; one line each."""


def run_study(
    study: Study, *, selections: Sequence[str] = (), fail_fast: bool = False, progress: bool = True
) -> StudyResult:
    """What all runs of a study have come to, once those asked for are done.

    Args:
        study: What to run.
        selections: Runs only those that one of them names, such as `recipe=control`.
        fail_fast: Whether to stop at the first run that fails.
        progress: Whether to show live progress where the job has it.

    Raises:
        SpecError: a selection names no run.
        StudyFailedError: runs failed; the others are done.
        RunStoppedError: SIGTERM, or a stopped training run; running the study again goes on.
        ArtifactError: the study's directory cannot be used.
    """
    chosen = study.selected(selections)
    storage = open_storage(study.run_dir, s3=study.s3)
    waiting = list(chosen)
    with _stopped_on_sigterm(study) as sigterm:
        worker = _Worker(study, storage, sigterm=sigterm, fail_fast=fail_fast, progress=progress)
        publish(study, storage, with_report=False)
        while waiting:
            held = [run for run in waiting if not worker.take(run)]
            if len(held) == len(waiting):
                logger.info("study %s: runs_held_by_others=%d", study.run_dir, len(held))
                time.sleep(WAIT_S)
            waiting = held
        result = publish(study, storage)
    names = {run.name for run in chosen}
    failed = [run for run in result.runs if run.state == "failed" and run.name in names]
    if failed:
        told = "\n".join(f"  {run.name}: {run.error}" for run in failed)
        rule = f"{len(failed)} of {len(chosen)} runs failed; mend the cause and run it again"
        raise StudyFailedError(f"study {study.run_dir}: {rule}:\n{told}")
    return result


def read_results(study: Study) -> StudyResult:
    """What the runs of a study have come to so far; changes nothing."""
    storage, results = open_storage(study.run_dir, s3=study.s3), []
    for run in study.runs:
        directory = open_storage(run.spec.run_dir, s3=study.s3)
        found = _found(run, directory)
        claim = claim_of(storage, run.name, s3=study.s3)
        results.append(result_of_run(directory, claim, name=run.name, cases=run.cases, found=found))
    return StudyResult(kind=study.kind, run_dir=study.run_dir, runs=tuple(results), baseline=study.baseline)


def _found(run: StudyRun, directory: Storage) -> Found:
    """What a run's files say, if they are those of its spec."""
    found = find_run(directory, kind=run.spec.kind, spec=run.spec.model_dump(mode="json"))
    try:
        difference = difference_from(directory, run.spec)
    except ArtifactError as error:
        return Found(problem=str(error))
    if found.is_done and difference is not None:
        rule = f"{directory} must hold a run of this spec, but these fields differ: {difference}"
        return Found(problem=f"{rule}; run the study into another run_dir, or remove the run's")
    return found


class _Worker:
    """One process at work on a study."""

    def __init__(self, study: Study, storage: Storage, *, sigterm: Sigterm, fail_fast: bool, progress: bool) -> None:
        self._study, self._storage, self._sigterm = study, storage, sigterm
        self._fail_fast, self._progress = fail_fast, progress
        self._began = datetime.datetime.now(datetime.UTC)

    def take(self, run: StudyRun) -> bool:
        """Do what is left of a run and say what has become of it; False where another process holds it."""
        self._sigterm.check()
        claim = claim_of(self._storage, run.name, s3=self._study.s3)
        try:
            with claim.exclusive():
                self._work(run, claim)
        except DirectoryInUseError:
            return False
        return True

    def _work(self, run: StudyRun, claim: Storage) -> None:
        """Run it; raises DirectoryInUseError where it is being run without the study."""
        directory = open_storage(run.spec.run_dir, s3=self._study.s3)
        outcome = read_outcome(claim)
        seconds_s = 0.0 if outcome is None else outcome.seconds_s
        if outcome is not None and outcome.state == "failed" and outcome.time > self._began:
            return  # another process has just tried it
        if (outcome is None or outcome.state == "done") and _found(run, directory).is_done:
            self._attempt(run, claim, seconds_s=seconds_s, is_done=True)
            return
        with directory.exclusive():
            pass  # some jobs prepare for long before they look
        logger.info("study %s: run %s begins", self._study.run_dir, run.name)
        write_outcome(claim, state="running", seconds_s=seconds_s)
        self._attempt(run, claim, seconds_s=seconds_s, is_done=False)

    def _attempt(self, run: StudyRun, claim: Storage, *, seconds_s: float, is_done: bool) -> None:
        """Run it; of a run that is done only what says so is looked at, which counts no time."""
        began = time.monotonic()

        def say(state: EndState, error: str | None = None) -> None:
            seconds = seconds_s if is_done else seconds_s + time.monotonic() - began
            write_outcome(claim, state=state, seconds_s=seconds, error=error)
            publish(self._study, self._storage)

        try:
            if is_done and run.spec.kind == "train":
                remember_spec(run.spec)  # launching would hash its whole checkpoint
            else:
                run_spec(run.spec, progress=self._progress)
        except DirectoryInUseError:
            raise
        except (RunStoppedError, KeyboardInterrupt):
            say("stopped")
            raise
        except Exception as error:  # told here, and again at the end of the study
            self._fail(run, error, say=say)
        else:
            if not is_done:
                say("done")
                logger.info("study %s: run %s is done", self._study.run_dir, run.name)

    def _fail(self, run: StudyRun, error: Exception, *, say: Callable[[EndState, str], None]) -> None:
        is_known = isinstance(error, RuntimeError | ValueError | OSError | ArithmeticError)
        logger.error("study %s: run %s failed: %s", self._study.run_dir, run.name, error, exc_info=not is_known)
        first_line = next(iter(str(error).splitlines()), "") if is_known else repr(error)
        say("failed", first_line)
        if self._fail_fast:
            told = f"stopped at the first run that failed, {run.name}: {first_line}"
            raise StudyFailedError(f"study {self._study.run_dir}: {told}") from error


def publish(study: Study, storage: Storage, *, with_report: bool = True) -> StudyResult:
    """Write study.json, and from it table.md and report.html, as the runs are now; return what study.json says.

    Raises:
        ArtifactError: another process has been at it for a minute, or a file cannot be read or written.
    """
    with _locked(storage):
        result = read_results(study)
        storage.write_json(STUDY_NAME, result.model_dump(mode="json"))
        if with_report:
            storage.write_bytes(TABLE_NAME, markdown(result).encode())
            storage.write_bytes(REPORT_NAME, report_page(result, s3=study.s3).encode())
    return result


@contextmanager
def _locked(storage: Storage) -> Iterator[None]:
    """Hold the study's own directory, so that what is read last is also written last."""
    end = time.monotonic() + MAX_LOCKED_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(storage.exclusive())
                break
            except DirectoryInUseError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield


@contextmanager
def _stopped_on_sigterm(study: Study) -> Iterator[Sigterm]:
    """Listen to SIGTERM, as training runs do themselves meanwhile, and name the study that it stops."""
    try:
        with raised_on_sigterm() as sigterm:
            yield sigterm
    except RunStoppedError as stopped:
        raise RunStoppedError(f"study {study.run_dir}: {stopped}") from stopped
    except TerminatedError as stopped:
        raise RunStoppedError(f"study {study.run_dir}: SIGTERM: stopped; run it again to go on") from stopped
