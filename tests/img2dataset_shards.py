"""Shards as img2dataset writes them in its webdataset format, for tests: tar, Parquet sidecar and stats."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from toy_corpus import png
from webdataset import TarWriter

SUCCESS, NO_DOWNLOAD, NO_RESIZE = "success", "failed_to_download", "failed_to_resize"


def row_of(key: str, status: str = SUCCESS, **fields: Any) -> dict[str, Any]:
    """A row as img2dataset writes it: its input columns, then what came of it."""
    failed = status != SUCCESS
    return {
        "url": f"https://pictures.example/{key}.jpg",
        "caption": f"picture {key}",
        "key": key,
        "status": status,
        "error_message": "HTTP Error 404: Not Found" if failed else None,
        "width": None if failed else 40,
        "height": None if failed else 36,
        "original_width": None if failed else 400,
        "exif": None if failed else "{}",
    } | fields


def write_shard(root: Path, stem: str, rows: list[dict[str, Any]], *, in_tar: list[str] | None = None) -> None:
    """The three files of a shard, in the order in which img2dataset writes them."""
    root.mkdir(parents=True, exist_ok=True)
    keys = [row["key"] for row in rows if row["status"] == SUCCESS] if in_tar is None else in_tar
    with TarWriter(str(root / f"{stem}.tar")) as tar:
        for key in keys:
            fields = next((row for row in rows if row["key"] == key), {})
            tar.write({"__key__": key, "jpg": png(int(key)), "txt": f"picture {key}", "json": json.dumps(fields)})
    pq.write_table(pa.Table.from_pylist(rows), root / f"{stem}.parquet")
    successes = sum(row["status"] == SUCCESS for row in rows)
    (root / f"{stem}_stats.json").write_text(json.dumps({"count": len(rows), "successes": successes, "duration": 1.5}))
