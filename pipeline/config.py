"""What a source, a cluster, a shard reader and a `tokenize` job are, as validated values.

Light: imports no torch and no ray.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from tokenization.config import Config, Fraction, Place, TokenizerConfig, ViewsConfig

Seed = Annotated[int, Field(ge=0, lt=2**56)]
"""What every counter-based draw is keyed by."""


class ListedFilesConfig(Config):
    """Base of the sources whose files are named one by one."""

    urls: tuple[Place, ...] = ()
    """Paths or s3:// URLs; braces (`{00000..00009}`) and globs are expanded, the order is kept."""
    urls_file: Place | None = None
    """Text file with one such URL a line, instead of `urls`; lines that begin with # are comments."""

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if bool(self.urls) == (self.urls_file is not None):
            got = "both" if self.urls else "neither"
            raise ValueError(f"exactly one of urls and urls_file must be given, got {got}; keep one")
        return self


class WebDatasetConfig(ListedFilesConfig):
    """Tars of samples; one tar is one work unit."""

    kind: Literal["webdataset"]
    class_names: Place | None = None
    """Text file with one class name a line, in label order; stored in the manifest."""
    caption_field: str = "caption"
    """Field of a sample's JSON that holds the caption; a `txt` member wins."""
    label_field: str = "label"
    """Field of a sample's JSON that holds the label; a `cls` member wins."""


class ImageFolderConfig(Config):
    """A tree of image files; a fixed run of sorted files is one work unit."""

    kind: Literal["image_folder"]
    root: Place
    """Folder or s3:// URL that the images lie below."""
    layout: Literal["class_per_folder", "captions"] = "class_per_folder"
    """`class_per_folder`: its sub-folders are the classes, in sorted order (ImageFolder's rule); `captions`: each image
    has NAME.txt, or NAME.json with a `caption`, beside it."""
    samples_per_unit: PositiveInt = 1000
    """Images per work unit."""


class ParquetConfig(ListedFilesConfig):
    """Parquet files with a column of images; a run of row groups is one work unit."""

    kind: Literal["parquet"]
    image_column: str = "image"
    """Column of image files: bytes, or Hugging Face's struct of `bytes` and `path`."""
    caption_column: str | None = None
    """Column of captions."""
    label_column: str | None = None
    """Column of integer labels; Hugging Face's ClassLabel also gives the class names."""
    extra_columns: tuple[str, ...] = ()
    """Columns that are kept as they are, beside the codes; no other column is read."""
    class_names: Place | None = None
    """Text file with one class name a line, in label order, instead of those that the files hold."""
    row_groups_per_unit: PositiveInt = 1
    """Row groups per work unit; a unit never spans two files."""


class Img2DatasetConfig(Config):
    """An output folder of img2dataset in its webdataset format; one tar is one work unit."""

    kind: Literal["img2dataset"]
    root: Place
    """Folder or s3:// URL with NNNNN.tar, NNNNN.parquet and NNNNN_stats.json."""
    caption_column: str = "caption"
    """Column of the sidecar that holds the captions; where it is missing or null, a `txt` member is the caption."""
    label_column: str | None = None
    """Column of the sidecar that holds integer labels."""
    extra_columns: tuple[str, ...] | None = None
    """Columns of the sidecar that are kept beside the codes; without it all that JSON can hold (url, width, ...)."""
    allow_unfinished: bool = False
    """Whether tars without their _stats.json, which img2dataset writes last, are left out instead of an error."""


SourceConfig = Annotated[
    WebDatasetConfig | ParquetConfig | ImageFolderConfig | Img2DatasetConfig, Field(discriminator="kind")
]


class RulesConfig(Config):
    """Rules that drop a sample on purpose; each is counted in the ledger."""

    min_side_px: NonNegativeInt = 0
    """Images with a shorter side are dropped."""
    max_aspect_ratio: PositiveFloat | None = None
    """Images whose longer side over shorter side is above it are dropped."""


def checked_endpoint(url: str) -> str:
    """Return the address of an S3 server; one without its scheme is a ValueError, whose text has no password."""
    if not url.startswith(("http://", "https://")):
        host = url.rpartition("@")[2]
        raise ValueError(f"an endpoint must begin with http:// or https://, got {host!r}; write it before the host")
    return url


