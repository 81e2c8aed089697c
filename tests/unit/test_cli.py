"""The commands: exit codes, what goes to stderr, and what is told at the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from synthetic_checkpoints import prepare, record_of
from synthetic_shards import train_config, write_shard_set

from jobs.cli import _command, _outcome, _told, main
from jobs.run import remember_spec, run_spec
from jobs.spec import load_spec, shipped_spec
from pipeline.ledger import read_manifest
from pipeline.local_storage import exclusive, write_json
from pipeline.storage import ArtifactError, open_storage
from training.checkpoint import commit_checkpoint, set_record


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
        f"{first}:1: kind must be one of fit_tokenizer, tokenize, train, sample, evaluate, got 'trian'; "
        "did you mean train?",
        f"{second}:6: sede is not a field; did you mean seed?",
    ]
    assert "train_base.yaml: a valid train spec" in result.stdout


def test_validate_lays_the_values_of_the_command_over_every_spec(tmp_path: Path) -> None:
    paths = [str(shipped_spec(name)) for name in ("train_base", "train_tensorar")]
    result = call("validate", *paths, "--set", f"run_dir={tmp_path}")
    assert result.stdout == "".join(f"{path}: a valid train spec, run_dir {tmp_path}\n" for path in paths)
    result = call("validate", *paths, "--set", "num_stepz=3")
    assert result.exit_code == 2
    problem = "--set num_stepz=3: num_stepz is not a field; did you mean num_steps?"
    assert result.stderr.splitlines() == [f"{path}: {problem}" for path in paths]


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


def begin(run_dir: Path) -> None:
    """Leave a checkpoint behind."""
    write_json(run_dir / "checkpoints" / "step_00000001" / "record.json", {})


def test_the_resolved_spec_is_kept_and_another_one_is_refused(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(path, [place, "num_steps=5", "seed=0", "model.dropout=0.1"]))
    begin(tmp_path / "run")
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


def test_a_run_of_a_version_without_a_field_goes_on_with_its_default_only(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(path, [place]))
    begin(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "spec.json").read_text())
    del kept["noise"]["coupling"]  # as if it had been added since
    (tmp_path / "run" / "spec.json").write_text(json.dumps(kept))
    remember_spec(load_spec(path, [place, "noise.coupling=independent"]))
    with pytest.raises(ArtifactError, match=r"noise\.coupling \(there 'independent', in the spec 'shared'\)"):
        remember_spec(load_spec(path, [place, "noise.coupling=shared"]))


def test_fields_that_do_not_change_the_result_are_free(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(path, [place]))
    remember_spec(load_spec(path, [place, "cluster.num_workers=1", "log_every_n_steps=7", "engine.ops=reference"]))
    remember_spec(load_spec(path, [place, "cluster.num_workers=1", "log_every_n_steps=7", "num_steps=2000"]))
    kept = json.loads((tmp_path / "run" / "spec.json").read_text())
    assert (kept["cluster"]["num_workers"], kept["log_every_n_steps"], kept["num_steps"]) == (1, 7, 2000)


def test_a_shard_set_may_move_but_not_change_while_a_run_goes_on(tmp_path: Path) -> None:
    here = write_shard_set(tmp_path / "here")
    spec = train_config(tmp_path / "run", shards=here)
    remember_spec(spec)
    storage, trained_on = open_storage(str(tmp_path / "run")), set_record(read_manifest(open_storage(str(here))))
    prepare(storage, 1)
    commit_checkpoint(storage, record_of(1).model_copy(update={"training_sets": (trained_on,)}))
    moved = here.rename(tmp_path / "moved")
    remember_spec(train_config(tmp_path / "run", shards=moved))
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["data"]["shards"] == str(moved)
    grown = write_shard_set(tmp_path / "grown", samples_per_shard=(40, 24, 33, 16))
    with pytest.raises(
        ArtifactError, match=r"these fields differ: data\.shards \(there '.*/moved', in .* '.*/grown'\)"
    ):
        remember_spec(train_config(tmp_path / "run", shards=grown))


def test_verify_refuses_a_directory_that_is_no_run(tmp_path: Path) -> None:
    result = call("verify", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: verify {tmp_path}: the directory must be the run_dir of a tokenize, a train or a fit_tokenizer "
        "job, got neither plan.json nor checkpoints/ in it; check the path\n"
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


def test_a_spec_that_failed_before_anything_was_done_may_be_mended(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(path, [place, "data.seed=7"]))
    (tmp_path / "run" / "checkpoints" / "step_00000001.partial").mkdir(parents=True)  # of a killed save
    remember_spec(load_spec(path, [place, "data.seed=8"]))
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["data"]["seed"] == 8
    begin(tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"data\.seed \(there 8, in the spec 7\)"):
        remember_spec(load_spec(path, [place, "data.seed=7"]))


def test_a_run_that_lost_its_spec_json_is_held_to_that_of_its_checkpoint(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    spec = load_spec(path, [place, "seed=1"])
    record = record_of(1).model_copy(update={"spec": spec.model_dump(mode="json")})
    storage = open_storage(str(tmp_path / "run"))
    prepare(storage, 1)
    commit_checkpoint(storage, record)
    with pytest.raises(ArtifactError, match=r"these fields differ: seed \(there 1, in the spec 2\)"):
        remember_spec(load_spec(path, [place, "seed=2"]))
    remember_spec(spec)
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["seed"] == 1


def test_a_command_that_is_refused_leaves_the_spec_of_the_job_at_work(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(path, [place, "num_steps=6000"]))
    with exclusive(tmp_path / "run"), pytest.raises(ArtifactError, match="one job at a time may write a directory"):
        remember_spec(load_spec(path, [place, "num_steps=7"]))
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["num_steps"] == 6000


def test_the_spec_of_a_job_at_work_is_not_replaced(tmp_path: Path) -> None:
    path, place = shipped_spec("train_base"), f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(path, [place, "seed=1"]))
    with exclusive(tmp_path / "run"), pytest.raises(ArtifactError, match="one job at a time may write a directory"):
        remember_spec(load_spec(path, [place, "seed=2"]))
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["seed"] == 1


def test_a_directory_of_another_kind_is_refused_by_naming_the_kinds(tmp_path: Path) -> None:
    place = f"run_dir={tmp_path / 'run'}"
    remember_spec(load_spec(shipped_spec("train_base"), [place]))
    begin(tmp_path / "run")
    with pytest.raises(ArtifactError) as caught:
        remember_spec(load_spec(shipped_spec("sample_base"), [place]))
    assert "these fields differ: kind (there 'train', in the spec 'sample'); set another" in str(caught.value)


def test_of_torchruns_processes_only_the_first_keeps_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    overrides = [f"run_dir={tmp_path / 'run'}", "cluster.launcher=torchrun"]
    with pytest.raises(ValueError, match="join ranks: "):
        run_spec(load_spec(shipped_spec("train_base"), overrides))
    assert not (tmp_path / "run" / "spec.json").exists()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="join ranks: "):
        run_spec(load_spec(shipped_spec("train_base"), overrides))
    assert (tmp_path / "run" / "spec.json").exists()


def test_one_fit_at_a_time_may_write_a_directory(tmp_path: Path) -> None:
    spec = load_spec(shipped_spec("fit_open_emoji"), [f"run_dir={tmp_path / 'run'}"])
    with exclusive(tmp_path / "run"), pytest.raises(ArtifactError, match="one job at a time may write a directory"):
        run_spec(spec)


def test_an_error_of_the_operating_system_names_the_path_and_what_to_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("run", str(shipped_spec("train_base")), "--set", f"run_dir={tmp_path / 'file'}")
    assert result.exit_code == 1
    place = tmp_path / "file" / "spec.json"
    assert (
        result.stderr == f"error: open {place}: not a directory; check the path, its permissions and the free space\n"
    )


def test_the_next_command_of_a_training_run_samples_with_the_spec_of_its_window(tmp_path: Path) -> None:
    for name, sampling in (("train_base", "sample_base"), ("train_tensorar", "sample_tensorar")):
        spec = load_spec(shipped_spec(name), [f"run_dir={tmp_path}/my run"])
        told = _outcome(spec, None, command="not used")
        path = shipped_spec(sampling)
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        assert told.splitlines()[1] == (
            f"next: tensorar run {shown} --set 'weights={tmp_path}/my run' --set 'run_dir={tmp_path}/my run-samples'"
        )


def test_the_next_command_of_a_sample_run_can_be_pasted() -> None:
    spec = load_spec(shipped_spec("sample_base"), ["labels=[1, 2]", "run_dir=r", "seed=4"])
    told = _outcome(spec, None, command=_command("s.yaml", ["labels=[1, 2]", "run_dir=r", "seed=4"]))
    assert told.splitlines()[1] == (
        "next:     tensorar run s.yaml --set 'labels=[1, 2]' --set run_dir=r --set seed=4 "
        "--set run_dir=r-2 --set seed=5"
    )


def test_demo_tells_the_problems_of_all_stages_as_they_were_typed(tmp_path: Path) -> None:
    words = ["bose.num_steps=3", "base.num_stepz=1", "sample_base.sede=2"]
    result = call("demo", "--dir", str(tmp_path / "demo"), *(part for word in words for part in ("--set", word)))
    assert result.exit_code == 2
    assert [line.partition(" is ")[0].partition(": an ")[0] for line in result.stderr.splitlines()] == [
        "--set bose.num_steps=3",
        "--set base.num_stepz=1: num_stepz",
        "--set sample_base.sede=2: sede",
    ]


def test_a_full_disk_is_told_in_our_form() -> None:
    assert _told(OSError(28, "No space left on device")) == (
        "write or read a file: no space left on device; check the path, its permissions and the free space"
    )


def test_one_torchrun_at_a_time_may_write_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [f"run_dir={tmp_path / 'run'}", "cluster.launcher=torchrun"]
    spec = load_spec(shipped_spec("train_base"), overrides)
    monkeypatch.setenv("RANK", "0")
    with exclusive(tmp_path / "run"), pytest.raises(ArtifactError, match="one job at a time may write a directory"):
        run_spec(spec)
    monkeypatch.setenv("RANK", "1")  # the first rank holds the lock for all
    with exclusive(tmp_path / "run"), pytest.raises(ValueError, match="join ranks: "):
        run_spec(spec)


@pytest.mark.parametrize("option", ["--dir", "--data"])
def test_a_url_where_the_demo_needs_a_directory_is_a_wrong_command(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("demo", option, "s3://bucket/x")
    assert result.exit_code == 2
    assert "open s3://bucket/x: storage must be local or mounted, got 's3://bucket/x'; use a directory path" in (
        result.stderr
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "verify", "preview", "export"])
def test_an_endpoint_without_its_scheme_is_a_wrong_command(command: str) -> None:
    done = CliRunner().invoke(main, [command, "s3://bucket/x", "--endpoint-url", "user:hidden@127.0.0.1:9000"])
    rule = "an endpoint must begin with http:// or https://, got '127.0.0.1:9000'; write it before the host"
    told = f"Error: Invalid value for '--endpoint-url': {rule}"
    assert (done.exit_code, done.output.splitlines()[-1]) == (2, told)
    assert "hidden" not in done.output
