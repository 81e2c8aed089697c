"""Planning at scale: 100,000 tars, 1,000,000 image files, 1,000 Parquet footers; and what one sample costs to read.

Files are empty where only their names and sizes count. Each plan runs in a process of its own, whose peak memory over
that of the imports is what planning takes. JSON lines; `floor_s` is one bare `os.scandir` with a `stat` for each entry.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipeline.config import S3Config, SourceConfig
from pipeline.sources.registry import make_source
from pipeline.sources.sample import InputSample, add_to_digest

NUM_CLASSES = 1000
IMAGE_BYTES = 10_000
NUM_READ = 5_000


def touch(path: Path) -> None:
    """Make an empty file, quickly."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def write_tars(root: Path, number: int) -> dict[str, Any]:
    """Empty files named like tars."""
    for index in range(number):
        touch(root / f"{index:06d}.tar")
    return {"kind": "webdataset", "urls": [f"{root}/{{000000..{number - 1:06d}}}.tar"]}


def write_folder(root: Path, number: int) -> dict[str, Any]:
    """Empty files named like ImageNet's."""
    for label in range(NUM_CLASSES):
        (root / f"n{label:08d}").mkdir()
        for index in range(number // NUM_CLASSES):
            touch(root / f"n{label:08d}" / f"n{label:08d}_{index * 7919 % 50000}.JPEG")
    return {"kind": "image_folder", "root": str(root)}


def write_captions(root: Path, number: int) -> dict[str, Any]:
    """Empty images with empty captions beside them, 10,000 a folder."""
    for index in range(number):
        if index % 10_000 == 0:
            (root / f"{index // 10_000:05d}").mkdir()
        for ending in ("jpg", "txt"):
            touch(root / f"{index // 10_000:05d}" / f"{index:09d}.{ending}")
    return {"kind": "image_folder", "root": str(root), "layout": "captions"}


def write_parquet(root: Path, number: int) -> dict[str, Any]:
    """Files of 10 row groups of 100 rows, with tiny images."""
    table = pa.table({"image": [b"x"] * 1000, "text": ["a caption"] * 1000, "url": ["u"] * 1000})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100)
    for index in range(number):
        (root / f"train-{index:05d}.parquet").write_bytes(buffer.getvalue())
    return {"kind": "parquet", "urls": [f"{root}/*.parquet"], "caption_column": "text", "extra_columns": ["url"]}


def scan_s(root: Path) -> float:
    """Seconds of a bare scan with a stat for each file."""
    begin_s = time.perf_counter()
    waiting = [root]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(Path(entry.path))
                else:
                    entry.stat()
    return time.perf_counter() - begin_s


def peak_mb() -> float:
    """The most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, config: dict[str, Any], num_files: int) -> None:
    """Plan once and print what it took."""
    source = make_source(TypeAdapter(SourceConfig).validate_python(config), s3=S3Config())
    root = Path(config.get("root") or config["urls"][0].rpartition("/")[0])
    floor_s = scan_s(root)
    before_mb, begin_s = peak_mb(), time.perf_counter()
    plan = source.plan()
    line = {
        "plan": name,
        "files": num_files,
        "units": len(plan.units),
        "s": round(time.perf_counter() - begin_s, 2),
        "floor_s": round(floor_s, 2),
        "peak_mb": round(peak_mb() - before_mb),
        "pickled_units_mb": round(sum(len(pickled(unit)) for unit in plan.units) / 1e6, 1),
    }
    print(json.dumps(line))


def pickled(value: Any) -> bytes:
    """What would be sent to a worker."""
    return multiprocessing.reduction.ForkingPickler.dumps(value).tobytes()


def write_samples(root: Path) -> dict[str, dict[str, Any]]:
    """The same samples as a tar, as Parquet and as a folder with captions; sources by name."""
    data = [os.urandom(IMAGE_BYTES) for _ in range(NUM_READ)]
    fields = [json.dumps({"caption": f"a caption {index}", "label": index % 10}).encode() for index in range(NUM_READ)]
    (root / "folder").mkdir(parents=True)
    with tarfile.open(root / "samples.tar", "w") as tar:
        for index in range(NUM_READ):
            for ending, content in (("jpg", data[index]), ("json", fields[index])):
                info = tarfile.TarInfo(f"{index:09d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                (root / "folder" / info.name).write_bytes(content)
    table = {"image": data, "text": [f"a caption {index}" for index in range(NUM_READ)]}
    pq.write_table(pa.table(table), root / "samples.parquet", row_group_size=NUM_READ)
    return {
        "webdataset": {"kind": "webdataset", "urls": [f"{root}/samples.tar"]},
        "parquet": {"kind": "parquet", "urls": [f"{root}/samples.parquet"], "caption_column": "text"},
        "captions": {
            "kind": "image_folder",
            "root": f"{root}/folder",
            "layout": "captions",
            "samples_per_unit": NUM_READ,
        },
    }


def measure_reading(root: Path) -> None:
    """Print microseconds per sample of reading, and of the digest, its sha256 of the image apart."""
    for name, config in write_samples(root / "samples").items():
        source = make_source(TypeAdapter(SourceConfig).validate_python(config), s3=S3Config())
        (unit,) = source.plan().units
        seconds = min(timed(lambda: sum(1 for _ in source.read(unit))) for _ in range(3))  # noqa: B023  (called here)
        print(json.dumps({"read": name, "samples": NUM_READ, "us_per_sample": round(seconds / NUM_READ * 1e6, 1)}))
    extra = {"url": "https://pictures.example/1.jpg", "width": 400, "score": 0.25}
    sample = InputSample(position=1, source="000000001", caption="a caption", label=1, extra=extra)
    digest = hashlib.sha256()
    seconds = min(timed(lambda: [add_to_digest(digest, sample) for _ in range(20_000)]) for _ in range(3))
    print(json.dumps({"digest": "without image bytes", "us_per_sample": round(seconds / 20_000 * 1e6, 2)}))


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def main() -> None:
    """Write the corpora, plan each in a fresh process, read a few samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", help="where the corpora are written; by default a temporary directory")
    parser.add_argument("--num-tars", type=int, default=100_000)
    parser.add_argument("--num-images", type=int, default=1_000_000)
    parser.add_argument("--num-captioned", type=int, default=200_000)
    parser.add_argument("--num-parquet", type=int, default=1_000)
    args = parser.parse_args()
    corpora = {
        "webdataset": (write_tars, args.num_tars),
        "image_folder": (write_folder, args.num_images),
        "captions": (write_captions, args.num_captioned),
        "parquet": (write_parquet, args.num_parquet),
    }
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for name, (write, number) in corpora.items():
            root = Path(folder) / name
            root.mkdir()
            process = context.Process(target=measure, args=(name, write(root, number), number))
            process.start()
            process.join()
        measure_reading(Path(folder))


if __name__ == "__main__":
    main()
