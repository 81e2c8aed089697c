"""`tensorar demo`: a real corpus to pictures and a report, each stage a shipped spec run as anybody would run it.

Every stage resumes by itself, so the demo is only their order: interrupt it anywhere, the next run goes on. The time of
a stage is added up over its interrupted runs and kept beside them.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.open_emoji import build_open_emoji
from jobs.report import write_report
from jobs.run import SPEC_NAME, run_spec
from jobs.spec import Spec, SpecError, from_here, load_spec, shipped_spec
from jobs.timings import add_time
from pipeline.local_storage import exclusive
from pipeline.preview import write_preview
from pipeline.progress import summary_table
from pipeline.storage import open_storage
from training.config import TrainConfig
from training.ops import NativeOpError, check_ops

log = logging.getLogger(__name__)

SHIPPED_RUN_ROOT = "runs/demo"
SHIPPED_DATA_ROOT = "data"


@dataclass(frozen=True)
class Stage:
    """One step of the demo that runs a spec."""

    name: str
    title: str
    spec: str


STAGES = (
    Stage("tokenize", "Ray tokenizes the training corpus into shards of codes", "tokenize_open_emoji"),
    Stage("tokenize_validation", "Ray tokenizes the held-out corpus", "tokenize_open_emoji_validation"),
    Stage("base", "two DeepSpeed ranks train the base model", "train_base"),
    Stage("tensorar", "two DeepSpeed ranks train TensorAR around it", "train_tensorar"),
    Stage("sample_base", "the base model draws", "sample_base"),
    Stage("sample_tensorar", "TensorAR drafts, refines and draws", "sample_tensorar"),
)


def run_demo(*, run_root: Path, data_root: Path, overrides: Sequence[str] = ()) -> Path:
    """Path of the report, after everything that it shows has been made.

    Args:
        run_root: Where the runs and the report go.
        data_root: Where the corpus and its downloads lie and stay.
        overrides: `STAGE.a.b=value` changes of the stages' specs, such as `base.num_steps=20`.

    Raises:
        SpecError: an override does not fit.
        FetchError: the corpus cannot be fetched.
        ArtifactError: a directory holds a run of another spec.
        NativeOpError: its trainings are to use the native ops, and there are none.
    """
    specs = _specs(run_root, data_root, overrides)
    _check_ops(specs)
    corpus = data_root / "open-emoji"
    progress = _Progress(
        console=Console(highlight=False, markup=False, emoji=False), run_root=run_root, begin_s=time.monotonic()
    )
    with exclusive(run_root):
        with progress.stage("corpus", "fetch and render the corpus", is_new=not corpus.exists()):
            build_open_emoji(corpus, download_dir=data_root / "downloads")
        for stage in STAGES:
            spec = specs[stage.name]
            is_new = not (Path(spec.run_dir) / SPEC_NAME).exists()
            with progress.stage(stage.name, stage.title, is_new=is_new):
                progress.console.print(f"spec: {from_here(shipped_spec(stage.spec))}", style="dim", soft_wrap=True)
                result = run_spec(spec)
                if spec.kind == "tokenize":
                    progress.console.print(summary_table(result))
                if stage.name == "tokenize" and not (run_root / "codes" / "preview.html").is_file():
                    write_preview(open_storage(str(run_root / "codes")))
        with progress.stage("report", "write the report", is_new=True):
            report = write_report(run_root, data_root=data_root)
    _farewell(progress, report)
    return report


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """Headings and times of the stages."""

    console: Console
    run_root: Path
    begin_s: float

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin_s

    @contextmanager
    def stage(self, name: str, title: str, *, is_new: bool) -> Iterator[None]:
        names = ["corpus", *(stage.name for stage in STAGES), "report"]
        self._head(f"{names.index(name) + 1}/{len(names)} {title}")
        stage_begin_s, is_finished = time.monotonic(), False
        try:
            yield
            is_finished = True
        finally:
            seconds_s = time.monotonic() - stage_begin_s
            add_time(self.run_root, stage=name, seconds_s=seconds_s, is_finished=is_finished, is_new=is_new)
        times = f" in {seconds_s:.1f} s; {self.elapsed_s:.0f} s since the start"
        self.console.print(Text.assemble(("done", "green"), times))

    def end(self) -> None:
        """Say how long all of it took."""
        self._head(f"the demo took {self.elapsed_s:.0f} s")

    def _head(self, title: str) -> None:
        self.console.rule(Text(title, style="bold"), align="left")


def _check_ops(specs: dict[str, Spec]) -> None:
    """Tell before the first stage what would stop a later one."""
    native = [name for name, spec in specs.items() if isinstance(spec, TrainConfig) and spec.engine.ops == "native"]
    try:
        if native:
            check_ops(with_cuda=False)
    except NativeOpError as error:
        settings = " ".join(f"--set {name}.engine.ops=reference" for name in native)
        raise NativeOpError(f"{error}; for the demo: tensorar demo {settings}") from error


def _specs(run_root: Path, data_root: Path, overrides: Sequence[str]) -> dict[str, Spec]:
    """The spec of each stage; raises SpecError with the problems of all."""
    problems = _wrong_names(overrides)
    specs: dict[str, Spec] = {}
    for stage in STAGES:
        try:
            specs[stage.name] = _spec(stage, run_root, data_root, overrides)
        except SpecError as error:
            # As it was typed: the stage's own loader sees the override without the stage.
            problems.extend(problem.replace("--set ", f"--set {stage.name}.", 1) for problem in error.problems)
    if problems:
        raise SpecError(problems)
    return specs


def _spec(stage: Stage, run_root: Path, data_root: Path, overrides: Sequence[str]) -> Spec:
    path = shipped_spec(stage.spec)
    moved = _moved(json.loads(load_spec(path).model_dump_json()), run_root=run_root, data_root=data_root)
    own = [override.partition(".")[2] for override in overrides if override.split(".", 1)[0] == stage.name]
    return load_spec(path, [*moved, *own])


def _moved(value: Any, *, run_root: Path, data_root: Path, prefix: str = "") -> Iterator[str]:
    """Overrides that move the shipped paths below the asked-for roots."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _moved(
                inner, run_root=run_root, data_root=data_root, prefix=f"{prefix}.{key}" if prefix else key
            )
        return
    moved = _moved_path(value, run_root=run_root, data_root=data_root)
    if moved != value:
        yield f"{prefix}={json.dumps(moved)}"


