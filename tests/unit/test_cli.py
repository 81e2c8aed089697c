"""The commands: exit codes, what goes to stderr, and what is told at the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from jobs.run import remember_spec
from jobs.spec import load_spec, shipped_spec
from pipeline.storage import ArtifactError


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_validate_tells_each_good_spec_and_ends_in_zero() -> None:
    path = shipped_spec("train_base")
    result = call("validate", str(path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{path}: a valid train spec, run_dir runs/demo/base\n"


def test_validate_tells_the_problems_of_all_files_and_ends_in_two(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("kind: trian\n")
    second.write_text("kind: sample\nrun_dir: x\nweights: y\nlabels: [1]\ntokenizer: {weights: z}\nsede: 3\n")
    result = call("validate", str(first), str(shipped_spec("train_base")), str(second))
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"{first}:1: kind must be one of fit_tokenizer, tokenize, train, sample, got 'trian'; did you mean train?",
        f"{second}:6: sede is not a field; did you mean seed?",
    ]
    assert "train_base.yaml: a valid train spec" in result.stdout


def test_validate_answers_without_loading_anything_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from jobs.cli import main; "
        f"result = CliRunner().invoke(main, ['validate', {str(shipped_spec('train_tensorar'))!r}]); "
        "assert result.exit_code == 0, result.output; "
        "print([name for name in ('torch', 'ray', 'deepspeed', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_bad_spec_is_not_run(tmp_path: Path) -> None:
    result = call(
        "run", str(shipped_spec("train_base")), "--set", f"run_dir={tmp_path / 'run'}", "--set", "num_stepz=3"
    )
    assert result.exit_code == 2
    assert result.stderr == "--set num_stepz=3: num_stepz is not a field; did you mean num_steps?\n"
    assert not (tmp_path / "run").exists()


def test_a_failure_that_a_user_can_mend_is_one_line_and_ends_in_one(tmp_path: Path) -> None:
    words = [
        "run",
        str(shipped_spec("sample_base")),
        "--set",
        f"run_dir={tmp_path}/s",
        "--set",
        f"weights={tmp_path}/no",
    ]
    result = call(*words)
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] != []
    assert "Traceback" not in result.output
    assert isinstance(call("--debug", *words).exception, ArtifactError | ValueError | OSError)


def test_the_resolved_spec_is_kept_and_another_one_is_refused(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(path, [place, "num_steps=5", "seed=0", "model.dropout=0.1"]))
    kept = json.loads((tmp_path / "run" / "spec.json").read_text())
    assert (kept["kind"], kept["num_steps"], kept["engine"]["zero_stage"]) == ("train", 5, 2)
    with pytest.raises(ArtifactError) as caught:
        remember_spec(load_spec(path, [place, "num_steps=5", "seed=3", "model.dropout=0"]))
    assert str(caught.value) == (
        f"run {tmp_path / 'run'}: a directory must hold one spec's run, but these fields differ: model.dropout (there "
        "0.1, in the spec 0.0), seed (there 0, in the spec 3); "
        "set another run_dir, or remove the directory to begin anew"
    )
    assert json.loads((tmp_path / "run" / "spec.json").read_text()) == kept


def test_fields_that_do_not_change_the_result_are_free(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(path, [place]))
    remember_spec(load_spec(path, [place, "cluster.num_workers=1", "log_every_n_steps=7", "num_steps=2000"]))
    kept = json.loads((tmp_path / "run" / "spec.json").read_text())
    assert (kept["cluster"]["num_workers"], kept["log_every_n_steps"], kept["num_steps"]) == (1, 7, 2000)


def test_verify_refuses_a_directory_that_is_no_run(tmp_path: Path) -> None:
    result = call("verify", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: verify {tmp_path}: the directory must be the run_dir of a tokenize or a train job, "
        "got neither plan.json nor checkpoints/ in it; check the path\n"
    )


def test_demo_refuses_an_override_of_no_stage(tmp_path: Path) -> None:
    result = call("demo", "--dir", str(tmp_path / "demo"), "--set", "bose.num_steps=3")
    assert result.exit_code == 2
    assert result.stderr == (
        "--set bose.num_steps=3: an override must begin with a stage, one of tokenize, tokenize_validation, base, "
        "tensorar, sample_base, sample_tensorar\n"
    )
    assert not (tmp_path / "demo").exists()


def test_version_is_told() -> None:
    assert call("--version").output == "tensorar, version 0.1.0\n"
