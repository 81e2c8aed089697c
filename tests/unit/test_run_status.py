"""What `tensorar status` tells of a run of each kind: how far it is, its measures, and what is wrong with it."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from synthetic_checkpoints import write_checkpoint
from test_cli import call

from jobs.run import remember_spec
from jobs.spec import load_spec, shipped_spec
from pipeline.ledger import PoisonRecord, write_poison
from pipeline.local_storage import exclusive
from pipeline.storage import open_storage


def told_rows(result: Result) -> dict[str, str]:
    """Name and value of the lines of a table without a heading."""
    cells = [line.strip("\u2502").split("\u2502") for line in result.stdout.splitlines() if "\u2502" in line]
    return {name.strip(): value.strip() for name, value in cells}


def test_status_of_a_training_run_is_its_step_its_measures_and_its_speed(tmp_path: Path) -> None:
    spec = load_spec(shipped_spec("train_base"), [f"run_dir={tmp_path / 'run'}", "num_steps=20"])
    remember_spec(spec)
    assert told_rows(call("status", str(tmp_path / "run"))) == {
        "kind": "train",
        "state": "not done; run the spec again to go on",
    }
    line = {
        "step": 10,
        "split": "train",
        "elapsed_s": 4.0,
        "loss": 2.5,
        "loss_of_offset": [2.25],
        "samples_per_s": 160.0,
    }
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with exclusive(tmp_path / "run"):
        result = call("status", str(tmp_path / "run"))
    assert (result.exit_code, told_rows(result)) == (
        0,
        {
            "kind": "train",
            "state": "running",
            "progress": "step 10 of 20",
            "train_loss_0": "2.250",
            "train_loss": "2.500",
            "steps": "10",
            "seconds": "4",
            "samples per s": "160.0",
        },
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{torn", "line 1 must be JSON, got '{torn'; remove it"),
        ("{}", "its lines must be those of a training run, got KeyError 'split'; remove those that are not"),
    ],
)
def test_status_of_a_training_run_with_a_broken_line_tells_its_checkpoint_and_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    remember_spec(load_spec(shipped_spec("train_base"), [f"run_dir={tmp_path / 'run'}", "num_steps=20"]))
    good = {"step": 20, "split": "train", "elapsed_s": 4.0, "loss": 2.5, "loss_of_offset": [2.25]}
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(f"{line}\n{json.dumps(good)}\n")
    expected = {
        "kind": "train",
        "state": "not done; the problem must be mended first",
        "problem": f"read {path}: {said}",
    }
    assert told_rows(call("status", str(tmp_path / "run"))) == expected
    write_checkpoint(open_storage(str(tmp_path / "run")), 10)
    result = call("status", str(tmp_path / "run"))
    assert (result.exit_code, told_rows(result)) == (0, expected | {"progress": "step 10 of 20"})
    write_checkpoint(open_storage(str(tmp_path / "run")), 20)
    done = {"state": "done", "progress": "step 20 of 20"}
    assert told_rows(call("status", str(tmp_path / "run"))) == expected | done


def test_status_of_a_run_with_damaged_results_is_the_whole_problem(tmp_path: Path) -> None:
    remember_spec(load_spec(shipped_spec("sample_base"), [f"run_dir={tmp_path / 'run'}"]))
    (tmp_path / "run" / "samples.json").write_text("[3]")
    lines = call("status", str(tmp_path / "run")).stdout.splitlines()
    told = "".join(line.strip("\u2502 ").rpartition("\u2502")[2].strip() for line in lines[1:]).replace(" ", "")
    assert "notdone;theproblemmustbemendedfirst" in told
    assert f"readtheresultsof{tmp_path / 'run'}:itsfilesmustbe" in told
    assert ";removethedirectorytorunitanew" in told


def test_status_of_a_sample_run_says_that_it_is_done(tmp_path: Path) -> None:
    remember_spec(load_spec(shipped_spec("sample_base"), [f"run_dir={tmp_path / 'run'}"]))
    record = {"flip_rate": None, "num_backbone_calls": 64, "images_per_s": 12.5}
    (tmp_path / "run" / "samples.json").write_text(json.dumps(record))
    result = call("status", str(tmp_path / "run"))
    expected = {"kind": "sample", "state": "done", "num_backbone_calls": "64", "images_per_s": "12.50"}
    assert (result.exit_code, told_rows(result)) == (0, expected)


@pytest.mark.parametrize("name", ["photos[raw].tar", "[/data] photos.tar", "a:gem:b.tar"])
def test_a_name_with_brackets_or_colons_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    storage = open_storage(str(tmp_path))
    storage.write_bytes("plan.json", b'{"num_units": 1}')
    write_poison(storage, "00000", PoisonRecord(unit_index=0, unit=name, problems=["damaged"]))
    result = call("status", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert name in result.stdout


def test_status_refuses_a_directory_that_is_no_run(tmp_path: Path) -> None:
    result = call("status", str(tmp_path))
    rule = "it must be the run_dir of a job or a study, got no spec.json; check the path"
    assert (result.exit_code, result.stderr) == (1, f"error: status of {tmp_path}: {rule}\n")
