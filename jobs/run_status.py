"""How far a run of any kind is, by its own files, for `tensorar status`.

Reading changes nothing and may be done while the run is at work. Of a tokenize job that has a plan, `pipeline.status`
tells more.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from jobs.results import Found, Measure, find_run, read_lines
from jobs.run import SPEC_NAME, stored_spec
from jobs.spec import KINDS
from jobs.study_table import numbers
from pipeline.storage import ArtifactError, Storage


def run_table(storage: Storage) -> Table:
    """What a run has come to, for `rich` to print; changes nothing.

    Raises:
        ArtifactError: the directory holds no run.
    """
    spec = _read_spec(storage)
    found = find_run(storage, kind=spec["kind"], spec=spec)
    table = Table(title=storage.url, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")
    table.add_row("kind", spec["kind"])
    table.add_row("state", _state(storage, found))
    if found.progress is not None:
        table.add_row("progress", found.progress)
    for name, value in found.measures.items():
        table.add_row(name, _told(value))
    if found.problem is not None:
        table.add_row("problem", found.problem)
        return table
    speeds = [line["samples_per_s"] for line in read_lines(storage) if line.get("samples_per_s")]
    if speeds:
        table.add_row("samples per s", f"{speeds[-1]:,.1f}")
    return table


def _read_spec(storage: Storage) -> dict[str, Any]:
    try:
        spec = stored_spec(storage)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"status of {storage}: it must be the run_dir of a job or a study, got no {SPEC_NAME}; check the path"
        ) from error
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ArtifactError(
            f"status of {storage}: {SPEC_NAME} must hold the spec of a run, got kind {kind!r}; run its spec again"
        )
    return spec


def _state(storage: Storage, found: Found) -> str:
    if found.is_done:
        return "done"
    if storage.is_held():
        return "running"
    return f"not done; {'run the spec again to go on' if found.problem is None else 'the problem must be mended first'}"


def _told(value: float | Measure | None) -> str:
    if value is None:
        return "not finite"
    if not isinstance(value, Measure):
        return numbers([value])[0]
    interval = "" if value.low is None or value.high is None else " [{}, {}]".format(*numbers([value.low, value.high]))
    return numbers([value.value])[0] + interval
