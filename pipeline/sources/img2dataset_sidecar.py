"""img2dataset's NNNNN.parquet: what it was asked to download, a row each, and how that went.

The invariant: every row has a key of its own. The table is held whole (10,000 rows by default, without images).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config import Img2DatasetConfig
from pipeline.sources.parquet_columns import JSON_VALUES, LABELS, TEXT, check_column, open_table, python_values, usable
from pipeline.storage import ArtifactError, Storage, next_action

SUCCESS = "success"
KEY, STATUS, ERROR = "key", "status", "error_message"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """The rows of a sidecar.

    Attributes:
        row_of: the row of each key, in their order.
        statuses: `success` or what went wrong, row by row.
        errors: img2dataset's error messages, row by row.
        captions: row by row; empty where the sidecar has no such column.
        labels: row by row; empty where no column is named.
        extras: the other columns.
    """

    row_of: dict[str, int]
    statuses: list[str | None]
    errors: list[Any]
    captions: list[Any]
    labels: list[Any]
    extras: dict[str, list[Any]]

    def caption(self, row: int) -> Any:
        """Return the caption of a row, None where there is none; `UnusableSampleError` if it is no text."""
        return usable(self.captions[row]) if self.captions else None

    def label(self, row: int) -> Any:
        """Return the label of a row, None where there is none."""
        return self.labels[row] if self.labels else None

    def extra(self, row: int) -> dict[str, Any]:
        """Return the other columns of a row, without those that are null; `UnusableSampleError` if one is no text."""
        return {column: usable(values[row]) for column, values in self.extras.items() if values[row] is not None}


def read_sidecar(storage: Storage, stem: str, *, config: Img2DatasetConfig) -> Sidecar:
    """Return the sidecar of a shard.

    Args:
        storage: img2dataset's output folder.
        stem: the shard's number, as its files spell it.
        config: its column names.

    Raises:
        ArtifactError: the file is missing or damaged, lacks a column, or has a key twice.
    """
    where = storage.url_of(f"{stem}.parquet")
    try:
        file = open_table(pa.BufferReader(storage.map(f"{stem}.parquet")), page_checksum_verification=True)
        schema: pa.Schema = file.schema_arrow
        _check_columns(schema, config=config, where=where)
        captioned = config.caption_column in schema.names
        extra_columns = _extra_columns(schema, config=config)
        named = [KEY, STATUS, ERROR, config.caption_column, config.label_column, *extra_columns]
        columns = [name for name in dict.fromkeys(named) if name in schema.names]
        table = file.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        action = next_action(error, otherwise="let it write the shard again")
        raise ArtifactError(f"read {where}: must be img2dataset's sidecar, got {error}; {action}") from error
    keys = python_values(table.column(KEY))
    row_of = {key: row for row, key in enumerate(keys) if isinstance(key, str)}
    if len(row_of) < len(keys):
        raise ArtifactError(
            f"read {where}: every row must have a key of its own, got {len(row_of)} keys in {len(keys)} rows; let "
            "img2dataset write the shard again"
        )
    return Sidecar(
        row_of=row_of,
        statuses=python_values(table.column(STATUS)),
        errors=python_values(table.column(ERROR)) if ERROR in schema.names else [None] * len(keys),
        captions=python_values(table.column(config.caption_column)) if captioned else [],
        labels=[] if config.label_column is None else python_values(table.column(config.label_column)),
        extras={column: python_values(table.column(column)) for column in extra_columns},
    )


def _check_columns(schema: pa.Schema, *, config: Img2DatasetConfig, where: str) -> None:
    check_column(schema, KEY, field="root", rule=TEXT, where=where)
    check_column(schema, STATUS, field="root", rule=TEXT, where=where)
    if ERROR in schema.names:
        check_column(schema, ERROR, field="root", rule=JSON_VALUES, where=where)
    if config.caption_column in schema.names:
        check_column(schema, config.caption_column, field="caption_column", rule=TEXT, where=where)
    check_column(schema, config.label_column, field="label_column", rule=LABELS, where=where)
    for column in _extra_columns(schema, config=config):
        check_column(schema, column, field="extra_columns", rule=JSON_VALUES, where=where)


def _extra_columns(schema: pa.Schema, *, config: Img2DatasetConfig) -> list[str]:
    if config.extra_columns is not None:
        return list(config.extra_columns)
    taken = (KEY, STATUS, ERROR, config.caption_column, config.label_column)
    return [field.name for field in schema if field.name not in taken and JSON_VALUES.allows(field.type)]
