"""The commands, and nothing else: each one calls a function of the package that does the work.

Light: torch, ray and deepspeed are imported inside the commands that need them, so `tensorar validate` answers at once.
Exit codes: 0 done, 1 failed, 2 the command or a spec is wrong, 75 stopped by SIGTERM (training also by Ctrl-C) and all
that is done is kept, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from jobs.grid import Study, load_job
from jobs.run import EXIT_STOPPED, RunStoppedError, run_spec
from jobs.spec import Spec, SpecError, from_here, load_spec, shipped_spec
from pipeline.config import S3Config, TokenizeConfig, checked_endpoint
from pipeline.local_storage import local_path
from pipeline.sigterm import TerminatedError, raised_on_sigterm
from pipeline.storage import ArtifactError, open_storage
from training.config import TrainConfig

EXIT_FAILED = 1
EXIT_BAD_SPEC = 2
EXIT_INTERRUPTED = 130

OUR_PACKAGES = ("tokenization", "pipeline", "training", "jobs")


class _LocalPath(click.Path):
    """A path on this machine, `~` expanded; a URL is refused before a path is made of it, which would fold its `//`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(local_path(value), param, ctx)
        except ArtifactError as error:
            self.fail(str(error), param, ctx)


def _endpoint(_: click.Context, __: click.Parameter, url: str | None) -> str | None:
    try:
        return None if url is None else checked_endpoint(url)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


LOCAL_DIRECTORY = _LocalPath(path_type=Path)
RUN_ROOT = click.option(
    "--dir", "run_root", default="runs/demo", show_default=True, type=LOCAL_DIRECTORY, help="Runs and report."
)
DIRECTORY = click.argument("directory", metavar="DIR")
ENDPOINT_URL = click.option(
    "--endpoint-url",
    callback=_endpoint,
    help="S3-compatible server, where DIR is an s3:// URL.",
)
OVERRIDES = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=V", help="Lay a value over the spec's; repeatable."
)
ONLY = click.option(
    "--only",
    "selections",
    multiple=True,
    metavar="AXIS=CASE,...",
    help="Of a study, the runs of all these cases alone; given again, those runs too.",
)
DATA_ROOT = click.option(
    "--data", "data_root", default="data", show_default=True, type=LOCAL_DIRECTORY, help="Corpus, downloads."
)


class _Commands(click.Group):
    """A group whose commands end in one line and an exit code, not in a traceback, where a user can mend it."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            with raised_on_sigterm():
                return super().invoke(ctx)
        except SpecError as error:
            click.echo(str(error), err=True)
            ctx.exit(EXIT_BAD_SPEC)
        except RunStoppedError as stopped:
            click.echo(str(stopped), err=True)
            ctx.exit(EXIT_STOPPED)
        except Exception as error:
            if debug or not _is_for_users(error):
                raise
            click.echo(f"error: {_told(error)}", err=True)
            ctx.exit(EXIT_FAILED)
        except TerminatedError:
            click.echo("stopped; the same command goes on from here", err=True)
            ctx.exit(EXIT_STOPPED)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from here", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tensorar", prog_name="tensorar")
@click.option("--debug", is_flag=True, help="Log more, and show the traceback of an error.")
def main(*, debug: bool) -> None:
    """Train TensorAR image generators: Ray tokenizes, DeepSpeed trains, drafts get refined."""
    _set_up_logging(debug=debug)


@main.command()
@click.argument("specs", nargs=-1, required=True, type=click.Path(path_type=Path))
@OVERRIDES
def validate(*, specs: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Check specs, as `run` would take them; every problem is told with its file and line."""
    problems: list[str] = []
    for path in specs:
        try:
            job = load_job(path, overrides)
        except SpecError as error:
            named = str(path)  # a problem of the command's own values names no spec
            problems.extend(one if one.startswith(named) else f"{named}: {one}" for one in error.problems)
        else:
            what = f"study of {len(job.runs)} {job.kind} runs" if isinstance(job, Study) else f"{job.kind} spec"
            click.echo(f"{path}: a valid {what}, run_dir {job.run_dir}")
    if problems:
        raise SpecError(problems)


