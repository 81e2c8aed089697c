"""What a rerun costs before any work: plan and resume scan of a finished set of 100,000 units, seconds and memory.

The tars and shards are sparse files of real sizes, the ledger records real ones. The first scan reads every record, the
second the gathered ones. JSON lines; memory is the whole process's, imports included.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.config import S3Config, TokenizeConfig
from pipeline.gathered import Ledger
from pipeline.ledger import LedgerRecord, index_name, record_name, shard_name
from pipeline.local_storage import LocalStorage
from pipeline.rejects import Counts
from pipeline.resume import find_finished
from pipeline.retry import RetrySource
from pipeline.shards import ShardInfo
from pipeline.sources.plan import Plan, Source
from pipeline.sources.registry import make_source
from pipeline.storage import json_bytes

TAR_BYTES, SHARD_BYTES, SAMPLES_PER_UNIT = 25_000_000, 25_602_048, 10_000
DIGEST = "0" * 16


def config_of(root: Path) -> TokenizeConfig:
    """The job over the tars of the synthetic corpus."""
    source = {"kind": "webdataset", "urls": [f"{root}/tars/*.tar"]}
    spec = {"kind": "tokenize", "run_dir": f"{root}/set", "source": source, "tokenizer": {"weights": "none"}}
    return TokenizeConfig.model_validate(spec)


def source_of(root: Path) -> Source:
    """The tars of the synthetic corpus."""
    return make_source(config_of(root).source, s3=S3Config())


def write_sparse(path: Path, num_bytes: int) -> None:
    """A file of a size that takes no room."""
    with path.open("wb") as file:
        file.truncate(num_bytes)


def write_corpus(root: Path, *, num_units: int) -> None:
    """Sparse tars, and the finished set over them."""
    (root / "tars").mkdir()
    for unit_index in range(num_units):
        write_sparse(root / "tars" / f"{unit_index:05d}.tar", TAR_BYTES)
    for folder in ("shards", "ledger"):
        (root / "set" / folder).mkdir(parents=True)
    plan = source_of(root).plan()
    for unit in plan.units:
        stem = plan.keys.stem(unit.unit_index)
        write_sparse(root / "set" / shard_name(stem), SHARD_BYTES)
        write_sparse(root / "set" / index_name(stem), 8 * (SAMPLES_PER_UNIT + 1))
        record = record_of(unit.unit_index, plan=plan, root=root)
        (root / "set" / record_name(stem)).write_bytes(json_bytes(record.model_dump(mode="json")))


def record_of(unit_index: int, *, plan: Plan, root: Path) -> LedgerRecord:
    """A record as a worker writes it."""
    unit, stem = plan.units[unit_index], plan.keys.stem(unit_index)
    return LedgerRecord(
        unit_index=unit_index,
        unit=unit.name,
        unit_fingerprint=unit.fingerprint,
        input_mark=unit.mark,
        input_sha256=f"{unit_index:064x}",
        fingerprint_digest=DIGEST,
        counts=Counts(
            num_read=SAMPLES_PER_UNIT,
            num_written=SAMPLES_PER_UNIT,
            num_dropped=0,
            num_rejected=0,
            dropped_by_reason={},
            rejected_by_reason={},
        ),
        shard=ShardInfo(
            name=f"{stem}.tar", num_samples=SAMPLES_PER_UNIT, bytes=SHARD_BYTES, sha256=f"{unit_index:064x}"
        ),
        shard_mark=str((root / "set" / shard_name(stem)).stat().st_mtime_ns),
        seconds_of_stage={"commit": 0.211, "crop": 12.345, "encode": 98.765, "read": 3.456},
    )


def scan(root: Path) -> dict[str, Any]:
    """Plan and scan as a rerun does, in this process."""
    start_s = time.perf_counter()
    source = source_of(root)
    plan = source.plan()
    planned_s = time.perf_counter()
    storage = LocalStorage(root / "set")
    ledger = Ledger(storage)
    found = find_finished(
        storage,
        config=config_of(root),
        plan=plan,
        source=RetrySource(source),
        fingerprint_digest=DIGEST,
        ledger=ledger,
    )
    assert found.tally.num_units == len(plan.units)
    scanned_s = time.perf_counter()
    ledger.gather()
    return {
        "units": len(plan.units),
        "plan_s": round(planned_s - start_s, 2),
        "scan_s": round(scanned_s - planned_s, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main() -> None:
    """Write the corpus, then scan it in processes of their own; `--scan ROOT` is one of those."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-units", type=int, default=100_000)
    parser.add_argument("--scan", type=Path)
    arguments = parser.parse_args()
    if arguments.scan is not None:
        print(json.dumps(scan(arguments.scan)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), num_units=arguments.num_units)
        for what in ("records read one by one", "gathered records", "gathered records"):
            line = subprocess.run([sys.executable, __file__, "--scan", folder], capture_output=True, check=True).stdout
            print(json.dumps({"what": what} | json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
