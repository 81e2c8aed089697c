"""Parquet files with a column of images; a run of row groups is a work unit, so a plan costs the files' footers.

The invariant: only the named columns are read, and page by page: a worker holds a few pages of a row group of any size
(21 MB for 400 MB of images in small pages, 450 MB in pyarrow's default pages of 1,024 rows). A file that cannot hold
what the spec says fails the plan; a damaged row group fails its unit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa

from pipeline.config import ParquetConfig, S3Config
from pipeline.sources.fields import checked_caption, checked_label, printable
from pipeline.sources.parquet_columns import (
    IMAGES,
    JSON_VALUES,
    LABELS,
    TEXT,
    check_column,
    image_values,
    open_table,
    python_values,
    read_footer,
    usable,
)
from pipeline.sources.plan import Plan, Source, WorkUnit, fingerprint_of, make_plan, mark_of
from pipeline.sources.sample import InputSample, UnusableSampleError
from pipeline.sources.urls import ListedFile, list_files, read_class_names
from pipeline.storage import ArtifactError, next_action, open_storage

NUM_FOOTER_THREADS = 16
ROWS_PER_BATCH = 32
READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RowGroups:
    """What a unit's `details` are: row groups `[start, stop)` of a file, which hold `num_rows` rows from `first_row`.

    Labels must be below `num_classes`; None if the classes are not known.
    """

    directory: str
    name: str
    start: int
    stop: int
    first_row: int
    num_rows: int
    num_classes: int | None


@dataclass(frozen=True, slots=True)
class _Footer:
    """What a plan needs of a file: the rows of each row group, and Hugging Face's class names if it holds them."""

    num_rows: tuple[int, ...]
    class_names: tuple[str, ...] | None


class ParquetSource(Source):
    """Rows of Parquet files, each an image with a caption, a label and other columns."""

    def __init__(self, config: ParquetConfig, *, s3: S3Config) -> None:
        """Keep the config; touches no file."""
        self._config, self._s3 = config, s3

    def plan(self) -> Plan:
        """See `Source.plan`."""
        files = list_files(self._config.urls, urls_file=self._config.urls_file, s3=self._s3)
        with ThreadPoolExecutor(NUM_FOOTER_THREADS, thread_name_prefix="footer") as pool:
            footers = list(pool.map(self._read_footer, files))
        class_names = read_class_names(self._config.class_names, s3=self._s3) or _agreed_names(files, footers)
        units: list[WorkUnit] = []
        for file, footer in zip(files, footers, strict=True):
            for groups in self._cut(file, footer, num_classes=None if class_names is None else len(class_names)):
                units.append(_make_unit(file, groups, unit_index=len(units)))
        if not units:
            raise ArtifactError(f"plan source: the files must hold rows, got none in {len(files)}; check source.urls")
        return make_plan(
            units, max_samples_per_unit=max(unit.details.num_rows for unit in units), class_names=class_names
        )

    def read(self, unit: WorkUnit) -> Iterator[InputSample]:
        """See `Source.read`."""
        groups: RowGroups = unit.details
        position = 0
        for batch in self._batches(groups):
            yield from self._samples(batch, groups=groups, start=position)
            position += batch.num_rows

    def _read_footer(self, file: ListedFile) -> _Footer:
        config, where = self._config, file.url
        footer = read_footer(open_storage(file.directory, s3=self._s3), file.name, num_bytes=file.info.num_bytes)
        schema = footer.schema.to_arrow_schema()
        check_column(schema, config.image_column, field="image_column", rule=IMAGES, where=where)
        check_column(schema, config.caption_column, field="caption_column", rule=TEXT, where=where)
        check_column(schema, config.label_column, field="label_column", rule=LABELS, where=where)
        for column in config.extra_columns:
            check_column(schema, column, field="extra_columns", rule=JSON_VALUES, where=where)
        num_rows = tuple(footer.row_group(index).num_rows for index in range(footer.num_row_groups))
        return _Footer(num_rows, _hugging_face_names(schema, config.label_column))

    def _cut(self, file: ListedFile, footer: _Footer, *, num_classes: int | None) -> Iterator[RowGroups]:
        """Yield the runs of row groups of a file, without those that hold no row."""
        step, first_rows = self._config.row_groups_per_unit, list(accumulate(footer.num_rows, initial=0))
        for start in range(0, len(footer.num_rows), step):
            stop = min(start + step, len(footer.num_rows))
            num_rows = first_rows[stop] - first_rows[start]
            if num_rows:
                yield RowGroups(file.directory, file.name, start, stop, first_rows[start], num_rows, num_classes)

    def _batches(self, groups: RowGroups) -> Iterator[pa.RecordBatch]:
        """Yield the named columns of a unit's row groups.

        Raises:
            ArtifactError: a page is damaged, or the file is not the one that was planned.
        """
        storage = open_storage(groups.directory, s3=self._s3)
        where, num_rows = storage.url_of(groups.name), 0
        try:
            with storage.open(groups.name) as file:
                table = open_table(
                    file, buffer_size=READ_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
                )
                for batch in table.iter_batches(
                    batch_size=ROWS_PER_BATCH,
                    row_groups=list(range(groups.start, groups.stop)),
                    columns=self._columns(),
                    use_threads=False,
                ):
                    num_rows += batch.num_rows
                    yield batch
        except (OSError, IndexError, pa.ArrowException) as error:
            raise ArtifactError(
                f"read {where}: row groups {groups.start}..{groups.stop - 1} must be whole, got {error}; "
                f"{next_action(error, otherwise='fetch or write it again')}"
            ) from error
        if num_rows != groups.num_rows:
            raise ArtifactError(
                f"read {where}: row groups {groups.start}..{groups.stop - 1} must hold {groups.num_rows} rows as "
                f"planned, got {num_rows}; rerun the job"
            )

    def _columns(self) -> list[str]:
        config = self._config
        named = (config.image_column, config.caption_column, config.label_column, *config.extra_columns)
        return [column for column in dict.fromkeys(named) if column is not None]

    def _samples(self, batch: pa.RecordBatch, *, groups: RowGroups, start: int) -> Iterator[InputSample]:
        images, paths, is_there = image_values(batch.column(self._config.image_column))
        nothing = [None] * batch.num_rows
        captions, labels = (
            nothing if column is None else python_values(batch.column(column))
            for column in (self._config.caption_column, self._config.label_column)
        )
        extras = {column: python_values(batch.column(column)) for column in self._config.extra_columns}
        base_name = printable(groups.name.rpartition("/")[2])
        for index, image in enumerate(images):
            position, path = start + index, paths[index]
            source = f"{base_name}#{groups.first_row + position}"
            try:
                if image is None:
                    raise _no_image(path, is_there=is_there[index])
                yield InputSample(
                    position=position,
                    source=source,
                    data=image,
                    caption=checked_caption(usable(captions[index])),
                    label=checked_label(labels[index], num_classes=groups.num_classes),
                    extra=({} if path is None else {"path": path})
                    | {column: usable(values[index]) for column, values in extras.items()},
                )
            except UnusableSampleError as error:
                yield InputSample(position=position, source=source, extra={}, problem=error.problem)


