"""Loader throughput against webdataset's over the same shards, and over sets of 10 to 100,000 shards, on one core.

Samples are those of a tokenize job with LlamaGen's tokenizer (256 codes, caption, source, box). A large set is one
shard of 1,000 samples under many names. With `--s3`, a set on an S3 server of this machine instead. JSON lines; the
ratios of samples/s are per epoch, both readers in one process and turn by turn.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from pipeline.config import LoaderConfig, S3Config
from pipeline.loader import Loader, open_cache, open_parts
from pipeline.shards import ShardInfo, ShardSample, ShardWriter
from pipeline.storage import open_storage

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from s3_server import running_s3_server
from synthetic_shards import write_manifest_of

CODEBOOK_SIZE, CODES_PER_SIDE = 16384, 16
BATCH_SIZE = 256
NUM_EPOCHS = 3


def write_shard(run_dir: Path, shard: int, *, num_samples: int) -> ShardInfo:
    """Write one shard with its index."""
    (run_dir / "shards").mkdir(parents=True, exist_ok=True)
    path = run_dir / "shards" / f"{shard:06d}.tar"
    draws = np.random.default_rng(shard)
    with ShardWriter(path, codebook_size=CODEBOOK_SIZE) as writer:
        for position in range(num_samples):
            codes_VT = draws.integers(0, CODEBOOK_SIZE, (1, CODES_PER_SIDE**2)).astype(np.uint16)
            metadata = {
                "caption": f"a photograph of a thing that is number {position} of {num_samples} things",
                "label": int(draws.integers(1000)),
                "width": 500,
                "height": 375,
                "source": f"train/n01440764/n01440764_{position}.JPEG",
                "views": [{"box": [62, 0, 437, 375], "flip": False}],
                "extra": {},
            }
            writer.add(ShardSample(key=f"{shard:06d}{position:06d}", codes_VT=codes_VT, metadata=metadata))
        written = writer.close()
    path.with_name(f"{path.name}.idx").write_bytes(written.index)
    return written.info(path.name)


def write_set(run_dir: Path, *, num_shards: int, samples_per_shard: int) -> Path:
    """Write a set whose shards all differ."""
    infos = [write_shard(run_dir, shard, num_samples=samples_per_shard) for shard in range(num_shards)]
    return write_manifest_of(run_dir, infos, num_views=1, codebook_size=CODEBOOK_SIZE, codes_per_side=CODES_PER_SIDE)


def write_large_set(run_dir: Path, *, num_shards: int) -> Path:
    """Write a set of one shard of 1,000 samples under many names."""
    first = write_shard(run_dir, 0, num_samples=1000)
    infos = [first]
    for shard in range(1, num_shards):
        name = f"000000.{shard:06d}.tar"  # what stands before the first dot begins the keys
        for extension in ("", ".idx"):
            (run_dir / "shards" / f"{name}{extension}").symlink_to(f"{first.name}{extension}")
        infos.append(ShardInfo(name=name, num_samples=1000, bytes=first.bytes, sha256=first.sha256))
    return write_manifest_of(run_dir, infos, num_views=1, codebook_size=CODEBOOK_SIZE, codes_per_side=CODES_PER_SIDE)


def open_loader(url: str, **fields: Any) -> Loader:
    """A loader of one rank with the defaults of a spec."""
    config = LoaderConfig(shards=url, **fields)
    parts = open_parts(config, s3=S3Config(), cache=open_cache(config, urls=[url]))
    return Loader(parts, config=config, global_batch_size=BATCH_SIZE, rank=0, world_size=1)


def read_batches(loader: Loader, *, first: int, count: int) -> float:
    """Samples/s over some batches."""
    began = time.perf_counter()
    for index in range(first, first + count):
        loader.batch(index * BATCH_SIZE)
    return count * BATCH_SIZE / (time.perf_counter() - began)


def read_with_webdataset(run_dir: Path) -> float:
    """Samples/s of an epoch, decoded, in shard order."""
    urls = [str(path) for path in sorted((run_dir / "shards").glob("*.tar"))]
    began = time.perf_counter()
    num_samples = sum(1 for _ in wds.WebDataset(urls, shardshuffle=False).decode())
    return num_samples / (time.perf_counter() - began)


def compare(*, num_shards: int = 20, samples_per_shard: int = 2560) -> None:
    """Print samples/s of both readers epoch by epoch, and the ratio of the first epochs and of the later ones."""
    batches_per_epoch = num_shards * samples_per_shard // BATCH_SIZE
    with tempfile.TemporaryDirectory() as folder:
        run_dir = write_set(Path(folder) / "codes", num_shards=num_shards, samples_per_shard=samples_per_shard)
        with open_loader(str(run_dir)) as loader:
            readers: dict[str, Callable[[int], float]] = {
                "loader": lambda epoch: read_batches(loader, first=epoch * batches_per_epoch, count=batches_per_epoch),
                "webdataset": lambda _: read_with_webdataset(run_dir),
            }
            rates: dict[str, list[float]] = {name: [] for name in readers}
            for epoch in range(NUM_EPOCHS):
                for name, read in readers.items():
                    rates[name].append(read(epoch))
                    print(json.dumps({"reader": name, "epoch": epoch, "samples_per_s": round(rates[name][-1])}))
    later = [statistics.mean(rates[name][1:]) for name in ("loader", "webdataset")]
    first = rates["loader"][0] / rates["webdataset"][0]
    print(json.dumps({"ratio_first_epoch": round(first, 1), "ratio_later_epochs": round(later[0] / later[1], 1)}))


def measure_large(num_shards: int) -> None:
    """Print what opening a large set costs and how fast it is read."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = write_large_set(Path(folder) / "codes", num_shards=num_shards)
        before_bytes, began = resident_bytes(), time.perf_counter()
        with open_loader(str(run_dir)) as loader:
            open_s = time.perf_counter() - began
            loader.batch(0)
            first_batch_s = time.perf_counter() - began - open_s
            rate = read_batches(loader, first=1, count=500)
            began = time.perf_counter()
            loader.batch(num_shards * 1000 // 2 + 12345)
            line = {
                "num_shards": num_shards,
                "num_samples": num_shards * 1000,
                "open_s": round(open_s, 3),
                "first_batch_s": round(first_batch_s, 3),
                "resume_batch_s": round(time.perf_counter() - began, 3),
                "resident_mb": round((resident_bytes() - before_bytes) / 1e6),
                "samples_per_s": round(rate),
            }
        print(json.dumps(line))


def resident_bytes() -> int:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_s3(*, num_shards: int = 64, samples_per_shard: int = 2560) -> None:
    """Print samples/s from S3 while shards are downloaded, and again from the cache."""
    with tempfile.TemporaryDirectory() as folder, running_s3_server() as server:
        os.environ.update(server.variables)
        run_dir = write_set(Path(folder) / "codes", num_shards=num_shards, samples_per_shard=samples_per_shard)
        storage = open_storage(f"s3://{server.bucket}/codes")
        for path in run_dir.rglob("*.*"):
            storage.write_bytes(path.relative_to(run_dir).as_posix(), path.read_bytes())
        batches_per_epoch = num_shards * samples_per_shard // BATCH_SIZE
        with open_loader(storage.url, cache_dir=f"{folder}/cache") as loader:
            for epoch, source in enumerate(("s3", "cache")):
                rate = read_batches(loader, first=epoch * batches_per_epoch, count=batches_per_epoch)
                print(json.dumps({"source": source, "samples_per_s": round(rate)}))


def main() -> None:
    """Run the comparison, then each large set in a process of its own, for its memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-shards", type=int, help="only measure a set of so many shards")
    parser.add_argument("--s3", action="store_true", help="only measure reading from S3 (all cores: the server's too)")
    arguments = parser.parse_args()
    if arguments.s3:
        measure_s3()
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if arguments.num_shards:
        measure_large(arguments.num_shards)
        return
    compare()
    for num_shards in (10, 1_000, 100_000):
        subprocess.run([sys.executable, __file__, "--num-shards", str(num_shards)], check=True)


if __name__ == "__main__":
    main()
