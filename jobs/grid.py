"""A spec with a `grid:` to a study: the product of its axes, one validated spec a run.

Pure index math over a spec's document. Nothing of a study is run unless the specs of all its runs are valid; a problem
is told once, at the line that brought the value, with the runs that have it. A run is called `AXIS=CASE,...` in the
order of the grid. Light: imports no torch, ray or deepspeed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from jobs.axes import Case, dotted_name, read_axes, read_baseline
from jobs.problems import closest
from jobs.spec import BASELINE, GRID, Document, KeyPath, Spec, SpecError, lay_value, line_of, read_document, validated
from pipeline.config import S3Config
from training.config import TrainConfig

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study."""

    name: str
    """Its directory below the study's."""
    cases: dict[str, str]
    """The case of each axis, in the order of the grid."""
    spec: Spec


@dataclass(frozen=True, kw_only=True)
class Study:
    """All runs of a spec with a grid, in the order of its product."""

    kind: str
    run_dir: str
    s3: S3Config
    runs: tuple[StudyRun, ...]
    baseline: dict[str, str]
    """Cases that the other runs are held against, by axis; empty without one."""

    def selected(self, selections: Sequence[str]) -> tuple[StudyRun, ...]:
        """The runs that any of the selections asks for; all without one.

        Args:
            selections: `recipe=control` or `recipe=control,seed=0`: what a run's name must say.

        Raises:
            SpecError: a selection names no axis or no case of the grid.
        """
        wanted = [_selection(self, text) for text in selections]
        return tuple(run for run in self.runs if not wanted or any(one.items() <= run.cases.items() for one in wanted))


def load_job(path: Path | str, overrides: Sequence[str] = ()) -> Spec | Study:
    """The validated spec in a YAML file, or the validated study of a spec with a grid.

    Args:
        path: The file.
        overrides: `a.b=value` assignments laid over the file before the grid is expanded; `grid.AXIS=value` is one too.

    Raises:
        SpecError: the file, an override or any run of the grid has problems; it carries all of them.
    """
    document = read_document(path, overrides)
    if GRID not in document.data:
        return validated(document)
    axes = read_axes(document)
    baseline = read_baseline(document, axes)
    runs, problems = [], _Problems()
    for cases in product(*(axis.cases for axis in axes)):
        chosen = {axis.label: case.name for axis, case in zip(axes, cases, strict=True)}
        name = ",".join(f"{label}={case}" for label, case in chosen.items())
        try:
            spec = _checked(_laid(document, cases, name=name, chosen=chosen))
            runs.append(StudyRun(name=name, cases=chosen, spec=spec))
        except SpecError as error:
            problems.add(name, error)
    problems.raise_if_any(num_runs=len(runs) + len(problems.runs))
    spec = runs[0].spec
    s3 = getattr(spec, "s3", S3Config())  # kinds without it live on a file system
    run_dir = spec.run_dir.removesuffix(f"/{runs[0].name}")
    return Study(kind=spec.kind, run_dir=run_dir, s3=s3, runs=tuple(runs), baseline=baseline)


class _Problems:
    """Problems of the runs of a grid; most are the same in many."""

    def __init__(self) -> None:
        self.runs: dict[str, None] = {}
        self._runs_of: dict[str, list[str]] = {}

    def add(self, run: str, error: SpecError) -> None:
        self.runs[run] = None
        for problem in error.problems:
            self._runs_of.setdefault(problem, []).append(run)

    def raise_if_any(self, *, num_runs: int) -> None:
        if self._runs_of:
            told = [_in_runs(text, runs, num_runs=num_runs) for text, runs in self._runs_of.items()]
            raise SpecError(sorted(told, key=line_of))


def _in_runs(text: str, runs: list[str], *, num_runs: int) -> str:
    if len(runs) == num_runs:
        return text
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{text} (in run {runs[0]}{more})"