@main.command()
@click.argument("spec_path", metavar="SPEC", type=click.Path(path_type=Path))
@OVERRIDES
@ONLY
@click.option("--fail-fast", is_flag=True, help="Stop a study at the first run that fails.")
def run(*, spec_path: Path, overrides: tuple[str, ...], selections: tuple[str, ...], fail_fast: bool) -> None:
    """Run a spec, or the study that its grid makes; running it again resumes it."""
    spec = load_job(spec_path, overrides)
    if isinstance(spec, Study):
        _run_study(spec, selections=selections, fail_fast=fail_fast)
        return
    if selections or fail_fast:
        raise SpecError([f"{spec_path}: --only and --fail-fast are for studies, and this spec has no grid; drop them"])
    result = run_spec(spec)
    if spec.kind == "tokenize":
        from pipeline.progress import summary_table  # noqa: PLC0415  (imports numpy)

        _show(summary_table(result))
    click.echo(_outcome(spec, result, command=_command(spec_path, overrides)))


@main.command()
@click.argument("spec_path", metavar="SPEC", type=click.Path(path_type=Path))
@OVERRIDES
@ONLY
@click.option("--ranks", type=click.IntRange(min=1), help="World size; default cluster.num_workers.")
def plan(*, spec_path: Path, overrides: tuple[str, ...], selections: tuple[str, ...], ranks: int | None) -> None:
    """Estimate what a train spec, or one run of a study, takes: memory per rank by ZeRO stage, work per step, disk."""
    spec = _one_run(load_job(spec_path, overrides), spec_path=spec_path, selections=selections)
    if not isinstance(spec, TrainConfig):
        raise SpecError([f"{spec_path}: kind must be train, got {spec.kind!r}"])
    from jobs.plan import plan_summary, plan_table  # noqa: PLC0415  (imports torch)

    world_size = ranks or spec.cluster.num_workers
    try:
        spec.engine.grad_accumulation(world_size)
    except ValueError as error:
        raise SpecError([f"{spec_path}: {error}"]) from error
    _show(plan_table(spec, world_size=world_size))
    click.echo(plan_summary(spec, world_size=world_size))


@main.command()
@RUN_ROOT
@DATA_ROOT
@click.option("--set", "overrides", multiple=True, metavar="STAGE.A.B=V", help="Change a stage's spec; repeatable.")
def demo(*, run_root: Path, data_root: Path, overrides: tuple[str, ...]) -> None:
    """From a real corpus to pictures and a report, in minutes; running it again resumes it."""
    # The demo imports matplotlib, and through its stages torch and ray.
    from jobs.demo import run_demo  # noqa: PLC0415

    run_demo(run_root=run_root, data_root=data_root, overrides=overrides)


@main.command()
def doctor() -> None:
    """Check this machine: what works, what is missing and what to do about it."""
    # Every check imports what it checks.
    from jobs.doctor import run_doctor  # noqa: PLC0415

    if not run_doctor():
        sys.exit(EXIT_FAILED)


@main.command("build-ops")
def build_ops_command() -> None:
    """Compile the native pixels and ops; TENSORAR_CUDA=auto|0|1 says whether the ops are for CUDA too."""
    from tokenization.build_pixels import build_pixels  # noqa: PLC0415  (only this command needs it)
    from training.build_ops import build_ops  # noqa: PLC0415  (finds torch)

    click.echo(f"native pixels: {build_pixels()}")
    click.echo(f"native ops: {build_ops()}")


@main.command("retry-rejects")
@click.argument("spec_path", metavar="SPEC", type=click.Path(path_type=Path))
@OVERRIDES
def retry_rejects(*, spec_path: Path, overrides: tuple[str, ...]) -> None:
    """Try the rejected samples of a shard set again, and only those, once all of its units are done."""
    spec = load_spec(spec_path, overrides)
    if not isinstance(spec, TokenizeConfig):
        raise SpecError([f"{spec_path}: kind must be tokenize, got {spec.kind!r}"])
    # Both import torch and ray.
    from pipeline.progress import summary_table  # noqa: PLC0415
    from pipeline.tokenize import retry_rejects  # noqa: PLC0415

    _show(summary_table(retry_rejects(spec)))


