"""The kinds of source: a new one is a file with its class, its config in `pipeline.config`, and a line here."""

from __future__ import annotations

from typing import Any

from pipeline.config import S3Config, SourceConfig
from pipeline.sources.image_folder import ImageFolderSource
from pipeline.sources.img2dataset import Img2DatasetSource
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.plan import Source
from pipeline.sources.webdataset import WebDatasetSource

SOURCES: dict[str, Any] = {
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
    "image_folder": ImageFolderSource,
    "img2dataset": Img2DatasetSource,
}
"""The class of each `source.kind`; made with (config, s3=...)."""


def make_source(config: SourceConfig, *, s3: S3Config) -> Source:
    """Return the source that a config describes; touches no file.

    Args:
        config: the `source` section of a spec.
        s3: how `s3://` URLs are reached.
    """
    source: Source = SOURCES[config.kind](config, s3=s3)
    return source