class S3Config(Config):
    """How `s3://` URLs are reached; credentials come from the standard chain (environment, profile, role)."""

    endpoint_url: Annotated[str, AfterValidator(checked_endpoint)] | None = None
    """Address of an S3-compatible server; without it AWS_ENDPOINT_URL, then AWS."""
    max_attempts: PositiveInt = 8
    """Times a request or a broken read is tried, with exponential back-off, before the work unit fails."""


class ClusterConfig(Config):
    """Where a job runs; the only section that differs between a laptop and a cluster."""

    launcher: Literal["ray", "torchrun"] = "ray"
    """`ray` starts the processes itself; `torchrun` (training only) expects to be started by torchrun."""
    address: str = "local"
    """Ray address: `local` embeds Ray in this process, `auto` joins the cluster of this machine, or `host:port`."""
    num_workers: PositiveInt = 2
    """Worker processes; in training, each is one rank."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPU cores that Ray sets aside for a worker; also its thread count (rounded down, at least 1)."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs that Ray sets aside for a worker."""
    min_workers: PositiveInt | None = None
    """Training goes on with as few ranks when nodes are lost and do not come back; none keeps `num_workers`."""
    node_wait_s: NonNegativeFloat = 120.0
    """Seconds that a training run waits for room for all its ranks before it starts with fewer."""
    max_failures: NonNegativeInt = 3
    """Restarts in a row of a training run whose ranks or nodes died, from its newest whole checkpoint; a new checkpoint
    begins the count anew, and a preemption is not counted."""


class TokenizeConfig(Config):
    """`kind: tokenize`: a corpus of images in, WebDataset shards of codes out."""

    kind: Literal["tokenize"]
    run_dir: Place
    """The shard set: shards/, ledger/, rejects/, manifest.json."""
    source: SourceConfig
    tokenizer: TokenizerConfig
    views: ViewsConfig = ViewsConfig()
    rules: RulesConfig = RulesConfig()
    max_image_pixels: PositiveInt = 100_000_000
    """Images with more pixels are rejected before they are decoded (decompression bombs)."""
    max_attempts: PositiveInt = 3
    """Times a work unit is tried before it is set aside as poison; the other units go on."""
    max_poison_units: NonNegativeInt = 0
    """Units that may be set aside before the job is called failed, once all others are done."""
    max_rejected_fraction: Fraction = 0.1
    """Share of samples that may be rejected before the finished job is called failed."""
    s3: S3Config = S3Config()
    cluster: ClusterConfig = ClusterConfig()


class MixturePartConfig(Config):
    """One shard set of a mixture."""

    shards: Place
    """Directory or s3:// URL of a shard set (the `run_dir` of a tokenize job)."""
    weight: PositiveFloat
    """Its share of all samples, relative to the other parts' weights; decimals are taken exactly."""


class LoaderConfig(Config):
    """How shards become batches."""

    shards: Place | None = None
    """Directory or s3:// URL of a shard set (the `run_dir` of a tokenize job)."""
    mixture: tuple[MixturePartConfig, ...] = ()
    """Several shard sets of one tokenizer instead of `shards`, each read epoch by epoch at the pace of its weight."""
    shuffle_window_shards: PositiveInt = 16
    """Shards whose samples are shuffled together; up to three times as many are kept open."""
    seed: Seed = 0
    """Seed of the order; order = f(seed, epoch)."""
    on_damage: Literal["fail", "replace"] = "fail"
    """What a damaged sample does: end the run, or be replaced by another one of its shard, with a warning of both."""
    cache_dir: Place | None = None
    """Local directory that shards on S3 are downloaded to, shared by all ranks of a machine; none is below TMPDIR."""
    max_cache_gb: PositiveFloat = 20.0
    """What `cache_dir` may hold, in 10^9 bytes, for all ranks of a machine together."""
    read_ahead_batches: NonNegativeInt = 2
    """Batches that a thread reads while a step runs; 0 reads each when it is needed."""

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if (self.shards is not None) == bool(self.mixture):
            got = "both; keep one" if self.mixture else "neither; give one"
            raise ValueError(f"exactly one of shards and mixture must be given, got {got}")
        return self

    @property
    def parts(self) -> tuple[MixturePartConfig, ...]:
        """The parts of the mixture; `shards` alone is a mixture of one."""
        return self.mixture if self.shards is None else (MixturePartConfig(shards=self.shards, weight=1.0),)
