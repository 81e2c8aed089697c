"""Reading and writing tars against tarfile and webdataset on the same samples, one thread, in one run.

Input tars hold a PNG-sized member of 3 KB and a JSON member a sample, with a PAX header each as webdataset and
img2dataset write them, or plain. Shards hold one view of 64 codes and its metadata. Every way is timed in turn,
`NUM_ROUNDS` times; the median counts. JSON lines; the last one holds the ratios.
"""

import hashlib
import io
import itertools
import json
import random
import statistics
import struct
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from webdataset import tariterators

from pipeline.local_storage import LocalStorage, sha256_of_file
from pipeline.shards import ShardSample, ShardWriter, check_written, open_shard
from pipeline.tars import read_members
from pipeline.ustar import end_of_tar, member_bytes

NUM_SAMPLES = 10_000
NUM_ROUNDS = 5
CODEBOOK_SIZE = 512
METADATA = {
    "caption": "a picture of a thing that is described in a few words",
    "label": 3,
    "width": 64,
    "height": 64,
    "source": "s0001",
    "views": [{"box": [0.0, 0.0, 64.0, 64.0], "flip": False}],
    "extra": {"group": "objects", "style": "flat"},
}


def write_inputs(source: Path, plain: Path) -> None:
    """Write the same members as img2dataset does, each behind a PAX header for its time, and as plain USTAR."""
    draw = random.Random(0)
    with webdataset.TarWriter(str(source)) as writer:
        for number in range(NUM_SAMPLES):
            writer.write({"__key__": f"{number:09d}", "png": draw.randbytes(3000), "json": METADATA})
    with source.open("rb") as file, plain.open("wb") as copy:
        for member in read_members(file, where=str(source)):
            copy.write(member_bytes(member.name, member.data))
        copy.write(end_of_tar(copy.tell()))


def make_samples() -> list[ShardSample]:
    """Samples as the encoder hands them over."""
    codes_NVT = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (NUM_SAMPLES, 1, 64), dtype=np.int32)
    return [
        ShardSample(key=f"{number:09d}", codes_VT=codes_VT, metadata=METADATA)
        for number, codes_VT in enumerate(codes_NVT)
    ]


def write_with_tarfile(path: Path, samples: list[ShardSample]) -> None:
    """How shards were written and checked before: TarInfo, np.lib.format, json.dumps; then read back twice."""

    def add(name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    offsets = []
    with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            assert 0 <= sample.codes_VT.min() <= sample.codes_VT.max() < CODEBOOK_SIZE
            offsets.append(tar.offset)
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, sample.codes_VT.astype(np.uint16), version=(1, 0), allow_pickle=False)
            add(f"{sample.key}.codes.npy", buffer.getvalue())
            text = json.dumps(
                sample.metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
            )
            add(f"{sample.key}.json", text.encode())
        offsets.append(tar.offset)
    path.with_name(path.name + ".idx").write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
    assert read_shard_with_tarfile(path) == NUM_SAMPLES
    sha256_of_file(path)


def write_with_shard_writer(path: Path, samples: list[ShardSample]) -> None:
    """How shards are written and checked now."""
    with ShardWriter(path, codebook_size=CODEBOOK_SIZE) as writer:
        for sample in samples:
            writer.add(sample)
        written = writer.close()
    path.with_name(path.name + ".idx").write_bytes(written.index)
    check_written(path, written)


def write_only(path: Path, samples: list[ShardSample]) -> None:
    """`ShardWriter` alone, the sha256 included."""
    with ShardWriter(path, codebook_size=CODEBOOK_SIZE) as writer:
        for sample in samples:
            writer.add(sample)
        writer.close()


def read_with_members(path: Path) -> int:
    """Samples of an input tar, by `read_members`."""
    with path.open("rb") as file:
        return sum(1 for _ in read_members(file, where=str(path))) // 2


def read_with_tarfile(path: Path) -> int:
    """Samples of an input tar, by tarfile."""
    num_members = 0
    with tarfile.open(path, mode="r:") as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            if content is not None:
                content.read()
                num_members += 1
    return num_members // 2


