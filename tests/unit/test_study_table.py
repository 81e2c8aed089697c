"""The table of a study: its lines, the numbers in its cells, and how they are written."""

from jobs.results import Measure
from jobs.study_results import RunResult, State, StudyResult
from jobs.study_table import columns_of, describe, lines_of, markdown, numbers, summary


def run(cases: dict[str, str], *, state: State = "done", **measures: float) -> RunResult:
    return RunResult(
        name=",".join(f"{axis}={case}" for axis, case in cases.items()),
        cases=cases,
        state=state,
        progress=None,
        measures={name: Measure(value=value) for name, value in measures.items()} if state == "done" else {},
        seconds_s=None,
        error=None,
    )


def study(*runs: RunResult, kind: str = "train") -> StudyResult:
    return StudyResult(kind=kind, run_dir="runs/s", runs=runs)


def test_a_line_is_a_combination_of_all_axes_but_the_seed() -> None:
    made = study(
        run({"seed": "0", "k": "2", "recipe": "a"}, loss=1.0),
        run({"seed": "0", "k": "4", "recipe": "a"}, loss=2.0),
        run({"seed": "1", "k": "2", "recipe": "a"}, loss=3.0, extra=5.0),
        run({"seed": "1", "k": "4", "recipe": "a"}, state="failed"),
    )
    lines = lines_of(made)
    assert [(line.cases, line.name, line.done) for line in lines] == [
        ({"k": "2", "recipe": "a"}, "2, a", "2 of 2"),
        ({"k": "4", "recipe": "a"}, "4, a", "1 of 2"),
    ]
    assert [line.cell("loss") for line in lines] == ["2 +- 1.4 (1..3)", "2"]
    assert columns_of(made) == ["loss", "extra"]
    assert [line.cell("extra") for line in lines] == ["5", "-"]


def test_over_seeds_a_cell_is_mean_standard_deviation_and_range() -> None:
    # mean 10 / 4 = 2.5; squared distances 2.25 + 0.25 + 0.25 + 2.25 = 5; sd = sqrt(5 / 3) = 1.29
    assert summary([Measure(value=value) for value in (1.0, 2.0, 3.0, 4.0)]) == "2.500 +- 1.3 (1.000..4.000)"
    assert summary([Measure(value=value) for value in (3.6214, 3.6412)]) == "3.631 +- 0.014 (3.621..3.641)"


def test_of_one_run_a_cell_has_the_interval_that_the_run_knows() -> None:
    assert summary([Measure(value=21.53, low=20.111, high=23.0)]) == "21.53 [20.11, 23.00]"
    assert summary([Measure(value=21.53)]) == "21.53"
    assert summary([Measure(value=2.0, low=1.0, high=3.0), Measure(value=4.0)]) == "3 +- 1.4 (2..4)"
    assert summary([Measure(value=250.0), Measure(value=250.0)]) == "250"
    assert summary([]) == "-"


def test_whole_numbers_are_written_out_and_others_to_four_digits() -> None:
    assert numbers([12345.0, -3.0]) == ["12,345", "-3"]
    assert numbers([0.01236789, -3.0, 1234.56]) == ["0.01237", "-3.000", "1,235"]
    assert summary([Measure(value=value) for value in (1000.5, 2000.5)]) == "1,500 +- 707 (1,000..2,000)"


def test_the_table_is_markdown() -> None:
    made = study(
        run({"recipe": "a", "seed": "0"}, loss_0=1.5, steps=20),
        run({"recipe": "a", "seed": "1"}, loss_0=2.5, steps=20),
        run({"recipe": "b", "seed": "0"}, state="to do"),
        run({"recipe": "b", "seed": "1"}, state="running"),
    )
    assert markdown(made) == (
        "# train study runs/s\n"
        "\n"
        "| recipe | done | loss_0 | steps |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| a | 2 of 2 | 2.000 +- 0.71 (1.500..2.500) | 20 |\n"
        "| b | 0 of 2 | - | - |\n"
        "\n"
        "mean +- standard deviation (least..most) over the seeds 0, 1\n"
    )
    assert describe(made) == "2 of 4 runs done, 1 running, 1 to do"


def test_without_seeds_there_is_a_line_a_run() -> None:
    made = study(run({"k": "2"}, samples=7), run({"k": "4"}, samples=8), kind="tokenize")
    assert markdown(made).splitlines()[2:] == [
        "| k | done | samples |",
        "| --- | ---: | ---: |",
        "| 2 | 1 of 1 | 7 |",
        "| 4 | 1 of 1 | 8 |",
    ]


def compared(*runs: RunResult, baseline: dict[str, str]) -> list[str]:
    """The lines of the second table."""
    text = markdown(StudyResult(kind="train", run_dir="runs/s", runs=runs, baseline=baseline))
    return text.partition("\n## ")[2].splitlines()


def test_the_second_table_holds_runs_against_those_of_the_baseline_with_the_same_seed() -> None:
    lines = compared(
        run({"recipe": "control", "seed": "0"}, loss=3.0, steps=20),
        run({"recipe": "control", "seed": "1"}, loss=4.0, steps=20),
        run({"recipe": "a", "seed": "0"}, loss=2.0, steps=20),
        run({"recipe": "a", "seed": "1"}, loss=2.9, steps=20),
        run({"recipe": "b", "seed": "0"}, loss=2.0, extra=1.0),
        run({"recipe": "b", "seed": "1"}, loss=5.0),
        run({"recipe": "c", "seed": "0"}, state="failed"),
        run({"recipe": "c", "seed": "1"}, loss=3.5),
        run({"recipe": "d", "seed": "0"}, state="to do"),
        run({"recipe": "d", "seed": "1"}, state="to do"),
        baseline={"recipe": "control"},
    )
    # a: gaps -1 and -1.1, mean -1.05, half-width 12.706 * 0.0707 / sqrt(2) = 0.635; b: -1 and 1, 12.706 * 1.414 / 1.414
    assert lines == [
        "Minus recipe=control",
        "",
        "| recipe | loss |",
        "| --- | ---: |",
        "| a | **-1.05 +- 0.64** |",
        "| b | +0 +- 13 |",
        "| c | -0.5000 |",
        "",
        "mean difference of runs of the same seed +- half of its 95 % interval over the seeds (Student's); bold where "
        "the interval leaves 0 out, as it does by chance in one of twenty",
    ]


def test_a_line_is_held_against_the_baseline_of_its_own_other_axes() -> None:
    lines = compared(
        run({"size": "B", "recipe": "control"}, loss=3.0),
        run({"size": "B", "recipe": "a"}, loss=2.0),
        run({"size": "L", "recipe": "control"}, loss=1.0),
        run({"size": "L", "recipe": "a"}, loss=1.5),
        baseline={"recipe": "control"},
    )
    assert lines[4:6] == ["| B | a | -1 |", "| L | a | +0.5000 |"]


def test_before_the_baseline_is_done_there_is_no_second_table() -> None:
    runs = (run({"recipe": "control"}, state="to do"), run({"recipe": "a"}, loss=2.0))
    assert compared(*runs, baseline={"recipe": "control"}) == []
    assert compared(*runs, baseline={}) == []
