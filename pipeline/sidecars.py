"""Sidecars: the small files by which other readers open a shard set without a pass of their own over its bytes.

The invariant: they are a function of the manifest alone, are written just before it, and so cost O(shards) and have the
same bytes on every rerun. Energon (layout of 7.4) opens `.nv-meta/` with the `.tar.idx` beside each shard; its
`index.sqlite`, 210 bytes for every sample, is left out (210 GB at 10^9): only joins and lookups by key read it, and
`energon prepare --force-overwrite` adds it. wids opens `shardindex.json` and never looks at the `md5sum` it may hold.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from pipeline.ledger import Manifest
from pipeline.storage import Storage

ENERGON_VERSION = "7.4.1"
"""The release that our `.nv-meta/` follows and is tested with."""
ENERGON_INFO = ".nv-meta/.info.json"
ENERGON_SPLIT = ".nv-meta/split.yaml"
ENERGON_DATASET = ".nv-meta/dataset.yaml"
WIDS_INDEX = "shardindex.json"

_LISTS = {ENERGON_INFO: "shard_counts", WIDS_INDEX: "shardlist"}
"""Where a sidecar speaks of each shard."""
_REDO = "rerun the tokenize job to rewrite it"
_NUMBERED = re.compile(r"([0-9]+)\.tar")


def write_sidecars(storage: Storage, manifest: Manifest) -> None:
    """Commit the sidecars of a finished set, replacing older ones; the manifest is to be written after them.

    Args:
        storage: the set's directory.
        manifest: of the set; it lists at least one shard.
    """
    for name, data in sidecar_files(manifest).items():
        storage.write_bytes(name, data)


def remove_sidecars(storage: Storage) -> None:
    """Remove the sidecars, the one that marks the set as prepared first; for when shards are about to be replaced."""
    for name in (ENERGON_INFO, ENERGON_SPLIT, ENERGON_DATASET, WIDS_INDEX):
        storage.remove(name)


def sidecar_problems(storage: Storage, manifest: Manifest) -> list[str]:
    """Return a line for each sidecar that is missing or counts other shards than the manifest.

    What `energon prepare` may decide anew (the split, the sample loader, its version) is not compared.
    """
    problems = []
    for name, data in sidecar_files(manifest).items():
        if storage.find(name) is None:
            problems.append(f"{storage.url_of(name)}: must be there for other readers, got nothing; {_REDO}")
        elif name in _LISTS and _listed(storage.read_bytes(name), name) != _listed(data, name):
            problems.append(f"{storage.url_of(name)}: must list the manifest's {len(manifest.shards)} shards; {_REDO}")
    return problems


def _listed(data: bytes, name: str) -> Any:
    """Return what a sidecar says of the shards; None where it is damaged."""
    try:
        return json.loads(data)[_LISTS[name]]
    except (ValueError, TypeError, KeyError):
        return None


def sidecar_files(manifest: Manifest) -> dict[str, bytes]:
    """Return the content of each sidecar by its name, in the order of writing; pure.

    Source: `energon prepare` with `--sample-type CrudeWebdataset` (7.4.1); `widsindex create` (wids 0.1.11).
    """
    names = [f"shards/{shard.name}" for shard in manifest.shards]
    split_parts = {"train": brace_patterns(names), "val": [], "test": []}
    counts = {name: shard.num_samples for name, shard in zip(names, manifest.shards, strict=True)}
    shardlist = [
        {"url": name, "nsamples": shard.num_samples, "filesize": shard.bytes}
        for name, shard in zip(names, manifest.shards, strict=True)
    ]
    wids_name = f"tensorar-{manifest.fingerprint.digest}"
    return {
        WIDS_INDEX: _json(
            # No "base": the URLs then follow the index, wherever the set is moved to.
            {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": wids_name, "shardlist": shardlist}
        ),
        ENERGON_DATASET: _yaml({"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}),
        ENERGON_SPLIT: _yaml({"split_parts": split_parts, "exclude": []}),
        ENERGON_INFO: _json({"energon_version": ENERGON_VERSION, "shard_counts": counts}),  # last: it marks the whole
    }


def brace_patterns(names: list[str]) -> list[str]:
    """Return brace patterns that expand to `names` in their order: consecutive numbers become one `{first..last}`.

    Args:
        names: paths whose last part is digits and `.tar`; others stand for themselves.
    """
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return [run[0] if len(run) == 1 else _brace_pattern(run[0], run[-1]) for run in runs]


def _follows(before: str, name: str) -> bool:
    """Whether two paths differ by one in their number, written in as many digits."""
    folder, slash, last = before.rpartition("/")
    numbered = _NUMBERED.fullmatch(last)
    if numbered is None:
        return False
    digits = numbered[1]
    following = f"{int(digits) + 1:0{len(digits)}d}"
    return len(following) == len(digits) and name == f"{folder}{slash}{following}.tar"


def _brace_pattern(first: str, last: str) -> str:
    folder, slash, name = first.rpartition("/")
    return f"{folder}{slash}{{{name.removesuffix('.tar')}..{last.rpartition('/')[2].removesuffix('.tar')}}}.tar"


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _yaml(value: dict[str, Any]) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode()
