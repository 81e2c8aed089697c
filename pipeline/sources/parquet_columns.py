"""Footers and columns of Parquet files: which types may hold images, text, labels and metadata, and their values.

The invariant: a column of the wrong type is found from the footer, before any row is read; a value that is no text is
that row's problem alone. NaN and infinities become null, because JSON has neither.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.sample import UnusableSampleError
from pipeline.storage import ArtifactError, Storage, next_action

FOOTER_GUESS_BYTES = 1 << 16
_MAGIC = b"PAR1"
_TRAILER_BYTES = 8
_ARROW_TYPES = b"ARROW:schema"
_BINARY_TYPES = frozenset(("binary", "large_binary", "binary_view"))
_TEXT_TYPES = frozenset(("string", "large_string", "string_view"))


def read_footer(storage: Storage, name: str, *, num_bytes: int) -> pq.FileMetaData:
    """Return the metadata of a Parquet file from its last bytes alone: one request, two for a long footer.

    Args:
        storage: where the file lies.
        name: its name there.
        num_bytes: its size, as listed.

    Raises:
        ArtifactError: it is missing, or no Parquet file.

    Source: Parquet's file format: it ends in footer, length of the footer as 4 little-endian bytes, `PAR1`.
    """
    where = storage.url_of(name)
    try:
        tail = storage.read_bytes(name, start=max(0, num_bytes - FOOTER_GUESS_BYTES), end=num_bytes)
        if len(tail) < _TRAILER_BYTES or tail[-4:] != _MAGIC:
            raise ValueError(f"a last word of {tail[-4:]!r}")
        wanted = int.from_bytes(tail[-_TRAILER_BYTES:-4], "little") + _TRAILER_BYTES
        if wanted > num_bytes - len(_MAGIC):
            raise ValueError(f"a footer of {wanted} bytes in a file of {num_bytes}")
        if wanted > len(tail):
            tail = storage.read_bytes(name, start=num_bytes - wanted, end=num_bytes)
        return pq.read_metadata(pa.BufferReader(_MAGIC + tail[-wanted:]))
    except (OSError, ValueError, pa.ArrowException) as error:
        action = next_action(error, otherwise="fetch or write it again")
        raise ArtifactError(f"read {where}: must be a Parquet file, got {error}; {action}") from error


def open_table(file: Any, **options: Any) -> pq.ParquetFile:
    """Return an open Parquet file of which a value that is no UTF-8 spoils no other one.

    Arrow checks the text of a dictionary column as a whole; Parquet itself knows no such columns, only what the writer
    kept of Arrow's types, which is passed over where it holds one.

    Args:
        file: open for reading, seekable; stays open.
        options: of `pq.ParquetFile`.
    """
    table = pq.ParquetFile(file, **options)
    if any(_holds(field.type, pa.types.is_dictionary) for field in table.schema_arrow):
        return pq.ParquetFile(file, metadata=_footer_without_arrow_types(file), **options)
    return table


def _footer_without_arrow_types(file: Any) -> pq.FileMetaData:
    file.seek(-_TRAILER_BYTES, os.SEEK_END)
    wanted = int.from_bytes(file.read(4), "little") + _TRAILER_BYTES
    file.seek(-wanted, os.SEEK_END)
    footer = file.read(wanted).replace(_ARROW_TYPES, b"-" * len(_ARROW_TYPES))
    return pq.read_metadata(pa.BufferReader(_MAGIC + footer))


@dataclass(frozen=True)
class ColumnRule:
    """Which types a column may have, and how a message calls them."""

    allows: Callable[[pa.DataType], bool]
    words: str


def check_column(schema: pa.Schema, column: str | None, *, field: str, rule: ColumnRule, where: str) -> None:
    """Check that a column is there, once, and of a type that will do; None is no column.

    Args:
        schema: of the file.
        column: its name.
        field: the field of the source that names it.
        rule: what its type may be.
        where: the file.

    Raises:
        ArtifactError: naming file, column, type and the columns that there are.
    """
    if column is None:
        return
    num_found = schema.names.count(column)
    if num_found != 1:
        near = difflib.get_close_matches(column, schema.names, n=1)
        advice = f"did you mean {near[0]}?" if near and num_found == 0 else f"check source.{field}"
        raise ArtifactError(
            f"read {where}: there must be one column {column!r} for source.{field}, got {num_found} of it among "
            f"{', '.join(schema.names)}; {advice}"
        )
    found = schema.field(column).type
    if not rule.allows(found):
        fitting = [name for name, other in zip(schema.names, schema.types, strict=True) if rule.allows(other)]
        advice = f"such columns are {', '.join(fitting)}" if fitting else f"check source.{field}"
        raise ArtifactError(
            f"read {where}: column {column!r} must be {rule.words} to be source.{field}, got {found}; {advice}"
        )


def is_image_type(kind: pa.DataType) -> bool:
    """Whether a column may hold image files: bytes, or Hugging Face's struct of `bytes` and `path`."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and is_image_type(kind.field(index).type)
    return str(_value_type(kind)) in _BINARY_TYPES


def is_text_type(kind: pa.DataType) -> bool:
    """Whether a column may hold captions; all null will do."""
    return str(_value_type(kind)) in _TEXT_TYPES or bool(pa.types.is_null(kind))


def is_label_type(kind: pa.DataType) -> bool:
    """Whether a column may hold labels; all null will do."""
    return bool(pa.types.is_integer(_value_type(kind)) or pa.types.is_null(kind))


def is_json_type(kind: pa.DataType) -> bool:
    """Whether the values of a column can be written as JSON."""
    kind = _value_type(kind)
    if pa.types.is_struct(kind):
        return all(is_json_type(kind.field(index).type) for index in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return is_json_type(kind.value_type)
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or is_text_type(kind)


IMAGES = ColumnRule(is_image_type, "bytes or a struct with bytes")
TEXT = ColumnRule(is_text_type, "text")
LABELS = ColumnRule(is_label_type, "integers")
JSON_VALUES = ColumnRule(is_json_type, "numbers, text, or lists or structs of them")


def python_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of a column; where one is no UTF-8, `UnusableSampleError` stands in its place, not raised."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # Parquet's writers need not check text, and one bad value spoils the whole list
        values = [_python_value(value) for value in column]
    return [_without_nan(value) for value in values] if _holds(column.type, pa.types.is_floating) else values


def image_values(column: pa.Array) -> tuple[list[bytes | None], list[str | None], list[bool]]:
    """Return what an image column holds, value by value: the bytes, the path, and whether there is a value at all."""
    is_there: list[bool] = column.is_valid().to_pylist()
    if not pa.types.is_struct(column.type):
        return column.to_pylist(), [None] * len(column), is_there
    parts = dict(zip([field.name for field in column.type], column.flatten(), strict=True))
    has_path = "path" in parts and is_text_type(parts["path"].type)
    paths = python_values(parts["path"]) if has_path else [None] * len(column)
    return parts["bytes"].to_pylist(), [path if isinstance(path, str) else None for path in paths], is_there


def usable(value: Any) -> Any:
    """Return a value of `python_values`, or raise what stands in its place."""
    if isinstance(value, UnusableSampleError):
        raise value
    return value


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return UnusableSampleError("bad_text", f"text must be UTF-8: {error.reason}")


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _holds(kind: pa.DataType, is_such: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type, or one inside it, is such a one."""
    if is_such(kind):
        return True
    kind = _value_type(kind)
    if pa.types.is_struct(kind):
        return any(_holds(kind.field(index).type, is_such) for index in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _holds(kind.value_type, is_such)
    return is_such(kind)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return value
