"""A study's runs, really run in this process: skipped, failed, held by others, stopped, and what is left on disk."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sample_study import NAMES, results_of, write_sample_study, write_tiny_weights

from jobs.cli import main
from jobs.grid import Study, load_job
from jobs.results import Found
from jobs.run import RunStoppedError, run_spec
from jobs.study import StudyFailedError, publish, run_study
from jobs.study_results import Outcome, StudyResult, claim_of, read_study, state_of, write_outcome
from pipeline.config import S3Config
from pipeline.local_storage import exclusive
from pipeline.storage import open_storage


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def spec(tmp_path: Path, weights: Path) -> Path:
    return write_sample_study(tmp_path, weights=weights)


def study_of(spec: Path, *overrides: str) -> Study:
    study = load_job(spec, overrides)
    assert isinstance(study, Study)
    return study


def states(result: StudyResult) -> list[str]:
    return [run.state for run in result.runs]


@contextmanager
def held_until(directory: Path, release: threading.Event) -> Iterator[None]:
    """Another holder of a directory, in a thread, until the event."""
    is_held = threading.Event()

    def hold() -> None:
        with exclusive(directory):
            is_held.set()
            release.wait(timeout=60)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait(timeout=60)
    try:
        yield
    finally:
        release.set()
        thread.join()


def test_every_run_is_done_in_its_own_directory_and_told_in_three_files(spec: Path) -> None:
    result = run_study(study_of(spec))
    assert states(result) == ["done"] * 4
    directory = spec.parent / "study"
    assert [run.name for run in result.runs] == NAMES
    for name in NAMES:
        record = json.loads((directory / name / "samples.json").read_text())
        assert record["labels"] == [1 if "apple" in name else 2] * 2
        assert record["seed"] == int(name[-1])
    kept = json.loads((directory / "study.json").read_text())
    assert (kept["version"], kept["kind"], len(kept["runs"])) == (1, "sample", 4)
    first = json.loads((directory / NAMES[0] / "samples.json").read_text())
    assert kept["runs"][0]["measures"]["flip_rate"]["value"] == first["flip_rate"]
    assert kept["runs"][0]["seconds_s"] > 0
    table = (directory / "table.md").read_text()
    assert [line.split(" | ")[:2] for line in table.splitlines()[4:6]] == [["| apple", "2 of 2"], ["| bear", "2 of 2"]]
    page = (directory / "report.html").read_text()
    assert "4 of 4 runs done" in page
    assert "http" not in page


def test_running_it_again_does_nothing_again_and_a_lost_study_json_is_written_anew(
    tmp_path: Path, weights: Path
) -> None:
    own = shutil.copytree(weights, tmp_path / "weights")
    spec = write_sample_study(tmp_path, weights=own)
    first = run_study(study_of(spec))
    before = results_of(spec.parent / "study")
    (spec.parent / "study" / "study.json").unlink()
    shutil.rmtree(own)  # without weights nothing can be sampled
    assert run_study(study_of(spec)) == first
    assert results_of(spec.parent / "study") == before
    assert json.loads((spec.parent / "study" / "study.json").read_text()) == first.model_dump(mode="json")


def test_a_subset_is_run_and_the_others_stay_to_do(spec: Path) -> None:
    result = run_study(study_of(spec), selections=["labels=bear,seed=0", "labels=apple,seed=1"])
    assert states(result) == ["to do", "done", "done", "to do"]
    assert not (spec.parent / "study" / NAMES[0]).exists()


def test_a_run_that_fails_is_recorded_stops_no_other_and_is_tried_again(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("labels: [1]", "labels: [9]"))
    with pytest.raises(StudyFailedError) as caught:
        run_study(study_of(spec))
    lines = str(caught.value).splitlines()
    assert lines[0] == (f"study {spec.parent}/study: 2 of 4 runs failed; mend the cause and run it again:")
    assert lines[1].startswith("  labels=apple,seed=0: sample from ")
    assert "labels must be in [0, 4], got [9]" in lines[1]
    result = read_study(str(spec.parent / "study"), s3=S3Config())
    assert states(result) == ["failed", "failed", "done", "done"]
    assert result.runs[0].error == lines[1].partition(": ")[2]
    done = results_of(spec.parent / "study")
    spec.write_text(spec.read_text().replace("labels: [9]", "labels: [3]"))
    assert states(run_study(study_of(spec))) == ["done"] * 4
    assert done.items() <= results_of(spec.parent / "study").items()


def test_a_run_that_another_process_has_just_seen_fail_is_not_tried_at_once(spec: Path) -> None:
    study, release = study_of(spec), threading.Event()
    directory = spec.parent / "study"

    def fail_elsewhere() -> None:
        while len(results_of(directory)) < 3:
            time.sleep(0.01)
        claim = claim_of(open_storage(str(directory)), NAMES[1], s3=S3Config())
        write_outcome(claim, state="failed", seconds_s=1.0, error="no luck")
        release.set()

    thread = threading.Thread(target=fail_elsewhere)
    with held_until(directory / "outcomes" / NAMES[1], release):
        thread.start()
        with pytest.raises(StudyFailedError, match="labels=apple,seed=1: no luck"):
            run_study(study)
        thread.join()
    assert not (directory / NAMES[1] / "samples.json").exists()
    assert states(run_study(study)) == ["done"] * 4


def test_fail_fast_stops_at_the_first_failure(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("labels: [1]", "labels: [9]"))
    with pytest.raises(StudyFailedError, match="stopped at the first run that failed, labels=apple,seed=0: sam"):
        run_study(study_of(spec), fail_fast=True)
    assert states(read_study(str(spec.parent / "study"), s3=S3Config())) == ["failed", "to do", "to do", "to do"]


def test_a_directory_of_another_spec_is_a_failure_of_that_run_alone(spec: Path) -> None:
    run_study(study_of(spec), selections=["seed=0"])
    with pytest.raises(StudyFailedError) as caught:
        run_study(study_of(spec, "num_per_label=3"))
    assert len(str(caught.value).splitlines()) == 3
    assert "these fields differ: num_per_label (there 2, in the spec 3)" in str(caught.value)
    assert states(read_study(str(spec.parent / "study"), s3=S3Config())) == ["failed", "done", "failed", "done"]


@pytest.mark.parametrize("place", [NAMES[0], f"outcomes/{NAMES[0]}"])
def test_a_run_that_another_process_holds_is_passed_over_and_come_back_to(
    spec: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.study.WAIT_S", 0.05)
    directory, release = spec.parent / "study", threading.Event()
    order: list[str] = []

    def release_after_the_others() -> None:
        while len(results_of(directory)) < 3:
            time.sleep(0.01)
        order.extend(sorted(path.name for path in directory.glob("label*") if (path / "samples.json").exists()))
        release.set()

    watcher = threading.Thread(target=release_after_the_others)
    with held_until(directory / place, release):
        watcher.start()
        result = run_study(study_of(spec))
        watcher.join()
    assert order == NAMES[1:]
    assert states(result) == ["done"] * 4


def test_sigterm_stops_the_study_and_the_handler_of_before_is_put_back(spec: Path) -> None:
    before, release = signal.getsignal(signal.SIGTERM), threading.Event()
    directory = spec.parent / "study"

    def stop() -> None:
        while len(results_of(directory)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    with held_until(directory / NAMES[2], release):
        stopper.start()
        with pytest.raises(RunStoppedError) as caught:
            run_study(study_of(spec))
        stopper.join()
    assert str(caught.value) == f"study {directory}: SIGTERM: stopped; run it again to go on"
    assert signal.getsignal(signal.SIGTERM) is before
    assert states(run_study(study_of(spec))) == ["done"] * 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_in_a_finalizer_which_drops_it_stops_the_study_before_the_next_run(
    spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def run_with_finalizer(job: Any, *, progress: bool) -> None:
        run_spec(job, progress=progress)
        Finalized()

    monkeypatch.setattr("jobs.study.run_spec", run_with_finalizer)
    with pytest.raises(RunStoppedError, match="SIGTERM: stopped; run it again to go on"):
        run_study(study_of(spec))
    result = read_study(str(spec.parent / "study"), s3=S3Config())
    assert states(result) == ["done", "to do", "to do", "to do"]


def test_a_run_that_was_run_alone_counts(spec: Path) -> None:
    study = study_of(spec)
    run_spec(study.runs[3].spec)
    publish(study, open_storage(study.run_dir))
    result = read_study(study.run_dir, s3=S3Config())
    assert states(result) == ["to do", "to do", "to do", "done"]
    assert result.runs[3].seconds_s is None


def test_damaged_results_are_a_failure_with_advice_and_stop_no_other(spec: Path) -> None:
    run_study(study_of(spec))
    (spec.parent / "study" / NAMES[1] / "samples.json").write_text("{")
    result = read_study(str(spec.parent / "study"), s3=S3Config())
    assert states(result) == ["done", "failed", "done", "done"]
    assert result.runs[1].error is not None
    assert "remove the directory to run it anew" in result.runs[1].error


def test_a_damaged_spec_of_one_run_is_told_with_that_run(spec: Path) -> None:
    run_study(study_of(spec))
    (spec.parent / "study" / NAMES[1] / "spec.json").write_text('{"kind": "sam')
    result = read_study(str(spec.parent / "study"), s3=S3Config())
    assert states(result) == ["done", "failed", "done", "done"]
    assert result.runs[1].error is not None
    assert "spec.json: it must be the JSON of a spec" in result.runs[1].error


def outcome(state: Any) -> Outcome:
    return Outcome(state=state, time="2026-01-01T00:00:00Z", seconds_s=1.0)


@pytest.mark.parametrize(
    ("said", "is_done", "is_held", "state"),
    [
        (None, False, False, "to do"),
        (None, True, False, "done"),
        ("running", False, True, "running"),
        ("running", True, True, "running"),
        ("running", False, False, "stopped"),
        ("running", True, False, "done"),
        ("stopped", False, False, "stopped"),
        ("done", True, False, "done"),
        ("done", False, False, "to do"),
        ("failed", False, False, "failed"),
        ("failed", True, False, "failed"),
    ],
)
def test_state_of_a_run(said: str | None, is_done: bool, is_held: bool, state: str) -> None:
    said_outcome = None if said is None else outcome(said)
    assert state_of(Found(is_done=is_done), said_outcome, is_held=lambda: is_held) == state


def test_the_commands_validate_run_and_tell_a_study(spec: Path) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, list(words))
        return result.exit_code, result.stdout, result.stderr

    directory = spec.parent / "study"
    assert call("validate", str(spec)) == (0, f"{spec}: a valid study of 4 sample runs, run_dir {directory}\n", "")
    code, _, told = call("run", str(spec), "--only", "labels=aple")
    assert (code, told) == (2, "--only labels=aple: 'aple' is no case of labels; did you mean apple?\n")
    assert not directory.exists()
    code, said, _ = call("run", str(spec), "--only", NAMES[0])
    assert code == 0
    assert said.endswith(f"table:  {directory}/table.md\nreport: {directory}/report.html\n")
    assert [name in said for name in NAMES] == [True, False, False, False]
    code, said, _ = call("status", str(directory))
    assert code == 0
    assert "1 of 4 runs done, 3 to do" in said
    code, _, told = call("run", str(spec), "--set", "grid.labels={bad: {labels: [7]}}")
    assert code == 1
    assert "2 of 2 runs failed" in told
    assert call("plan", str(spec))[0] == 2


def test_a_selection_of_no_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("kind: sample\nrun_dir: x\nweights: y\nlabels: [1]\ntokenizer: {weights: z}\n")
    for words in (["--only", "a=b"], ["--fail-fast"]):
        result = CliRunner().invoke(main, ["run", str(path), *words])
        assert (result.exit_code, result.stderr) == (
            2,
            f"{path}: --only and --fail-fast are for studies, and this spec has no grid; drop them\n",
        )


def test_a_run_of_another_spec_is_no_result_of_this_study(spec: Path) -> None:
    run_study(study_of(spec), selections=["labels=apple"])
    spec.write_text(spec.read_text().replace("apple: {labels: [1]}", "apple: {labels: [3]}"))
    result = run_study(study_of(spec), selections=["labels=bear"])
    assert states(result) == ["failed", "failed", "done", "done"]
    first = result.runs[0]
    assert first.measures == {}
    assert "must hold a run of this spec, but these fields differ: labels (there [1], in the spec [3])" in str(
        first.error
    )
