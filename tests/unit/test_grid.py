"""A spec with a grid: which runs it has, what they are called, and what a person reads when it is wrong."""

from itertools import product
from pathlib import Path

import pytest

from jobs.axes import case_name
from jobs.grid import Study, load_job
from jobs.spec import SpecError, load_spec
from training.config import SampleConfig, TrainConfig

TRAIN = """\
kind: train
run_dir: runs/study
data: {shards: runs/codes}
model: {size: B, window_size: 4}
num_steps: 5
"""


def study(tmp_path: Path, grid: str, *overrides: str, base: str = TRAIN) -> Study:
    path = tmp_path / "spec.yaml"
    path.write_text(base + grid)
    job = load_job(path, overrides)
    assert isinstance(job, Study)
    return job


def problems(tmp_path: Path, grid: str, *overrides: str, base: str = TRAIN) -> list[str]:
    with pytest.raises(SpecError) as caught:
        study(tmp_path, grid, *overrides, base=base)
    return [problem.replace(str(tmp_path / "spec.yaml"), "spec.yaml") for problem in caught.value.problems]


def test_the_runs_are_the_product_of_the_axes(tmp_path: Path) -> None:
    grid = """\
grid:
  model.window_size: [1, 4, 8]
  noise.schedule: [exponential, full]
  data:
    small: {data.seed: 7, data.shards: runs/small}
    large: {}
  seed: [0, 3]
"""
    made = study(tmp_path, grid)
    expected = list(product((1, 4, 8), ("exponential", "full"), ("small", "large"), (0, 3)))
    assert (made.kind, made.run_dir, len(expected)) == ("train", "runs/study", 24)
    assert len(made.runs) == 24
    for run, (window_size, schedule, data, seed) in zip(made.runs, expected, strict=True):
        assert isinstance(run.spec, TrainConfig)
        assert run.name == f"window_size={window_size},schedule={schedule},data={data},seed={seed}"
        assert run.cases == {
            "window_size": str(window_size),
            "schedule": schedule,
            "data": data,
            "seed": str(seed),
        }
        assert run.spec.run_dir == f"runs/study/{run.name}"
        assert (run.spec.model.window_size, run.spec.noise.schedule, run.spec.seed) == (window_size, schedule, seed)
        shards = ("runs/small", 7) if data == "small" else ("runs/codes", 0)
        assert (run.spec.data.shards, run.spec.data.seed) == shards
        assert (run.spec.model.size, run.spec.num_steps) == ("B", 5)


def test_a_run_is_the_spec_with_its_values_written_out(tmp_path: Path) -> None:
    grid = "grid:\n  recipe: {weighted: {noise.offset_weights: [1, 0.1, 0.1, 0.1], noise.own_draft_fraction: 0.5}}\n"
    (run,) = study(tmp_path, grid).runs
    (tmp_path / "spec.yaml").write_text(
        TRAIN.replace("runs/study", "runs/study/recipe=weighted")
        + "noise: {offset_weights: [1, 0.1, 0.1, 0.1], own_draft_fraction: 0.5}\n"
    )
    assert run.spec == load_spec(tmp_path / "spec.yaml")


def test_texts_may_name_the_run_and_its_cases(tmp_path: Path) -> None:
    base = """\
kind: sample
run_dir: runs/pictures/
weights: runs/train/{run}
labels: [1]
tokenizer: {weights: open-emoji-64}
"""
    grid = """\
grid:
  recipe:
    control: {tokenizer.weights: "{recipe}-of-{seed}"}
    paper: {}
  seed: [0, 1]
"""
    specs = [run.spec for run in study(tmp_path, grid, base=base).runs]
    assert all(isinstance(spec, SampleConfig) for spec in specs)
    assert [
        (spec.run_dir, spec.weights, spec.tokenizer.weights) for spec in specs if isinstance(spec, SampleConfig)
    ] == [
        ("runs/pictures/recipe=control,seed=0", "runs/train/recipe=control,seed=0", "control-of-0"),
        ("runs/pictures/recipe=control,seed=1", "runs/train/recipe=control,seed=1", "control-of-1"),
        ("runs/pictures/recipe=paper,seed=0", "runs/train/recipe=paper,seed=0", "open-emoji-64"),
        ("runs/pictures/recipe=paper,seed=1", "runs/train/recipe=paper,seed=1", "open-emoji-64"),
    ]


def test_brace_patterns_are_no_placeholders(tmp_path: Path) -> None:
    made = study(tmp_path, "grid: {seed: [0]}\n", "data.shards=a{00000..00003}{x,y}")
    assert isinstance(made.runs[0].spec, TrainConfig)
    assert made.runs[0].spec.data.shards == "a{00000..00003}{x,y}"