def _laid(document: Document, cases: Sequence[Case], *, name: str, chosen: dict[str, str]) -> Document:
    """The document of one run: the cases' fields laid over the base, placeholders filled in, below the study."""
    data = {key: deepcopy(value) for key, value in document.data.items() if key not in (GRID, BASELINE)}
    laid = replace(document, data=data, place_of=dict(document.place_of), problems=list(document.problems))
    for field, source in ((field, source) for case in cases for field, source in case.fields.items()):
        lay_value(laid, field, deepcopy(_at(document.data, source)), place=document.place(source))
        for path, place in document.place_of.items():
            if path[: len(source)] == source:
                laid.place_of[(*field, *path[len(source) :])] = place
    if isinstance(data.get("run_dir"), str) and data["run_dir"].strip():  # else it stays as it is, and is refused
        data["run_dir"] = _below(data["run_dir"], name, document=laid)
    filling = _Filling(laid, {"run": name, **chosen})
    laid.data = filling.fill(data)
    laid.problems += [(line_of(text), text) for text in filling.problems]
    return laid


def _below(run_dir: str, name: str, *, document: Document) -> str:
    if _PLACEHOLDER.search(run_dir):
        rule = "run_dir must be one directory, that of the study; its runs are called by their cases below it"
        text = f"{document.place(('run_dir',))}: {rule}, got {run_dir!r}"
        document.problems.append((line_of(text), text))
    return f"{run_dir.rstrip('/')}/{name}"


def _at(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[key]
    return data


class _Filling:
    """Fills `{run}` and `{axis}` into the texts of a run's data; names that are neither are `problems`."""

    def __init__(self, document: Document, names: dict[str, str]) -> None:
        self.problems: list[str] = []
        self._document, self._names = document, names

    def fill(self, value: Any, path: KeyPath = ()) -> Any:
        """A copy of the value at `path`, filled in."""
        if isinstance(value, dict):
            return {key: self.fill(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.fill(inner, (*path, index)) for index, inner in enumerate(value)]
        if not isinstance(value, str) or path == ("run_dir",):
            return value
        return _PLACEHOLDER.sub(lambda found: self._name(found[1], path), value)

    def _name(self, word: str, path: KeyPath) -> str:
        if word not in self._names:
            place, known = self._document.place(path), list(self._names)
            advice = closest(word, known) or f"; the names are {', '.join(known)}"
            self.problems.append(f"{place}: {dotted_name(path)}: {{{word}}} is no axis of the grid{advice}")
        return self._names.get(word, word)


def _checked(document: Document) -> Spec:
    spec = validated(document)
    if isinstance(spec, TrainConfig) and spec.cluster.launcher == "torchrun":
        place = document.place(("cluster", "launcher"))
        rule = "cluster.launcher must be ray in a study, whose runs follow each other in one process"
        raise SpecError([f"{place}: {rule}, got 'torchrun'"])
    return spec


def _selection(study: Study, text: str) -> dict[str, str]:
    """The cases that a selection asks for, by axis."""
    wanted: dict[str, str] = {}
    for term in text.split(","):
        label, equals, case = term.strip().partition("=")
        cases_of = {axis: list(dict.fromkeys(run.cases[axis] for run in study.runs)) for axis in study.runs[0].cases}
        known = cases_of.get(label, [])
        if not equals or not known:
            advice = closest(label, list(cases_of)) or f"; the axes are {', '.join(cases_of)}"
            advice = f"; write {label}={known[0]}" if known else advice
            raise SpecError([f"--only {text}: a selection must be AXIS=CASE,..., got {term!r}{advice}"])
        if case not in known:
            advice = closest(case, known) or f"; its cases are {', '.join(known)}"
            raise SpecError([f"--only {text}: {case!r} is no case of {label}{advice}"])
        if wanted.setdefault(label, case) != case:
            raise SpecError([f"--only {text}: {label} is given twice; give --only twice for runs of both"])
    return wanted
