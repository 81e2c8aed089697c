"""The table of a study: one line for each combination of its axes but the seeds, one column a headline measure.

Pure: numbers in, text out. Over seeds a cell is mean, sample standard deviation (n - 1) and range of the runs that are
done; of one run it is the value, with the interval that the run itself knows.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich.table import Table

from jobs.grid import SEED
from jobs.results import Measure
from jobs.study_results import RunResult, StudyResult


@dataclass(frozen=True, kw_only=True)
class Line:
    """The runs of one combination of cases."""

    cases: dict[str, str]
    """The case of each axis but the seeds'."""
    runs: tuple[RunResult, ...]

    @property
    def name(self) -> str:
        """What legends call it."""
        return ", ".join(self.cases.values()) or "all"

    def cell(self, measure: str) -> str:
        """A measure over its runs that are done, as people read it."""
        return summary([run.measures[measure] for run in self.runs if measure in run.measures])

    @property
    def done(self) -> str:
        """How many of its runs are done."""
        return f"{sum(run.state == 'done' for run in self.runs)} of {len(self.runs)}"


def lines_of(result: StudyResult) -> list[Line]:
    """The lines of a study's table, in the order of its runs."""
    runs_of: dict[tuple[tuple[str, str], ...], list[RunResult]] = {}
    for run in result.runs:
        key = tuple((axis, case) for axis, case in run.cases.items() if axis != SEED)
        runs_of.setdefault(key, []).append(run)
    return [Line(cases=dict(key), runs=tuple(runs)) for key, runs in runs_of.items()]


def columns_of(result: StudyResult) -> list[str]:
    """The headline measures that any run has, in the order in which they first come."""
    return list(dict.fromkeys(name for run in result.runs for name in run.measures))


def summary(measures: list[Measure]) -> str:
    """Measures of repeated runs in a few characters: `3.621 +- 0.012 (3.610..3.633)`; `-` of none."""
    values = [measure.value for measure in measures]
    if not values:
        return "-"
    if len(values) == 1 and measures[0].low is not None and measures[0].high is not None:
        value, low, high = numbers([values[0], measures[0].low, measures[0].high])
        return f"{value} [{low}, {high}]"
    if min(values) == max(values):
        return numbers(values)[0]
    sd = statistics.stdev(values)
    mean, low, high = numbers([statistics.fmean(values), min(values), max(values)])
    return f"{mean} +- {f'{sd:,.0f}' if sd >= 100 else f'{sd:.2g}'} ({low}..{high})"


def numbers(values: list[float]) -> list[str]:
    """Numbers of one cell: whole ones as they are where all are whole, else four significant digits of each."""
    if all(value == round(value) for value in values):
        return [f"{value:,.0f}" for value in values]
    return [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}" for value in values]


def markdown(result: StudyResult) -> str:
    """The table as `table.md` holds it."""
    lines, columns = lines_of(result), columns_of(result)
    axes = list(lines[0].cases)
    head = [*axes, "done", *columns]
    body = [[*line.cases.values(), line.done, *(line.cell(column) for column in columns)] for line in lines]
    rule = ["---"] * len(axes) + ["---:"] * (1 + len(columns))
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])
    seeds = list(dict.fromkeys(run.cases[SEED] for run in result.runs if SEED in run.cases))
    note = f"\n\nmean +- standard deviation (least..most) over the seeds {', '.join(seeds)}" if seeds else ""
    return f"# {result.kind} study {result.run_dir}\n\n{text}{note}\n"


def runs_table(result: StudyResult) -> Table:
    """What each run has come to, for `rich` to print."""
    table = Table(title=f"{result.run_dir}: {describe(result)}", title_justify="left")
    for heading in ("run", "state", "progress"):
        table.add_column(heading)
    table.add_column("seconds", justify="right")
    table.add_column("error", overflow="fold")
    for run in result.runs:
        seconds = "" if run.seconds_s is None else f"{run.seconds_s:,.0f}"
        table.add_row(run.name, run.state, run.progress or "", seconds, run.error or "")
    return table


def describe(result: StudyResult) -> str:
    """How far a study is, in a few words."""
    counts = [
        f"{count} {state}" for state in ("failed", "running", "stopped", "to do") if (count := result.count(state))
    ]
    return ", ".join([f"{result.count('done')} of {len(result.runs)} runs done", *counts])
