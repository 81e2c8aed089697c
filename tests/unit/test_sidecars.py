"""The files that other readers open a shard set by: their bytes, and that they follow from the manifest alone."""

import json
import random
from pathlib import Path

import pytest
import yaml
from braceexpand import braceexpand
from synthetic_shards import fingerprint_of, write_shard_set

from pipeline.ledger import Manifest, read_manifest
from pipeline.shards import ShardInfo
from pipeline.sidecars import brace_patterns, remove_sidecars, sidecar_files, write_sidecars
from pipeline.storage import open_storage

SHARDS = [
    ShardInfo(name="00000.tar", num_samples=3, bytes=20480, sha256="0" * 64),
    ShardInfo(name="00001.tar", num_samples=5, bytes=30720, sha256="1" * 64),
    ShardInfo(name="00003.tar", num_samples=1, bytes=10240, sha256="3" * 64),
]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of a set whose unit 2 wrote nothing; none of its shards is on disk."""
    written = read_manifest(open_storage(str(write_shard_set(tmp_path / "set", samples_per_shard=(1,)))))
    return written.model_copy(update={"shards": SHARDS, "num_samples": 9})


def test_energons_files_list_the_shards_below_the_root_with_their_counts(manifest: Manifest) -> None:
    files = sidecar_files(manifest)
    assert json.loads(files[".nv-meta/.info.json"]) == {
        "energon_version": "7.4.1",
        "shard_counts": {"shards/00000.tar": 3, "shards/00001.tar": 5, "shards/00003.tar": 1},
    }
    assert files[".nv-meta/split.yaml"] == (
        b"split_parts:\n  train:\n  - shards/{00000..00001}.tar\n  - shards/00003.tar\n  val: []\n  test: []\n"
        b"exclude: []\n"
    )
    assert files[".nv-meta/dataset.yaml"] == b"__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def test_the_wids_index_lists_the_shards_relative_to_itself(manifest: Manifest) -> None:
    assert json.loads(sidecar_files(manifest)["shardindex.json"]) == {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": f"tensorar-{fingerprint_of().digest}",
        "shardlist": [
            {"url": "shards/00000.tar", "nsamples": 3, "filesize": 20480},
            {"url": "shards/00001.tar", "nsamples": 5, "filesize": 30720},
            {"url": "shards/00003.tar", "nsamples": 1, "filesize": 10240},
        ],
    }


def test_sidecars_are_committed_without_a_look_at_the_shards(manifest: Manifest, tmp_path: Path) -> None:
    write_sidecars(open_storage(str(tmp_path / "new")), manifest)
    committed = {
        path.relative_to(tmp_path / "new").as_posix(): path.read_bytes()
        for path in (tmp_path / "new").rglob("*")
        if path.is_file()
    }
    assert committed == sidecar_files(manifest)
    assert len(committed) == 4


def test_energon_finds_no_info_of_a_set_without_its_split(manifest: Manifest) -> None:
    assert list(sidecar_files(manifest))[-1] == ".nv-meta/.info.json"


def test_removed_sidecars_leave_no_file(manifest: Manifest, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "new"))
    write_sidecars(storage, manifest)
    remove_sidecars(storage)
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([], []),
        (["00007.tar"], ["00007.tar"]),
        (["a/00008.tar", "a/00009.tar", "a/00010.tar"], ["a/{00008..00010}.tar"]),
        (["99.tar", "100.tar"], ["99.tar", "100.tar"]),
        (["a/1.tar", "b/2.tar"], ["a/1.tar", "b/2.tar"]),
        (["2.tar", "1.tar"], ["2.tar", "1.tar"]),
        (["x1.tar", "x2.tar"], ["x1.tar", "x2.tar"]),
    ],
)
def test_consecutive_numbers_become_one_pattern(names: list[str], patterns: list[str]) -> None:
    assert brace_patterns(names) == patterns


@pytest.mark.parametrize("seed", range(20))
def test_patterns_expand_to_the_names_in_their_order(seed: int) -> None:
    draws = random.Random(seed)
    names = [f"shards/{number:03d}.tar" for number in range(300) if draws.random() < 0.8]
    patterns = brace_patterns(names)
    assert [name for pattern in patterns for name in braceexpand(pattern)] == names
    assert len(patterns) < len(names) / 2


def test_split_names_every_shard_once_at_any_size(manifest: Manifest) -> None:
    shards = [
        ShardInfo(name=f"{unit:05d}.tar", num_samples=1, bytes=10240, sha256="0" * 64)
        for unit in range(100_000)
        if unit % 1000
    ]
    split = yaml.safe_load(sidecar_files(manifest.model_copy(update={"shards": shards}))[".nv-meta/split.yaml"])
    assert split["split_parts"]["train"][:2] == ["shards/{00001..00999}.tar", "shards/{01001..01999}.tar"]
    assert len(split["split_parts"]["train"]) == 100
