"""What `tensorar export` makes of a directory: it looks at what DIR is and calls the package that knows it."""

from __future__ import annotations

from pipeline.config import S3Config
from pipeline.export import LlamaGenExport, export_llamagen
from pipeline.ledger import MANIFEST_NAME
from pipeline.storage import ArtifactError, open_storage

SHARD_SET_LAYOUTS = ("llamagen",)


def export_directory(url: str, *, to: str, output: str, s3: S3Config) -> str:
    """Write a directory's content in another project's layout and return lines that say what is where.

    Args:
        url: The run_dir of a finished tokenize job.
        to: One of `SHARD_SET_LAYOUTS`.
        output: Directory or `s3://` URL to write below.
        s3: How S3 is reached.

    Raises:
        ArtifactError: it is no finished shard set, or it cannot be exported.
    """
    storage = open_storage(url, s3=s3)
    if storage.find(MANIFEST_NAME) is None:
        raise ArtifactError(
            f"export {url}: the directory must be the run_dir of a finished tokenize job, "
            f"got no {MANIFEST_NAME} in it; finish the job or check the path"
        )
    assert to in SHARD_SET_LAYOUTS
    return _llamagen_lines(export_llamagen(storage, output=output, s3=s3))


def _llamagen_lines(done: LlamaGenExport) -> str:
    flags = f"--code-path {done.code_path} --image-size {done.image_size_px} --vocab-size {done.codebook_size}"
    lines = [
        f"codes: {done.code_path} ({done.num_samples} samples, {done.num_views} views of {done.codes_per_image} codes)",
        f"next:  LlamaGen's train_c2i.py {flags}",
        f"       after 1281167 in its dataset/imagenet.py was set to {done.num_samples}, the number of files",
    ]
    if done.num_views > 1:
        lines.append("       keep `flip` in the path: without it, the views are read as one long sequence")
    if done.code_path.endswith("ten_crop"):
        lines.append("       a set with crop_range 1.05 exported to the same --output is drawn from half of the time")
    return "\n".join(lines)