@main.command()
@DIRECTORY
@ENDPOINT_URL
def status(*, directory: str, endpoint_url: str | None) -> None:
    """Tell how far a job is: units, rejects and time per stage, steps and measures, or the state of a study's runs."""
    s3 = S3Config(endpoint_url=endpoint_url)
    storage = open_storage(directory, s3=s3)
    # Both import numpy, the other one pyarrow too.
    from jobs.study_results import STUDY_NAME, read_study  # noqa: PLC0415

    if storage.find(STUDY_NAME) is not None:
        from jobs.study_table import runs_table  # noqa: PLC0415

        _show(runs_table(read_study(directory, s3=s3)))
        return
    from pipeline.resume import PLAN_NAME  # noqa: PLC0415

    if storage.find(PLAN_NAME) is None:
        from jobs.run_status import run_table  # noqa: PLC0415

        _show(run_table(storage))
        return
    from pipeline.status import read_status, status_table  # noqa: PLC0415

    _show(status_table(read_status(storage), title=str(storage)))


@main.command()
@DIRECTORY
@ENDPOINT_URL
@click.option("--deep", is_flag=True, help="Encode a sample of a shard set's codes again from the corpus.")
@click.option("--max-differing", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="For --deep.")
def verify(*, directory: str, endpoint_url: str | None, deep: bool, max_differing: float) -> None:
    """Check every byte of a shard set, of a training run's checkpoints or of a tokenizer fit against its records."""
    from jobs.verify import verify_directory  # noqa: PLC0415  (imports numpy)

    s3 = S3Config(endpoint_url=endpoint_url)
    verdict = verify_directory(directory, s3=s3, deep=deep, max_differing=max_differing)
    for problem in verdict.problems:
        click.echo(problem, err=True)
    if verdict.problems:
        click.echo(f"{directory}: {verdict.checked}; {len(verdict.problems)} problems", err=True)
        sys.exit(EXIT_FAILED)
    click.echo(f"{directory}: {verdict.checked}; everything is whole")


@main.command()
@DIRECTORY
@ENDPOINT_URL
@click.option("--output", type=_LocalPath(dir_okay=False, path_type=Path), help="The page; default DIR/preview.html.")
def preview(*, directory: str, endpoint_url: str | None, output: Path | None) -> None:
    """Write an HTML page of a shard set: pictures decoded from codes, captions, codebook usage, ledger totals."""
    from pipeline.preview import write_preview  # noqa: PLC0415  (imports torch to decode)

    storage = open_storage(directory, s3=S3Config(endpoint_url=endpoint_url))
    click.echo(f"preview: {write_preview(storage, output=output)}")


@main.command()
@DIRECTORY
@ENDPOINT_URL
@click.option(
    "--to",
    type=click.Choice(["llamagen", "safetensors"]),
    required=True,
    help="llamagen: npy files of a shard set, a .pt of a training run. safetensors: a training run in one file.",
)
@click.option("--output", required=True, help="Path or s3:// URL: of a directory for a shard set, of a file for a run.")
@click.option("--ema", "use_ema", is_flag=True, help="A run's moving average of the weights.")
@click.option("--step", type=click.IntRange(min=1), help="Checkpoint of a run; default the newest whole one.")
def export(*, directory: str, endpoint_url: str | None, to: str, output: str, use_ema: bool, step: int | None) -> None:
    """Write what DIR holds in the layout of another project; running it again resumes it."""
    from jobs.export import export_directory  # noqa: PLC0415  (imports numpy)

    s3 = S3Config(endpoint_url=endpoint_url)
    click.echo(export_directory(directory, to=to, output=output, use_ema=use_ema, step=step, s3=s3))


@main.command()
@RUN_ROOT
@DATA_ROOT
def report(*, run_root: Path, data_root: Path) -> None:
    """Write the demo's report again, from what its runs left on disk."""
    from jobs.report import write_report  # noqa: PLC0415  (imports matplotlib, and torch to decode)

    click.echo(f"report: {write_report(run_root, data_root=data_root)}")


