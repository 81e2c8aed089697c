"""Loader throughput against webdataset's over the same shards, one core each, in one run.

The set is synthetic (64 codes a sample, 8 shards of 2,500). JSON lines; the last one is the ratio.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset as wds

from pipeline.config import LoaderConfig
from pipeline.loader import Loader, ShardSet

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from synthetic_shards import fingerprint_of, write_shard_set

SAMPLES_PER_SHARD = (2500,) * 8
BATCH_SIZE = 50
NUM_EPOCHS = 3


def read_with_loader(run_dir: Path) -> Callable[[], int]:
    """One epoch a call, in shuffled batches; the first epoch reads the files, later ones the loader's memory."""
    loader = Loader(
        ShardSet.open(run_dir),
        config=LoaderConfig(shards=str(run_dir)),
        global_batch_size=BATCH_SIZE,
        rank=0,
        world_size=1,
    )
    positions = iter(range(0, NUM_EPOCHS * sum(SAMPLES_PER_SHARD), BATCH_SIZE))

    def epoch() -> int:
        return sum(len(loader.batch(next(positions)).labels_B) for _ in range(sum(SAMPLES_PER_SHARD) // BATCH_SIZE))

    return epoch


def read_with_webdataset(run_dir: Path) -> Callable[[], int]:
    """One epoch a call, decoded, in shard order."""
    urls = [str(path) for path in sorted((run_dir / "shards").glob("*.tar"))]
    return lambda: sum(1 for _ in wds.WebDataset(urls, shardshuffle=False).decode())


def main() -> None:
    """Print samples/s of both readers, epoch by epoch, and the ratio of the first epochs and of the medians."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = write_shard_set(
            Path(folder) / "codes",
            samples_per_shard=SAMPLES_PER_SHARD,
            fingerprint=fingerprint_of(codebook_size=512, codes_per_side=8),
        )
        readers = {"loader": read_with_loader(run_dir), "webdataset": read_with_webdataset(run_dir)}
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for epoch in range(NUM_EPOCHS):
            for name, read in readers.items():
                begin_s = time.perf_counter()
                num_samples = read()
                rates[name].append(num_samples / (time.perf_counter() - begin_s))
                print(json.dumps({"reader": name, "epoch": epoch, "samples_per_s": round(rates[name][-1])}))
    first = rates["loader"][0] / rates["webdataset"][0]
    median = statistics.median(rates["loader"]) / statistics.median(rates["webdataset"])
    print(json.dumps({"ratio_first_epoch": round(first, 2), "ratio_median": round(median, 2)}))


if __name__ == "__main__":
    main()