def _moved_path(value: Any, *, run_root: Path, data_root: Path) -> Any:
    if isinstance(value, list):
        return [_moved_path(inner, run_root=run_root, data_root=data_root) for inner in value]
    for shipped, asked in ((SHIPPED_RUN_ROOT, run_root), (SHIPPED_DATA_ROOT, data_root)):
        if isinstance(value, str) and value.startswith(f"{shipped}/"):
            return f"{asked}{value[len(shipped) :]}"
    return value


def _wrong_names(overrides: Sequence[str]) -> list[str]:
    names = [stage.name for stage in STAGES]
    rule = f"an override must begin with a stage, one of {', '.join(names)}"
    return [f"--set {override}: {rule}" for override in overrides if override.split(".", 1)[0] not in names]


def _farewell(progress: _Progress, report: Path) -> None:
    console, run_root = progress.console, progress.run_root
    progress.end()
    # `make demo` calls the command by its path; what is printed must work in the same shell.
    command = "tensorar" if shutil.which("tensorar") else sys.argv[0]
    sample = f"{command} run {from_here(shipped_spec('sample_tensorar'))}"
    paths = f"--set weights={run_root}/tensorar --set run_dir={run_root}/samples-2"
    console.print(f"report: {report.resolve()}", soft_wrap=True)
    console.print("next, try:")
    console.print(f"  {sample} {paths} --set seed=1", soft_wrap=True)
    console.print(f"  {command} preview {run_root}/codes-validation", soft_wrap=True)
    console.print(f"  {command} verify {run_root}/tensorar", soft_wrap=True)