def read_with_webdataset(path: Path) -> int:
    """Samples of an input tar, by webdataset's iterator, which reads tarfile's stream mode."""
    return sum(1 for _ in tariterators.tarfile_samples([{"url": str(path)}]))


def read_shard_with_tarfile(path: Path) -> int:
    """Samples of a shard with codes and JSON parsed, as `ShardReader` did it before."""
    data = path.read_bytes()
    offsets = np.frombuffer(path.with_name(path.name + ".idx").read_bytes(), dtype="<u8").astype(np.int64)
    for start, end in itertools.pairwise(offsets):
        position, members = int(start), {}
        while position < end:
            member = tarfile.TarInfo.frombuf(data[position : position + 512], "utf-8", "strict")
            members[member.name.partition(".")[2]] = data[position + 512 : position + 512 + member.size]
            position += 512 + -(-member.size // 512) * 512
        np.lib.format.read_array(io.BytesIO(members["codes.npy"]), allow_pickle=False)
        json.loads(members["json"])
    return len(offsets) - 1


def read_shard_with_reader(path: Path) -> int:
    """Samples of a shard with codes and JSON parsed, by `ShardReader`."""
    reader = open_shard(LocalStorage(path.parent), path.name)
    for position in range(reader.num_samples):
        reader.sample(position)
    return reader.num_samples


def check_shard_structure(path: Path) -> int:
    """What `verify` does for structure."""
    assert open_shard(LocalStorage(path.parent), path.name).check_structure() == []
    return NUM_SAMPLES


def median_us(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Time every way in turn and return the median microseconds a sample of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(NUM_ROUNDS):
        for name, way in ways.items():
            begin_s = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin_s)
    return {name: statistics.median(values) / NUM_SAMPLES * 1e6 for name, values in seconds.items()}


def main() -> None:
    """Print microseconds and samples/s of each way, then the ratios."""
    samples = make_samples()
    with tempfile.TemporaryDirectory() as folder:
        source, plain, shard, old_shard = (Path(folder) / name for name in ("in.tar", "plain.tar", "0.tar", "old.tar"))
        write_inputs(source, plain)
        times_us = median_us(
            {
                "read input: read_members": lambda: read_with_members(source),
                "read input: tarfile": lambda: read_with_tarfile(source),
                "read input: webdataset": lambda: read_with_webdataset(source),
                "read plain input: read_members": lambda: read_with_members(plain),
                "read plain input: tarfile": lambda: read_with_tarfile(plain),
                "read plain input: webdataset": lambda: read_with_webdataset(plain),
                "write shard: ShardWriter": lambda: write_only(shard, samples),
                "write and check shard: ShardWriter": lambda: write_with_shard_writer(shard, samples),
                "write and check shard: tarfile": lambda: write_with_tarfile(old_shard, samples),
                "read shard: ShardReader.sample": lambda: read_shard_with_reader(shard),
                "read shard: tarfile": lambda: read_shard_with_tarfile(shard),
                "check structure: ShardReader": lambda: check_shard_structure(shard),
            }
        )
        same = hashlib.sha256(shard.read_bytes()).digest() == hashlib.sha256(old_shard.read_bytes()).digest()
    for name, time_us in times_us.items():
        print(json.dumps({"way": name, "us_per_sample": round(time_us, 2), "samples_per_s": round(1e6 / time_us)}))
    ratios = {
        "ratio_read_tarfile": times_us["read input: tarfile"] / times_us["read input: read_members"],
        "ratio_read_webdataset": times_us["read input: webdataset"] / times_us["read input: read_members"],
        "ratio_read_plain_tarfile": times_us["read plain input: tarfile"] / times_us["read plain input: read_members"],
        "ratio_write": times_us["write and check shard: tarfile"] / times_us["write and check shard: ShardWriter"],
        "ratio_read_shard": times_us["read shard: tarfile"] / times_us["read shard: ShardReader.sample"],
    }
    print(json.dumps({name: round(ratio, 2) for name, ratio in ratios.items()} | {"same_bytes": same}))


if __name__ == "__main__":
    main()