def _no_image(path: str | None, *, is_there: bool) -> UnusableSampleError:
    if not is_there:
        return UnusableSampleError("null_image", "the image is null")
    return UnusableSampleError("no_image_bytes", f"there are no bytes, only the path {path!r:.200}")


def _make_unit(file: ListedFile, groups: RowGroups, *, unit_index: int) -> WorkUnit:
    name = f"{printable(file.base_name)} row groups {groups.start}..{groups.stop - 1}"
    return WorkUnit(
        unit_index=unit_index,
        name=name,
        fingerprint=fingerprint_of([(name, file.info.num_bytes)]),
        mark=mark_of([file.info]),
        details=groups,
    )


def _hugging_face_names(schema: pa.Schema, label_column: str | None) -> tuple[str, ...] | None:
    """Return the names of a `ClassLabel` feature; None where the file has none for the label column.

    Source: datasets' Parquet writer keeps its features as JSON under the schema's key `huggingface`.
    """
    if label_column is None:
        return None
    try:
        info: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"null"))
        feature = info["info"]["features"][label_column]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
    except (ValueError, KeyError, TypeError):
        return None


def _agreed_names(files: list[ListedFile], footers: list[_Footer]) -> tuple[str, ...] | None:
    """Return the class names that the files hold.

    Raises:
        ArtifactError: two files hold different ones, so that a label would have two meanings.
    """
    holders = [(file, footer) for file, footer in zip(files, footers, strict=True) if footer.class_names is not None]
    for file, footer in holders:
        if footer.class_names != holders[0][1].class_names:
            raise ArtifactError(
                f"plan source: all files must hold the same class names, got others in {file.url} than in "
                f"{holders[0][0].url}; name a file of your own in source.class_names"
            )
    return holders[0][1].class_names if holders else None