def test_names_are_safe_on_any_file_system() -> None:
    values = (0.1, 1e-05, -1, True, False, None, "runs/demo/base", "a b,c=d", "k_4.5+x")
    names = ["0.1", "1e-05", "-1", "true", "false", "none", "runs-demo-base", "a-b-c-d", "k_4.5+x"]
    assert [case_name(value) for value in values] == names


def test_overrides_change_the_base_or_an_axis_before_the_grid_is_expanded(tmp_path: Path) -> None:
    grid = "grid:\n  recipe: {a: {}, b: {noise.schedule: full}}\n  seed: [0, 1, 2]\n"
    overrides = ("noise.schedule=linear", "num_steps=9", "grid.seed=[5]", "grid.model.window_size=[2]")
    runs = study(tmp_path, grid, *overrides).runs
    assert [run.name for run in runs] == ["recipe=a,seed=5,window_size=2", "recipe=b,seed=5,window_size=2"]
    specs = [run.spec for run in runs if isinstance(run.spec, TrainConfig)]
    assert [(spec.noise.schedule, spec.num_steps, spec.seed, spec.model.window_size) for spec in specs] == [
        ("linear", 9, 5, 2),
        ("full", 9, 5, 2),
    ]


def test_problems_of_all_runs_are_told_once_at_the_line_of_the_case(tmp_path: Path) -> None:
    grid = """\
warm_start: runs/base,seed={sede}
grid:
  recipe:
    control: {model.window_size: 1}
    paper: {nois.own_draft_fraction: 0.0}
    weighted:
      noise.own_draft_fraction: 1.75
      noise.offset_weights: [1, -1,
                             .1, x]
  sead: [0, 1]
"""
    assert problems(tmp_path, grid) == [
        "spec.yaml:6: warm_start: {sede} is no axis of the grid; did you mean sead?",
        "spec.yaml:10: nois is not a field; did you mean noise? (in run recipe=paper,sead=0 and 1 more)",
        "spec.yaml:12: noise.own_draft_fraction must be at most 1, got 1.75 (in run recipe=weighted,sead=0 and 1 more)",
        "spec.yaml:13: noise.offset_weights.1 must be at least 0, got -1 (in run recipe=weighted,sead=0 and 1 more)",
        "spec.yaml:14: noise.offset_weights.3 must be a number, got 'x' (in run recipe=weighted,sead=0 and 1 more)",
        "spec.yaml:15: sead is not a field; did you mean seed?",
    ]


def test_a_rule_between_two_axes_names_the_runs_that_break_it(tmp_path: Path) -> None:
    grid = "grid:\n  model.window_size: [2, 4]\n  weights: {a: {}, b: {noise.offset_weights: [1, 1]}}\n"
    assert problems(tmp_path, grid) == [
        "spec.yaml:8: noise.offset_weights must have model.window_size = 4 values, got 2 (in run "
        "window_size=4,weights=b)"
    ]


def test_a_grid_that_is_none_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    grid = """\
grid:
  seed: 3
  num_steps: []
  recipe:
    a: 5
    b: {run_dir: x, kind: train}
  batch: [[1, 2], 3]
  noise.schedule: [full, Full]
  s p: [1]
  run: [1]
"""
    assert problems(tmp_path, grid) == [
        "spec.yaml:7: grid.seed must be a list of values or a group of named cases, got 3",
        "spec.yaml:8: grid.num_steps must have at least one case, got []",
        "spec.yaml:10: grid.recipe.a: a case must be a group of fields, got 5",
        "spec.yaml:11: grid.recipe.b: run_dir is the study's own and the same for all runs; take it out of the grid",
        "spec.yaml:11: grid.recipe.b: kind is the study's own and the same for all runs; take it out of the grid",
        "spec.yaml:12: grid.batch: a value of a list must be one number, text, true or false; give it a name, as a "
        "case, got [1, 2]",
        "spec.yaml:13: grid.noise.schedule: cases must have different names, whatever their case and punctuation, got "
        "'full' and 'Full'",
        "spec.yaml:14: grid.s p: an axis must be a field or a name of letters, digits and _, other than run; rename it",
        "spec.yaml:15: grid.run: an axis must be a field or a name of letters, digits and _, other than run; rename it",
    ]
    assert problems(tmp_path, "grid: [1]\n") == [
        "spec.yaml:6: grid must be a group of axes, each a field with a list of values or a name with cases, got [1]"
    ]


def test_names_that_punctuation_alone_tells_apart_are_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "grid:\n  warm_start: [a/b, a-b]\n") == [
        "spec.yaml:7: grid.warm_start: cases must have different names, whatever their case and punctuation, got "
        "'a/b' and 'a-b'"
    ]


