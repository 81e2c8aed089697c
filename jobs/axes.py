"""The axes of a spec's `grid:`: which cases each has, what they set, and all that is wrong with them, with its place.

An axis is a dotted field with a list of values, or a free name with cases, each a named set of fields (set whole, as
by `--set`). It goes by the last word of its field; a case goes by its name or value, where runs of characters other
than letters, digits and `._+-` become one `-`. Light: imports no torch, ray or deepspeed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import Any

from jobs.problems import closest, quoted
from jobs.spec import BASELINE, GRID, Document, KeyPath, SpecError, line_of

MAX_RUNS = 1000
MAX_NAME_CHARS = 200
SEED = "seed"
"""Label of the axis whose cases are repetitions."""
_RESERVED = ("kind", "run_dir", GRID, BASELINE)
_WORD = re.compile(r"[A-Za-z_]\w*")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class Case:
    """A named set of fields."""

    name: str
    fields: dict[KeyPath, KeyPath]
    """Where a field's value stands in the document, by the field."""


@dataclass(frozen=True)
class Axis:
    """What differs between the runs of a study in one respect."""

    label: str
    """What runs and placeholders call it."""
    path: KeyPath
    """Where it stands in the document."""
    cases: tuple[Case, ...]


def read_axes(document: Document) -> list[Axis]:
    """The axes of a grid; raises SpecError with all that is wrong with the grid itself."""
    grid, problems = document.data[GRID], []
    if not isinstance(grid, dict) or not grid:
        rule = "grid must be a group of axes, each a field with a list of values or a name with cases"
        raise SpecError([f"{document.place((GRID,))}: {rule}, got {quoted(grid)}"])
    axes: list[Axis] = []
    for name, content in grid.items():
        told = list(_axis_problems(name, content))
        problems += [(document.place((GRID, name, *where)), text) for where, text in told]
        if not told:
            axes.append(_axis(name, content))
    problems += [(document.place(path), text) for path, text in _clashes(document, axes)]
    texts = [text for _, text in document.problems] + [f"{place}: {text}" for place, text in problems]
    if problems:
        raise SpecError(sorted(texts, key=line_of))
    return axes


def read_baseline(document: Document, axes: Sequence[Axis]) -> dict[str, str]:
    """The case of each axis that `baseline` names; none without one.

    Raises:
        SpecError: it names no axis or no case of the grid, or a seed.
    """
    baseline = document.data.get(BASELINE)
    if baseline is None:
        return {}
    if not isinstance(baseline, dict) or not baseline:
        rule = f"{BASELINE} must name a case of an axis of the grid, as in {axes[0].label}: {axes[0].cases[0].name}"
        raise SpecError([f"{document.place((BASELINE,))}: {rule}, got {quoted(baseline)}"])
    told = ((label, _baseline_problem(label, case_name(case), axes)) for label, case in baseline.items())
    problems = [f"{document.place((BASELINE, label))}: {BASELINE}.{text}" for label, text in told if text]
    if problems:
        raise SpecError(problems)
    return {label: case_name(case) for label, case in baseline.items()}


def _baseline_problem(label: str, case: str, axes: Sequence[Axis]) -> str | None:
    cases_of = {axis.label: [case.name for case in axis.cases] for axis in axes if axis.label != SEED}
    if label == SEED:
        return f"{SEED}: runs are held against those of the same seed; take it out"
    if label not in cases_of:
        advice = closest(label, list(cases_of)) or f"; the axes are {', '.join(cases_of)}"
        return f"{label} is no axis of the grid{advice}"
    if case not in cases_of[label]:
        advice = closest(case, cases_of[label]) or f"; its cases are {', '.join(cases_of[label])}"
        return f"{label}: {case!r} is no case of {label}{advice}"
    return None


def _axis_problems(name: str, content: Any) -> Iterator[tuple[KeyPath, str]]:
    """(path below the axis, what is wrong there) of an axis by itself."""
    dotted = f"{GRID}.{name}"
    words = name.split(".")
    if not all(_WORD.fullmatch(word) for word in words) or words[-1] == "run":
        yield (), f"{dotted}: an axis must be a field or a name of letters, digits and _, other than run; rename it"
    if isinstance(content, list):
        yield from _list_problems(dotted, content)
        yield from _reserved((), dotted, words)
    elif isinstance(content, dict):
        for case, fields in content.items():
            if fields is not None and not isinstance(fields, dict):
                yield (case,), f"{dotted}.{case}: a case must be a group of fields, got {quoted(fields)}"
                continue
            for field in fields or {}:
                yield from _reserved((case, field), f"{dotted}.{case}", field.split("."))
        yield from _name_problems(dotted, list(content))
    else:
        yield (), f"{dotted} must be a list of values or a group of named cases, got {quoted(content)}"
    if isinstance(content, list | dict) and not content:
        yield (), f"{dotted} must have at least one case, got {content!r}"


