"""Shard sets for the tests that read them with other packages, and what our own reader finds in them."""

from pathlib import Path
from typing import Any

from toy_corpus import (
    Members,
    png,
    sample_members,
    tokenize_config,
    tokenize_here,
    write_tar,
    write_tars,
    write_tiny_tokenizer,
)

from pipeline.shards import read_shard
from pipeline.storage import open_storage


def tokenized(root: Path, name: str, source: dict[str, Any]) -> Path:
    """The set `root/name`, made of a source by the tiny tokenizer."""
    weights = root / "tiny.safetensors"
    if not weights.exists():
        write_tiny_tokenizer(weights)
    tokenize_here(tokenize_config(root / name, source=source, weights=weights))
    return root / name


def make_gapped_set(root: Path, name: str = "set") -> Path:
    """Of 4 tars: 6 samples, 6 and a reject, a reject alone (so no shard), 6; 18 written in 3 shards."""
    write_tars(root / "tars", num_tars=4, samples_per_tar=6)
    torn = ("torn.png", png(1)[:-40])
    write_tar(root / "tars" / "00001.tar", [*sample_members(6), torn, *members_of(range(7, 12))])
    write_tar(root / "tars" / "00002.tar", [("none.png", b"")])
    return tokenized(root, name, {"kind": "webdataset", "urls": [f"{root}/tars/{{00000..00003}}.tar"]})


def make_mixed_set(root: Path) -> Path:
    """Six samples without caption, label or anything else, then six that have all of it."""
    bare = [(f"b{number}.png", png(number)) for number in range(6)]
    urls = [str(write_tar(root / "mixed_tars" / "0.tar", bare))]
    urls.append(str(write_tar(root / "mixed_tars" / "1.tar", members_of(range(6)))))
    return tokenized(root, "mixed", {"kind": "webdataset", "urls": urls})


def members_of(numbers: range) -> Members:
    return [member for number in numbers for member in sample_members(number)]


def written(run_dir: Path) -> dict[str, tuple[list[list[int]], dict[str, Any]]]:
    """Codes and metadata of every sample by its key, in order, by our own reader."""
    storage = open_storage(str(run_dir))
    names = [name for name in storage.list("shards/") if name.endswith(".tar")]
    samples = [sample for name in names for sample in read_shard(storage, name)]
    return {sample.key: (sample.codes_VT.tolist(), sample.metadata) for sample in samples}


def tars_of(run_dir: Path) -> list[str]:
    """Its shards, as other packages want them."""
    return sorted(str(path) for path in run_dir.glob("shards/*.tar"))
