"""A corpus of bad files through the whole job: nothing crashes, each file is a sample or a reject with its reason."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_inputs import BAD_INPUTS, BadInput
from toy_corpus import tokenize_config, write_tar, write_tiny_tokenizer

from pipeline.rejects import read_rejects
from pipeline.shards import read_shard
from pipeline.storage import Storage, open_storage
from pipeline.tokenize import run_tokenize
from pipeline.verify import verify_shard_set

SAMPLES_PER_UNIT = 40
Outcomes = dict[str, tuple[str, str] | None]


def groups() -> list[list[BadInput]]:
    return [BAD_INPUTS[start : start + SAMPLES_PER_UNIT] for start in range(0, len(BAD_INPUTS), SAMPLES_PER_UNIT)]


def write_corpus(directory: Path, *, kind: str) -> dict[str, object]:
    """The bad inputs as a corpus of one kind; returns the source section of a spec."""
    if kind == "webdataset":
        for number, group in enumerate(groups()):
            write_tar(directory / f"{number:05d}.tar", [(f"{bad.name}.jpg", bad.data) for bad in group])
        return {"kind": kind, "urls": [f"{directory}/*.tar"]}
    if kind == "parquet":
        directory.mkdir()
        for number, group in enumerate(groups()):
            table = pa.table({"image": [bad.data for bad in group], "name": [bad.name for bad in group]})
            pq.write_table(table, directory / f"{number:05d}.parquet")
        return {"kind": kind, "urls": [f"{directory}/*.parquet"], "image_column": "image", "extra_columns": ["name"]}
    (directory / "all").mkdir(parents=True)
    for bad in BAD_INPUTS:
        (directory / "all" / f"{bad.name}.jpg").write_bytes(bad.data)
    return {"kind": kind, "root": str(directory), "samples_per_unit": SAMPLES_PER_UNIT}


def outcomes(storage: Storage, *, key_to_name: dict[str, str]) -> Outcomes:
    """What became of each input by its name: None for a sample, else stage and reason."""
    found: Outcomes = {}
    for name in storage.list("shards/"):
        if name.endswith(".tar"):
            found |= {key_to_name[sample.key]: None for sample in read_shard(storage, name)}
    for name in storage.list("rejects/"):
        rejects = read_rejects(storage, name)
        found |= {key_to_name[reject.key]: (reject.stage, reject.reason) for reject in rejects}
    return found


@pytest.mark.parametrize(
    "kind", ["webdataset", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("parquet", "image_folder"))]
)
def test_every_bad_file_becomes_a_sample_or_a_reject_with_its_reason(tmp_path: Path, kind: str) -> None:
    assert len(BAD_INPUTS) >= 200
    assert len({bad.kind for bad in BAD_INPUTS}) >= 15
    source = write_corpus(tmp_path / "corpus", kind=kind)
    weights = write_tiny_tokenizer(tmp_path / "tiny.safetensors")
    config = tokenize_config(
        tmp_path / "set", source=source, weights=weights, max_rejected_fraction=1.0, cluster={"num_workers": 1}
    )
    manifest = run_tokenize(config, progress=False)
    ordered = sorted(BAD_INPUTS, key=lambda bad: f"{bad.name}.jpg") if kind == "image_folder" else BAD_INPUTS
    key_to_name = {
        f"{number // SAMPLES_PER_UNIT:05d}{number % SAMPLES_PER_UNIT:0{digits}d}": bad.name
        for number, bad in enumerate(ordered)
        for digits in range(1, 6)
    }
    storage = open_storage(str(tmp_path / "set"))
    expected: Outcomes = {
        bad.name: None if bad.expected_reason is None else (str(bad.expected_stage), bad.expected_reason)
        for bad in BAD_INPUTS
    }
    assert outcomes(storage, key_to_name=key_to_name) == expected
    assert manifest.totals.num_read == len(BAD_INPUTS)
    assert verify_shard_set(storage) == []