def _list_problems(dotted: str, values: list[Any]) -> Iterator[tuple[KeyPath, str]]:
    for index, value in enumerate(values):
        if isinstance(value, list | dict):
            rule = "a value of a list must be one number, text, true or false; give it a name, as a case"
            yield (index,), f"{dotted}: {rule}, got {quoted(value)}"
    yield from _name_problems(dotted, [value for value in values if not isinstance(value, list | dict)])


def _name_problems(dotted: str, values: list[Any]) -> Iterator[tuple[KeyPath, str]]:
    seen: dict[str, Any] = {}
    for value in values:
        name = case_name(value)
        if not name:
            yield (), f"{dotted}: a case must have a name, got {value!r}"
        elif name.lower() in seen:  # some file systems do not tell them apart
            rule = "cases must have different names, whatever their case and punctuation"
            yield (), f"{dotted}: {rule}, got {seen[name.lower()]!r} and {value!r}"
        seen.setdefault(name.lower(), value)


def _reserved(where: KeyPath, dotted: str, words: list[str]) -> Iterator[tuple[KeyPath, str]]:
    if words[0] in _RESERVED:
        yield where, f"{dotted}: {words[0]} is the study's own and the same for all runs; take it out of the grid"


def case_name(value: Any) -> str:
    """A value as it stands in the name of a run: `0.1`, `true`, `none`, or text with its odd characters as `-`."""
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return _UNSAFE.sub("-", text)


def _axis(name: str, content: list[Any] | dict[str, Any]) -> Axis:
    path = (GRID, name)
    if isinstance(content, list):
        field = tuple(name.split("."))
        cases = [Case(case_name(value), {field: (*path, index)}) for index, value in enumerate(content)]
    else:
        cases = [
            Case(case_name(case), {tuple(field.split(".")): (*path, case, field) for field in fields or {}})
            for case, fields in content.items()
        ]
    return Axis(label=name.split(".")[-1], path=path, cases=tuple(cases))


def _clashes(document: Document, axes: list[Axis]) -> Iterator[tuple[KeyPath, str]]:
    """(path, what is wrong there) between axes, and between the grid and what `--set` brought."""
    for first, second in combinations(axes, 2):
        if first.label == second.label:
            yield (
                second.path,
                f"{dotted_name(second.path)}: the axis {first.label} is there already; give it named cases",
            )
        for one, other in product(_fields(first), _fields(second)):
            if _overlap(one, other):
                by = f"both {dotted_name(first.path)} and {dotted_name(second.path)} set it"
                yield second.path, f"{dotted_name(other)}: one axis must set a field, but {by}; put them into one axis"
    yield from _without_effect(document, axes)
    num_runs = prod(len(axis.cases) for axis in axes)
    if num_runs > MAX_RUNS:
        yield (GRID,), f"grid must have at most {MAX_RUNS} runs, got {num_runs}; make it several studies"
    longest = sum(len(axis.label) + 2 + max(len(case.name) for case in axis.cases) for axis in axes)
    if longest > MAX_NAME_CHARS:
        rule = f"names of runs must have at most {MAX_NAME_CHARS} characters"
        yield (GRID,), f"grid: {rule}, got {longest}; shorten the cases"


def _without_effect(document: Document, axes: list[Axis]) -> Iterator[tuple[KeyPath, str]]:
    """What `--set` brought although every run has the grid's value."""
    for axis in axes:
        in_all = [field for field in _fields(axis) if all(field in case.fields for case in axis.cases)]
        for field, (path, place) in product(in_all, document.place_of.items()):
            if place.startswith("--set ") and path[: len(field)] == field:
                name = dotted_name(axis.path)
                yield path, f"{dotted_name(path)} is set by {name} in every run; set that, or run --only some"


def _fields(axis: Axis) -> dict[KeyPath, None]:
    return {field: None for case in axis.cases for field in case.fields}


def _overlap(one: KeyPath, other: KeyPath) -> bool:
    return one[: len(other)] == other or other[: len(one)] == one


def dotted_name(path: KeyPath) -> str:
    """A path as people write it."""
    return ".".join(map(str, path))
