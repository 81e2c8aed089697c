"""Every spec that ships is valid, and the specs of the demo fit each other."""

from pathlib import Path

import pytest

from jobs.demo import STAGES
from jobs.grid import Study, load_job
from jobs.spec import SPECS_DIR, load_spec, shipped_spec
from pipeline.config import TokenizeConfig
from training.config import SampleConfig, TrainConfig

SPECS = sorted(SPECS_DIR.glob("*.yaml"))


def test_there_is_a_spec_of_every_kind() -> None:
    assert {load_job(path).kind for path in SPECS} == {"fit_tokenizer", "tokenize", "train", "sample", "evaluate"}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_shipped_spec_is_valid(path: Path) -> None:
    spec = load_job(path)
    assert not Path(spec.run_dir).is_absolute()
    assert path.read_text().startswith("# "), "a spec begins with a line that says what it is for"


def test_the_recipes_of_the_study_differ_in_what_they_compare_alone() -> None:
    study = load_job(shipped_spec("study_recipes"))
    assert isinstance(study, Study)
    assert len(study.runs) == 20 * 3
    assert len({run.spec.model_dump_json(exclude={"run_dir"}) for run in study.runs}) == 60
    compared = {"run_dir", "seed", "recipe", "noise", "model", "data", "optimizer"}
    assert len({run.spec.model_dump_json(exclude=compared) for run in study.runs}) == 1
    for run in study.runs:
        assert isinstance(run.spec, TrainConfig)
        assert run.spec.model.dim == 192
        assert run.spec.optimizer.module_warmup_steps == (100 if "warmed-up" in run.name else 0)
        assert run.spec.noise.own_draft_fraction == 0.75 or "tuned" not in run.name


def test_the_study_evaluates_the_recipes_that_it_trains() -> None:
    trained, evaluated = (load_job(shipped_spec(f"study_{name}")) for name in ("recipes", "evaluation"))
    assert isinstance(trained, Study)
    assert isinstance(evaluated, Study)
    assert {run.name for run in evaluated.runs} == {run.name for run in trained.runs}


def test_the_demos_stages_read_what_earlier_stages_wrote() -> None:
    specs = [load_spec(shipped_spec(stage.spec)) for stage in STAGES]
    written: set[str] = set()
    for spec in specs:
        if isinstance(spec, TrainConfig):
            assert {spec.data.shards, *([spec.warm_start] if spec.warm_start else [])} <= written
            assert spec.validation is not None
            assert spec.validation.shards in written
        if isinstance(spec, SampleConfig):
            assert spec.weights in written
        written.add(spec.run_dir)
    assert len(written) == len(specs)


def test_the_demos_two_models_differ_in_the_window_alone_and_draw_the_same_pictures() -> None:
    specs = {stage.name: load_spec(shipped_spec(stage.spec)) for stage in STAGES}
    base, tensorar = specs["base"], specs["tensorar"]
    assert isinstance(base, TrainConfig)
    assert isinstance(tensorar, TrainConfig)
    assert (base.model.window_size, tensorar.model.window_size) == (1, 4)
    assert base.model.model_copy(update={"window_size": 4}) == tensorar.model
    first, second = specs["sample_base"], specs["sample_tensorar"]
    assert isinstance(first, SampleConfig)
    assert isinstance(second, SampleConfig)
    assert (first.labels, first.seed, first.num_per_label) == (second.labels, second.seed, second.num_per_label)


def test_the_demos_tokenizer_is_the_same_everywhere() -> None:
    specs = [load_spec(shipped_spec(stage.spec)) for stage in STAGES]
    tokenizers = {spec.tokenizer for spec in specs if isinstance(spec, TokenizeConfig | SampleConfig)}
    assert len(tokenizers) == 1
