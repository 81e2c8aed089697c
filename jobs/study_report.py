"""The report of a study: one self-contained HTML page with its table, its runs, and of training runs their curves.

Made from the runs' files alone, so it can be written again at any time. No script, nothing fetched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from jobs.charts import Curve, overlay_chart
from jobs.pages import render_page
from jobs.results import DAMAGE, read_lines
from jobs.study_results import StudyResult
from jobs.study_table import (
    COMPARISON_NOTE,
    columns_of,
    comparison_of,
    describe,
    difference_cell,
    heading_of,
    lines_of,
)
from pipeline.config import S3Config
from pipeline.storage import Storage, open_storage

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"
MEANINGS = {
    "own_draft_loss_0": "held-out cross-entropy of offset 0, the code that is kept, in windows of own drafts",
    "loss_0": "the same in windows noised by the schedule",
    "loss": "held-out loss as it is trained: the weighted mean over offsets",
    "steps": "steps taken",
    "seconds": "seconds of training",
    "flip_rate": "share of codes that differ from their first draft",
    "num_backbone_calls": "calls of the backbone for all samples",
    "images_per_s": "images sampled per second",
}
"""What the columns of the table say, where the name alone does not."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of the page."""

    heading: str
    svg: Markup


def report_page(result: StudyResult, *, s3: S3Config) -> str:
    """The page, as HTML.

    Args:
        result: The study's runs and what they have come to.
        s3: How S3 is reached.
    """
    columns = columns_of(result)
    return render_page(
        "study.html.j2",
        result=result,
        progress=describe(result),
        axes=list(lines_of(result)[0].cases),
        columns=columns,
        meanings=[(name, MEANINGS[name]) for name in columns if name in MEANINGS],
        lines=lines_of(result),
        comparison=comparison_of(result),
        comparison_heading=heading_of(result),
        comparison_note=COMPARISON_NOTE,
        difference_cell=difference_cell,
        charts=_charts(result, s3=s3) if result.kind == "train" else [],
    )


def _charts(result: StudyResult, *, s3: S3Config) -> list[Chart]:
    """The curves of all training runs, also of those that are not done."""
    runs = {run.name: open_storage(f"{result.run_dir}/{run.name}", s3=s3) for run in result.runs}
    wanted: tuple[tuple[str, str, Callable[[dict[str, Any]], float | None]], ...] = (
        ("offset 0 after own drafts, held out", "validation", lambda line: line["own_draft_loss_0"]),
        ("offset 0 in windows noised by the schedule, held out", "validation", lambda line: line["loss_of_offset"][0]),
        ("loss in training, as weighted by the recipe", "train", lambda line: line["loss"]),
    )
    charts = []
    for heading, split, value_of in wanted:
        groups = {
            line.name: [_curve(runs[run.name], split=split, value_of=value_of) for run in line.runs]
            for line in lines_of(result)
        }
        if any(curve.steps for curves in groups.values() for curve in curves):
            # The SVG is ours, made of numbers and of names that are safe; everything else on the page is escaped.
            charts.append(Chart(heading=heading, svg=Markup(overlay_chart(groups, title=heading))))
    return charts


def _curve(run: Storage, *, split: str, value_of: Callable[[dict[str, Any]], float | None]) -> Curve:
    """A run's curve; of one whose metrics are damaged there is none, and the page is written without it."""
    try:
        points = [(line["step"], value_of(line)) for line in read_lines(run) if line["split"] == split]
    except DAMAGE as error:
        logger.warning("study run=%s has no curve: its metrics cannot be read: %r", run, error)
        return Curve(steps=[], values=[])
    known = [(step, value) for step, value in points if value is not None]  # null is what was not finite
    return Curve(steps=[step for step, _ in known], values=[value for _, value in known])
