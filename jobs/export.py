"""What `tensorar export` makes of a directory: it looks at what DIR is and calls the package that knows it."""

from __future__ import annotations

import shlex

from jobs.run import kind_of
from pipeline.config import S3Config
from pipeline.export import LlamaGenExport, export_llamagen
from pipeline.ledger import MANIFEST_NAME
from pipeline.storage import S3_SCHEME, ArtifactError, open_storage
from training.checkpoint import CHECKPOINTS, step_in_name

LAYOUTS = ("llamagen", "safetensors")
LLAMAGEN_CHOICES = {"--image-size": (256, 384, 448, 512), "--downsample-size": (8, 16)}
"""What LlamaGen's train_c2i.py takes."""


def export_directory(
    url: str, *, to: str, output: str, s3: S3Config, use_ema: bool = False, step: int | None = None
) -> str:
    """Write a directory's content in another project's layout and return lines that say what is where.

    Args:
        url: The run_dir of a finished tokenize job or of a train job, or one checkpoint of that.
        to: One of `LAYOUTS`; a shard set goes to `llamagen` only.
        output: Path or `s3://` URL: of a directory to write a shard set below, of the file that a run becomes.
        s3: How S3 is reached.
        use_ema: Whether to take a run's moving average of the weights.
        step: Of the checkpoint of a run; none is the newest whole one.

    Raises:
        ArtifactError: it is neither, or it cannot be exported.
    """
    assert to in LAYOUTS
    storage = open_storage(url, s3=s3)
    if storage.find(MANIFEST_NAME) is not None:
        if to != "llamagen" or use_ema or step is not None:
            raise ArtifactError(
                f"export {url}: a shard set must go --to llamagen without --ema and --step, got --to {to} or one of "
                "them; drop what is of training runs"
            )
        return _llamagen_lines(export_llamagen(storage, output=output, s3=s3))
    if kind_of(storage) == "fit_tokenizer":
        raise ArtifactError(
            f"export {url}: the directory must be the run_dir of a finished tokenize job or of a train job, got the "
            "fit of a tokenizer, whose weights are a file already; set tokenizer.weights to its tokenizer.safetensors"
        )
    is_checkpoint = step_in_name(url.rstrip("/").rpartition("/")[2]) is not None
    if not is_checkpoint and not storage.list(f"{CHECKPOINTS}/"):
        raise ArtifactError(
            f"export {url}: the directory must be the run_dir of a finished tokenize job or of a train job, "
            f"got neither {MANIFEST_NAME} nor {CHECKPOINTS}/ in it; finish the job, or name its run_dir or one "
            f"{CHECKPOINTS}/step_ below that"
        )
    from training.export import export_run  # noqa: PLC0415  (imports torch)

    done = export_run(url, to=to, output=output, use_ema=use_ema, step=step, s3=s3)
    part, use = ("the base model", "warm_start") if to == "llamagen" else ("the model", "weights")
    told = f"{done.num_tensors} tensors of {part}, {done.what} of step {done.step}"
    return f"weights: {output} ({told})\nnext:    --set {use}={output}"


def _llamagen_lines(done: LlamaGenExport) -> str:
    """Return what is where, the command that trains on it, and what LlamaGen needs changed for that command to run."""
    flags = {
        "--code-path": shlex.quote(done.code_path),
        "--cloud-save-path": "DIR",
        "--image-size": done.image_size_px,
        "--downsample-size": done.patch_px,
        "--vocab-size": done.codebook_size,
    }
    if done.num_classes is not None:
        flags["--num-classes"] = done.num_classes
    lines = [
        f"codes: {done.code_path} ({done.num_samples} samples, {done.num_views} views of {done.codes_per_image} codes)",
        f"next:  LlamaGen's train_c2i.py {' '.join(f'{flag} {value}' for flag, value in flags.items())}",
        f"       after 1281167 in its dataset/imagenet.py was set to {done.num_samples}, the number of files",
    ]
    for flag, choices in LLAMAGEN_CHOICES.items():
        if flags[flag] not in choices:
            known = ", ".join(map(str, choices))
            lines.append(f"       after {flags[flag]} was added to the choices of {flag} in train_c2i.py, {known}")
    lines.append("       with DIR for a second copy of its checkpoints")
    if done.num_classes is None:
        lines.append("       with --num-classes above the largest label, where that is not below 1000")
    if done.code_path.startswith(S3_SCHEME):
        lines.append("       after the folder was copied to a disk under its own name, the path of --code-path then")
    if done.num_views > 1:
        lines.append("       keep `flip` in the path: without it, the views are read as one long sequence")
    if done.code_path.endswith("ten_crop"):
        lines.append("       a set with crop_range 1.05 exported to the same --output is drawn from half of the time")
    return "\n".join(lines)
