"""The tables of a study: one line for each combination of its axes but the seeds, one column a headline measure.

Pure: numbers in, text out. Over seeds a cell is mean, sample standard deviation (n - 1) and range of the runs that are
done; of one run it is the value, with the interval that the run itself knows. A study with a baseline has a second
table: each other line minus the one that has the baseline's cases and else its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass

from rich.table import Table

from jobs.axes import SEED
from jobs.results import Measure
from jobs.study_difference import Difference, difference
from jobs.study_results import RunResult, StudyResult

COMPARISON_NOTE = (
    "mean difference of runs of the same seed +- half of its 95 % interval over the seeds (Student's); bold where the "
    "interval leaves 0 out, as it does by chance in one of twenty"
)


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

    def beside(self, baseline: Line, measure: str) -> Difference | None:
        """A measure minus the baseline's, over the seeds of which both have a run that is done."""
        theirs = {run.cases.get(SEED): run.measures for run in baseline.runs}
        return difference(
            [
                (run.measures[measure].value, theirs[run.cases.get(SEED)][measure].value)
                for run in self.runs
                if measure in run.measures and measure in theirs[run.cases.get(SEED)]
            ]
        )

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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The second table: lines, and the differences of each to its own baseline by measure."""

    columns: list[str]
    """Measures in which any line differs from its baseline."""
    rows: list[tuple[Line, dict[str, Difference]]]


def comparison_of(result: StudyResult) -> Comparison:
    """What the lines come to beside the baseline; without rows where the study has none, or nothing to compare yet."""
    lines, rows = lines_of(result), []
    for line in lines:
        (baseline,) = [other for other in lines if other.cases == line.cases | result.baseline]
        if baseline is not line:
            found = {measure: line.beside(baseline, measure) for measure in columns_of(result)}
            rows.append((line, {measure: one for measure, one in found.items() if one is not None}))
    rows = [row for row in rows if row[1]]
    differing = {measure for _, found in rows for measure, one in found.items() if one.mean or one.half_width}
    return Comparison(columns=[name for name in columns_of(result) if name in differing], rows=rows)


def difference_cell(found: Difference | None) -> str:
    """A difference in a few characters, to two digits of its interval: `-0.026 +- 0.013`; `-` of none."""
    if found is None:
        return "-"
    if not found.half_width:
        (mean,) = numbers([found.mean])
        return f"+{mean}" if found.mean > 0 else mean
    num_decimals = max(0, 1 - math.floor(math.log10(found.half_width)))
    return f"{found.mean:+,.{num_decimals}f} +- {found.half_width:,.{num_decimals}f}"


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
    text = _rows([head, rule, *body])
    seeds = list(dict.fromkeys(run.cases[SEED] for run in result.runs if SEED in run.cases))
    note = f"\n\nmean +- standard deviation (least..most) over the seeds {', '.join(seeds)}" if seeds else ""
    return f"# {result.kind} study {result.run_dir}\n\n{text}{note}\n{_comparison(result)}"


def _comparison(result: StudyResult) -> str:
    """The second table, where there is something in it."""
    found = comparison_of(result)
    if not found.rows:
        return ""
    axes = list(found.rows[0][0].cases)
    rule = ["---"] * len(axes) + ["---:"] * len(found.columns)
    body = [
        [*line.cases.values(), *(_marked(differences.get(column)) for column in found.columns)]
        for line, differences in found.rows
    ]
    return f"\n## {heading_of(result)}\n\n{_rows([[*axes, *found.columns], rule, *body])}\n\n{COMPARISON_NOTE}\n"


def heading_of(result: StudyResult) -> str:
    """Of the second table."""
    return f"Minus {', '.join(f'{axis}={case}' for axis, case in result.baseline.items())}"


def _marked(found: Difference | None) -> str:
    cell = difference_cell(found)
    return f"**{cell}**" if found is not None and found.is_clear else cell


def _rows(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def runs_table(result: StudyResult, *, names: Collection[str] | None = None) -> Table:
    """What each run has come to, or each of those `names`, for `rich` to print."""
    table = Table(title=f"{result.run_dir}: {describe(result)}", title_justify="left")
    for heading in ("run", "state", "progress"):
        table.add_column(heading)
    table.add_column("seconds", justify="right")
    table.add_column("error", overflow="fold")
    for run in result.runs:
        if names is not None and run.name not in names:
            continue
        seconds = "" if run.seconds_s is None else f"{run.seconds_s:,.0f}"
        table.add_row(run.name, run.state, run.progress or "", seconds, run.error or "")
    return table


def describe(result: StudyResult) -> str:
    """How far a study is, in a few words."""
    counts = [
        f"{count} {state}" for state in ("failed", "running", "stopped", "to do") if (count := result.count(state))
    ]
    return ", ".join([f"{result.count('done')} of {len(result.runs)} runs done", *counts])