def test_two_axes_that_set_one_field_are_refused(tmp_path: Path) -> None:
    grid = "grid:\n  recipe: {a: {noise.schedule: full}}\n  noise.schedule: [none]\n  data.seed: [1]\n  seed: [2]\n"
    assert problems(tmp_path, grid) == [
        "spec.yaml:8: noise.schedule: one axis must set a field, but both grid.recipe and grid.noise.schedule set it; "
        "put them into one axis",
        "spec.yaml:10: grid.seed: the axis seed is there already; give it named cases",
    ]


def test_an_override_that_every_run_would_ignore_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "grid: {seed: [0, 1]}\n", "seed=4") == [
        "--set seed=4: seed is set by grid.seed in every run; set that, or run --only some"
    ]


def test_a_run_dir_that_differs_by_run_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "grid: {seed: [0, 1]}\n", "run_dir=runs/{seed}") == [
        "--set run_dir=runs/{seed}: run_dir must be one directory, that of the study; its runs are called by their "
        "cases below it, got 'runs/{seed}'"
    ]


def test_a_study_of_torchruns_ranks_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "grid: {seed: [0, 1]}\ncluster:\n  launcher: torchrun\n") == [
        "spec.yaml:8: cluster.launcher must be ray in a study, whose runs follow each other in one process, got "
        "'torchrun'"
    ]


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    values = list(range(40))
    assert problems(tmp_path, f"grid:\n  seed: {values}\n  num_steps: {values[1:]}\n") == [
        "spec.yaml:6: grid must have at most 1000 runs, got 1560; make it several studies"
    ]


def test_names_that_a_file_system_would_refuse_are_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, f"grid:\n  recipe: {{{'x' * 230}: {{}}}}\n") == [
        "spec.yaml:6: grid: names of runs must have at most 200 characters, got 238; shorten the cases"
    ]


def test_a_selection_is_the_runs_whose_names_say_it(tmp_path: Path) -> None:
    made = study(tmp_path, "grid:\n  recipe: {a: {}, b: {}, ab: {}}\n  seed: [0, 1]\n")

    def names(*selections: str) -> list[str]:
        return [run.name for run in made.selected(selections)]

    assert len(names()) == 6
    assert names("recipe=a") == ["recipe=a,seed=0", "recipe=a,seed=1"]
    assert names("recipe=ab,seed=1", "recipe=b,seed=0") == ["recipe=b,seed=0", "recipe=ab,seed=1"]
    for wrong, told in (
        ("recpe=a", "--only recpe=a: a selection must be AXIS=CASE,..., got 'recpe=a'; did you mean recipe?"),
        ("recipe=abc", "--only recipe=abc: 'abc' is no case of recipe; did you mean ab?"),
        ("seed", "--only seed: a selection must be AXIS=CASE,..., got 'seed'; write seed=0"),
        ("seed=0,seed=1", "--only seed=0,seed=1: seed is given twice; give --only twice for runs of both"),
    ):
        with pytest.raises(SpecError) as caught:
            names(wrong)
        assert str(caught.value) == told


def test_one_run_is_not_a_study(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(TRAIN)
    assert load_job(path) == load_spec(path)
    path.write_text(TRAIN + "grid: {seed: [0]}\n")
    with pytest.raises(SpecError, match=r"spec\.yaml:6: grid makes a study of several runs, and one run is asked for"):
        load_spec(path)


def test_a_baseline_names_cases_of_the_grid(tmp_path: Path) -> None:
    grid = "grid:\n  noise.schedule: [full, sine]\n  model.window_size: [1, 4]\n"
    made = study(tmp_path, "baseline: {schedule: full, window_size: 1}\n" + grid)
    assert made.baseline == {"schedule": "full", "window_size": "1"}
    assert len(made.runs) == 4
    assert study(tmp_path, grid, "baseline={schedule: sine}").baseline == {"schedule": "sine"}
    assert study(tmp_path, "baseline: {schedule: full}\n" + grid, "baseline=null").baseline == {}


@pytest.mark.parametrize(
    ("baseline", "problem"),
    [
        ("full", "baseline must name a case of an axis of the grid, as in schedule: full, got 'full'"),
        ("{shedule: full}", "baseline.shedule is no axis of the grid; did you mean schedule?"),
        ("{schedule: fulll}", "baseline.schedule: 'fulll' is no case of schedule; did you mean full?"),
        ("{schedule: x}", "baseline.schedule: 'x' is no case of schedule; its cases are full, sine"),
        ("{seed: 0}", "baseline.seed: runs are held against those of the same seed; take it out"),
    ],
)
def test_a_baseline_that_is_none_is_refused_at_its_line(tmp_path: Path, baseline: str, problem: str) -> None:
    grid = f"baseline: {baseline}\ngrid:\n  noise.schedule: [full, sine]\n  seed: [0, 1]\n"
    assert problems(tmp_path, grid) == [f"spec.yaml:6: {problem}"]
