"""Charts of an evaluation as inline SVG: loss by offset, flips by offset and by place, the samplers that were tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.charts import COLOURS, SENTINEL, STYLE, inline_svg

KIND_WORDS = {
    "schedule": "windows noised by the schedule",
    "own_drafts": "windows with own drafts, as in sampling",
    "uninformed": "windows with uniform drafts",
}
KIND_COLOURS = {"schedule": COLOURS[0], "own_drafts": COLOURS[4], "uninformed": COLOURS[5]}


def offset_chart(held_out: dict[str, Any], *, measure: str, label: str) -> str:
    """An inline `<svg>` of a held-out measure by offset, a line for each kind of drafts, and the control's offset 0.

    Args:
        held_out: Of `evaluation.json`.
        measure: `loss_of_offset` or `accuracy_of_offset`.
        label: Of the axis.
    """
    with rc_context(STYLE):
        figure, axes = _chart(label)
        for kind, words in KIND_WORDS.items():
            values = held_out["model"][kind][measure]
            axes.plot(values, color=KIND_COLOURS[kind], marker="o", markersize=4, linewidth=2, label=words)
        if held_out["control"] is not None:
            level = held_out["control"]["own_drafts"][measure][0]
            axes.axhline(level, color=SENTINEL, linestyle=(0, (4, 2)), linewidth=1.2, label="control, offset 0")
        axes.set_xlabel("offset in the window")
        axes.set_xticks(range(len(held_out["model"]["schedule"][measure])))
        figure.legend(frameon=False, fontsize=9.5, loc="outside lower center", ncols=2)
        return inline_svg(figure, title=f"{label} by offset")


def flip_chart(of_offset: Sequence[float | None]) -> str:
    """An inline `<svg>` of the share of predictions at each offset that differ from the code that was kept."""
    with rc_context(STYLE):
        figure, axes = _chart("share that differs from the kept code")
        offsets = [offset for offset, share in enumerate(of_offset) if share is not None]
        bars = axes.bar(offsets, [of_offset[offset] or 0.0 for offset in offsets], color=COLOURS[0], width=0.6)
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set_xlabel("offset at which the draft was made")
        axes.set_xticks(offsets)
        axes.set_ylim(0, 1)
        return inline_svg(figure, title="flips by offset")


def flip_grid(of_position: Sequence[float | None]) -> str:
    """An inline `<svg>` of the flip rate at each place of the square grid of codes; the first code has no drafts."""
    shares = np.array([np.nan if share is None else share for share in of_position])
    side = round(len(shares) ** 0.5)
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, 4.4), layout="constrained")
        axes = figure.subplots()
        mesh = axes.pcolormesh(shares.reshape(side, side), cmap="viridis", vmin=0, vmax=1, edgecolors="face")
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        figure.colorbar(mesh, ax=axes, label="flip rate", shrink=0.85)
        return inline_svg(figure, title="flip rate over the grid of codes")


def tuning_chart(tried: Sequence[dict[str, Any]]) -> str:
    """An inline `<svg>` of the Frechet distance of every sampler that was tried, the best first."""
    ordered = sorted(tried, key=lambda entry: entry["frechet_distance"])
    names = [", ".join(_told(name, value) for name, value in entry.items() if _is_field(name)) for entry in ordered]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.3 * len(ordered)), layout="constrained")
        axes = figure.subplots()
        distances = [entry["frechet_distance"] for entry in ordered]
        colours = [COLOURS[2], *[COLOURS[5]] * (len(ordered) - 1)]
        bars = axes.barh(names, distances, color=colours, height=0.65)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("Frechet distance to the tuning half")
        return inline_svg(figure, title="samplers that were tried")


def _told(name: str, value: float | str) -> str:
    return f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"


def _is_field(name: str) -> bool:
    return name != "frechet_distance"


def _chart(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label)
    axes.grid(visible=True, color="#8a8f98", alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes
