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
