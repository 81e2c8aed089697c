"""Every new kind of source through the whole of a job but Ray: the counts are the corpus's, the bytes repeat."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset_shards import NO_DOWNLOAD, NO_RESIZE, SUCCESS, row_of, write_shard
from toy_corpus import files_of, png, tokenize_config, tokenize_here, write_tiny_tokenizer

from pipeline.ledger import Manifest
from pipeline.shards import read_shard
from pipeline.storage import open_storage


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def tokenized(tmp_path: Path, weights: Path, source: dict[str, Any], **fields: Any) -> tuple[Manifest, list[Any]]:
    """The manifest, and the metadata of all samples; the job is run twice and must write the same."""
    runs = [tmp_path / "first", tmp_path / "second"]
    manifests = [tokenize_here(tokenize_config(run, source=source, weights=weights, **fields)) for run in runs]
    assert files_of(runs[0]) == files_of(runs[1])
    storage = open_storage(str(runs[0]))
    shards = [f"shards/{shard.name}" for shard in manifests[0].shards]
    return manifests[0], [sample.metadata for shard in shards for sample in read_shard(storage, shard)]


def test_an_img2dataset_folder_balances_against_its_sidecars(tmp_path: Path, weights: Path) -> None:
    corpus = tmp_path / "corpus"
    statuses = [SUCCESS, NO_DOWNLOAD, SUCCESS, NO_RESIZE, NO_DOWNLOAD]
    for shard in range(2):
        rows = [row_of(f"{shard:05d}{number:04d}", status) for number, status in enumerate(statuses)]
        write_shard(corpus, f"{shard:05d}", rows)
    write_shard(corpus, "00002", [row_of("000020000", NO_DOWNLOAD)])
    manifest, metadata = tokenized(tmp_path, weights, {"kind": "img2dataset", "root": str(corpus)})
    totals = manifest.totals
    assert (totals.num_read, totals.num_written, totals.num_dropped, totals.num_rejected) == (11, 4, 7, 0)
    assert totals.dropped_by_reason == {"img2dataset_failed_to_download": 5, "img2dataset_failed_to_resize": 2}
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar"]
    assert [one["source"] for one in metadata] == ["000000000", "000000002", "000010000", "000010002"]
    assert metadata[0]["extra"]["url"] == "https://pictures.example/000000000.jpg"


def test_parquet_rows_are_written_or_rejected(tmp_path: Path, weights: Path) -> None:
    images = [png(0), None, b"no image", png(1), png(2)]
    table = pa.table({"image": images, "text": ["a", "b", "c", "d", None], "score": [0.5, 1.0, 1.5, float("nan"), 2.5]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    source = {
        "kind": "parquet",
        "urls": [f"{tmp_path}/*.parquet"],
        "caption_column": "text",
        "extra_columns": ["score"],
    }
    manifest, metadata = tokenized(tmp_path, weights, source)
    totals = manifest.totals
    assert (totals.num_read, totals.num_written, totals.num_dropped, totals.num_rejected) == (5, 3, 0, 2)
    assert totals.rejected_by_reason["read/null_image"] == 1
    assert [(one["source"], one["caption"], one["extra"]) for one in metadata] == [
        ("x.parquet#0", "a", {"score": 0.5}),
        ("x.parquet#3", "d", {"score": None}),
        ("x.parquet#4", None, {"score": 2.5}),
    ]


def test_a_folder_with_captions_is_written_with_them(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(5):
        (tmp_path / "corpus" / f"{number}.png").write_bytes(png(number))
        if number != 3:
            (tmp_path / "corpus" / f"{number}.txt").write_text(f"caption {number}")
    source = {"kind": "image_folder", "root": f"{tmp_path}/corpus", "layout": "captions", "samples_per_unit": 2}
    manifest, metadata = tokenized(tmp_path, weights, source)
    assert manifest.totals.rejected_by_reason == {"read/no_caption": 1}
    assert [one["caption"] for one in metadata] == ["caption 0", "caption 1", "caption 2", "caption 4"]