def _show(table: Table) -> None:
    """Print a table; names and errors in it may have brackets and colons, which are no markup."""
    Console(markup=False, emoji=False).print(table)


def _command(spec_path: Path | str, overrides: Sequence[str]) -> str:
    """The command line that runs a spec."""
    return shlex.join(["tensorar", "run", str(spec_path), *(word for value in overrides for word in ("--set", value))])


def _run_study(study: Study, *, selections: Sequence[str], fail_fast: bool) -> None:
    # These import matplotlib and numpy.
    from jobs.study import TABLE_NAME, run_study  # noqa: PLC0415
    from jobs.study_report import REPORT_NAME  # noqa: PLC0415
    from jobs.study_table import runs_table  # noqa: PLC0415

    result = run_study(study, selections=selections, fail_fast=fail_fast)
    _show(runs_table(result, names=[run.name for run in study.selected(selections)]))
    click.echo(f"table:  {study.run_dir}/{TABLE_NAME}\nreport: {study.run_dir}/{REPORT_NAME}")


def _one_run(job: Spec | Study, *, spec_path: Path, selections: Sequence[str]) -> Spec:
    """The spec to look at; raises SpecError where a study has several."""
    if not isinstance(job, Study):
        return job
    runs = job.selected(selections)
    if len(runs) != 1:
        told = f"one run of the study must be chosen, got {len(runs)}; add --only {job.runs[0].name}"
        raise SpecError([f"{spec_path}: {told}"])
    return runs[0].spec


def _outcome(spec: Spec, result: Any, *, command: str) -> str:
    """What a run made and a command to go on with."""
    if spec.kind == "fit_tokenizer":
        return f"weights: {result}\nnext:    set tokenizer.weights to that path in a tokenize spec"
    if spec.kind == "tokenize":
        return f"shards: {spec.run_dir} ({result.num_samples} samples)\nnext:   tensorar preview {spec.run_dir}"
    if spec.kind == "train":
        path = shipped_spec("sample_base" if spec.model.window_size == 1 else "sample_tensorar")
        overrides = [f"weights={spec.run_dir}", f"run_dir={spec.run_dir}-samples"]
        return f"run:  {spec.run_dir}\nnext: {_command(from_here(path), overrides)}"
    if spec.kind == "evaluate":
        return f"report:  {result}\nresults: {spec.run_dir.rstrip('/')}/evaluation.json"
    flags = shlex.join(["--set", f"run_dir={spec.run_dir}-2", "--set", f"seed={spec.seed + 1}"])
    return f"pictures: {spec.run_dir}/grid.png\nnext:     {command} {flags}"


def _is_for_users(error: Exception) -> bool:
    """Whether the message alone says what to do: our own errors, and the ValueErrors of configs and pure functions."""
    # FloatingPointError: a loss that is no longer finite, which ends a rank of torchrun.
    return (
        isinstance(error, ValueError | OSError | FloatingPointError)
        or type(error).__module__.split(".")[0] in OUR_PACKAGES
    )


def _told(error: Exception) -> str:
    """The message; of the operating system's own errors, in our form."""
    if isinstance(error, OSError) and error.strerror is not None:
        doing = "write or read a file" if error.filename is None else f"open {error.filename}"
        return f"{doing}: {error.strerror.lower()}; check the path, its permissions and the free space"
    return str(error)


def _set_up_logging(*, debug: bool) -> None:
    handler: logging.Handler
    if sys.stderr.isatty():
        # On stderr, as the jobs' progress bars: rich then keeps a bar below the lines.
        handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False, log_time_format="[%H:%M:%S]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler], force=True)
    # botocore's debug lines hold the headers of requests, a session token among them.
    s3 = ("botocore", "aiobotocore", "s3fs", "aiohttp", "urllib3")
    for name in ("ray", "deepspeed", "DeepSpeed", "matplotlib", "PIL", "asyncio", "fsspec", "filelock", *s3):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
