"""Loss curves as inline SVG that takes its text colour and font from the page, so that it suits light and dark.

matplotlib knows no `currentColor`: text and axes are drawn in a sentinel colour that is replaced in the SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

SENTINEL = "#010203"
COLOURS = ("#2f81f7", "#e5812f", "#2ea96b", "#b065e0", "#d64570", "#8a8f98", "#c2a500", "#00a3a3")
OWN_DRAFTS_COLOUR = 4
LOOKS: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1.2, "alpha": 0.5},
    "validation": {"linewidth": 2.0, "marker": "o", "markersize": 3.5},
    "own_drafts": {"linewidth": 2.0, "linestyle": (0, (4, 1.5)), "marker": "s", "markersize": 3.5},
}
KIND_WORDS = {"train": "training", "validation": "held out", "own_drafts": "offset 0 after own drafts, held out"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tensorar",
    "text.color": SENTINEL,
    "axes.edgecolor": SENTINEL,
    "axes.labelcolor": SENTINEL,
    "xtick.color": SENTINEL,
    "ytick.color": SENTINEL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart: values over steps."""

    steps: Sequence[int]
    values: Sequence[float]
    colour_index: int = 0
    kind: str = "validation"
    """`train` (thin and pale), `validation` (with markers) or `own_drafts` (dashed)."""


def curves_of(metrics: list[dict[str, Any]]) -> list[Curve]:
    """Curves of a training run: each offset in training and held out, and offset 0 under the model's own drafts.

    Args:
        metrics: The lines of `metrics.jsonl`.
    """
    curves: list[Curve] = []
    finite = [line for line in metrics if None not in line["loss_of_offset"]]  # not those of skipped steps
    splits = {split: [line for line in finite if line["split"] == split] for split in ("train", "validation")}
    window_size = max((len(line["loss_of_offset"]) for line in metrics), default=0)
    for offset in range(window_size):
        for split, lines in splits.items():
            values = [line["loss_of_offset"][offset] for line in lines]
            curves.append(Curve(steps=_steps(lines), values=values, colour_index=offset, kind=split))
    drafts = [line for line in splits["validation"] if line.get("own_draft_loss_0") is not None]
    if window_size > 1:
        values = [line["own_draft_loss_0"] for line in drafts]
        curves.append(Curve(steps=_steps(drafts), values=values, colour_index=OWN_DRAFTS_COLOUR, kind="own_drafts"))
    return [curve for curve in curves if curve.steps]


def _steps(lines: list[dict[str, Any]]) -> list[int]:
    return [int(line["step"]) for line in lines]


def loss_chart(curves: Sequence[Curve], *, title: str, limits: tuple[float, float] | None = None) -> str:
    """An inline `<svg>` of the curves.

    Args:
        curves: What to draw.
        title: Read out by screen readers.
        limits: Lowest and highest cross-entropy shown, in nats; none fits the curves.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            _draw(axes, curve)
        axes.set_xlabel("step")
        axes.set_ylabel("cross-entropy, nats per code")
        if limits is not None:
            axes.set_ylim(limits)
        axes.grid(visible=True, color="#8a8f98", alpha=0.25, linewidth=0.7)
        figure.legend(handles=_legend(curves), frameon=False, fontsize=9.5, loc="outside lower center", ncols=4)
        return inline_svg(figure, title=title)


def inline_svg(figure: Figure, *, title: str) -> str:
    """An inline `<svg>` of a figure that was drawn under `STYLE`; the same figure gives the same text.

    Args:
        figure: What to show.
        title: Read out by screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), title=title)


def limits_of(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Common limits for charts that stand side by side; the first steps may be cut off."""
    values = [value for curve in curves for value in curve.values]
    if not values:
        return None
    low, high = min(values), max(values)
    margin = 0.06 * (high - low or 1.0)
    return low - margin, high + margin


def _draw(axes: Axes, curve: Curve) -> None:
    colour = COLOURS[curve.colour_index % len(COLOURS)]
    axes.plot(curve.steps, curve.values, color=colour, **LOOKS[curve.kind])


def _legend(curves: Sequence[Curve]) -> list[Line2D]:
    """One entry a colour, then one a kind of line: two short lists instead of every pair of the two."""
    offsets = {curve.colour_index: curve for curve in curves if curve.kind != "own_drafts"}
    entries = [
        Line2D([], [], color=COLOURS[index % len(COLOURS)], linewidth=3, label=f"offset {index}") for index in offsets
    ]
    for kind in ("train", "validation", "own_drafts"):
        of_kind = [curve for curve in curves if curve.kind == kind]
        if of_kind:
            colour = COLOURS[of_kind[0].colour_index % len(COLOURS)] if kind == "own_drafts" else SENTINEL
            entries.append(Line2D([], [], color=colour, label=KIND_WORDS[kind], **LOOKS[kind]))
    return entries


def _inline(document: str, *, title: str) -> str:
    svg = document[document.index("<svg") :].replace(SENTINEL, "currentColor")
    svg = re.sub(r"font-family: [^;]*;", "font-family: inherit;", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
