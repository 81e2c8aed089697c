"""The tokenize job against the bare encoder, one worker against two, and the job against two Ray Data pipelines.

All on the same images, cores and encoder, in turns, as the speed of a machine changes within minutes: 64 px PNGs (real
emoji) in tars, the shipped tokenizer, one thread a worker. Ratios are taken within a turn, the bare encoder before and
after the job; their medians over the turns are what is told. Memory is watched in a turn of its own, as that takes
time. A job's rate is steady: it counts from the moment all workers have loaded the tokenizer; a Ray Data pipeline's
comes from the difference of a long and a short run. `plain` is what one writes first; `tuned` takes all that this
project does for an encoder: its decoder and crop inside the actor, one thread, its allocator settings, as the bare
encoder has them too. `--encoder light` takes random weights that cost next to nothing, so that what the pipelines add
is all that is seen. JSON lines; the last one holds the ratios.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from bench_decode import plain_crop
from PIL import Image

from pipeline.cluster import ray_session
from pipeline.config import ClusterConfig, TokenizeConfig
from pipeline.pool import PoolState, WorkerPool, worker_environment
from pipeline.sources.registry import make_source
from pipeline.worker import Finished
from tokenization.config import TokenizerConfig, VQConfig
from tokenization.crops import make_views
from tokenization.decoding import decode_image
from tokenization.tokenizer import Tokenizer
from tokenization.vq import VQNetwork
from tokenization.weights_file import write_weights

PICTURES = sorted((Path(__file__).parents[1] / "tests" / "data" / "held_out_emoji").glob("*.png"))
BATCH_SIZE = 32
SHIPPED = TokenizerConfig(weights="open-emoji-64", image_size_px=64, batch_size=BATCH_SIZE)
RANDOM = {
    "medium": VQConfig(
        codebook_size=512,
        channels=64,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        z_channels=32,
        stem_patch_px=4,
    ),
    "light": VQConfig(
        codebook_size=512,
        channels=16,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        num_norm_groups=4,
        z_channels=16,
        stem_patch_px=4,
    ),
}
"""Networks by what `--encoder` calls them."""
SAMPLES_PER_TAR = 2000


def write_corpus(directory: Path, *, num_tars: int) -> str:
    """Tars of the 64 pictures over and over, with captions; returns their brace pattern."""
    directory.mkdir()
    data = [path.read_bytes() for path in PICTURES]
    for tar_index in range(num_tars):
        with tarfile.open(directory / f"{tar_index:05d}.tar", "w") as tar:
            for position in range(SAMPLES_PER_TAR):
                metadata = json.dumps({"caption": f"picture {position}", "label": position % 98}).encode()
                for extension, content in (("png", data[position % len(data)]), ("json", metadata)):
                    member = tarfile.TarInfo(f"{tar_index:05d}{position:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{directory}/{{00000..{num_tars - 1:05d}}}.tar"


def prepared_pictures(num_images: int) -> np.ndarray:
    """Pictures of the corpus as the encoder sees them, uint8 (num_images, 64, 64, 3)."""
    images = [decode_image(path.read_bytes(), max_pixels=10**6) for path in PICTURES]
    views = np.concatenate([make_views(image, config=_views(), image_size_px=64).images_VHWC for image in images])
    return views[np.arange(num_images) % len(views)]


def tokenizer_of(name: str, directory: Path) -> TokenizerConfig:
    """The shipped tokenizer, or one of random weights."""
    if name == "shipped":
        return SHIPPED
    path = directory / f"{name}.safetensors"
    write_weights(path, network=RANDOM[name], state=VQNetwork(RANDOM[name]).state_dict(), metadata={})
    return TokenizerConfig(weights=str(path), image_size_px=64, batch_size=BATCH_SIZE)


def _views() -> Any:
    return TokenizeConfig.model_fields["views"].default


def encode_from_memory(tokenizer_config: TokenizerConfig, num_images: int, barrier: Any, results: Any) -> None:
    """Encode images from memory, one thread, beside the other processes; put the rate in `results`."""
    tokenizer = Tokenizer.load(tokenizer_config, num_threads=1)
    images = prepared_pictures(num_images)
    tokenizer.encode(images[: 10 * BATCH_SIZE])
    barrier.wait()
    start_s = time.perf_counter()
    tokenizer.encode(images)
    results.put(num_images / (time.perf_counter() - start_s))


def bare_encoder(tokenizer: TokenizerConfig, num_processes: int, *, num_images: int) -> float:
    """Images/s of the encoder alone, fed from memory, over all processes."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_processes), context.Queue()
    share = num_images // num_processes // BATCH_SIZE * BATCH_SIZE
    processes = [
        context.Process(target=encode_from_memory, args=(tokenizer, share, barrier, results))
        for _ in range(num_processes)
    ]
    with environment(worker_environment(num_threads=1)):
        for process in processes:
            process.start()
    rates = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Processes started in the body get these variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def job_rate(tokenizer: TokenizerConfig, urls: str, run_dir: Path, *, num_workers: int) -> tuple[float, float]:
    """Images/s of the job from the moment that all workers are ready, and the seconds until then."""
    config = TokenizeConfig.model_validate(
        {
            "kind": "tokenize",
            "run_dir": str(run_dir),
            "source": {"kind": "webdataset", "urls": [urls]},
            "tokenizer": tokenizer.model_dump(),
            "cluster": {"num_workers": num_workers},
        }
    )
    plan = make_source(config.source, s3=config.s3).plan()
    digest = Tokenizer.load(config.tokenizer).fingerprint.digest
    pool = WorkerPool(config, keys=plan.keys, fingerprint_digest=digest)
    asked_s, ready_s, num_images = time.perf_counter(), None, 0
    with closing(pool.run(plan.units)) as events:
        for event in events:
            if isinstance(event, PoolState) and ready_s is None and event.num_workers == num_workers:
                ready_s = time.perf_counter()
                num_images -= event.num_read_in_flight
            elif isinstance(event, Finished):
                num_images += event.record.counts.num_written
                end_s = time.perf_counter()
    assert ready_s is not None
    return num_images / (end_s - ready_s), ready_s - asked_s


class EncodePlain:
    """The encoder as one writes it first: images come decoded by Ray, are cropped by Pillow, and encoded."""

    def __init__(self, tokenizer: TokenizerConfig) -> None:
        self._tokenizer = Tokenizer.load(tokenizer)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn a batch of samples into codes; alpha is dropped, not blended."""
        images = [np.asarray(plain_crop(Image.fromarray(image).convert("RGB"), 64)) for image in batch["png"]]
        codes = self._tokenizer.encode(np.stack(images)).astype(np.uint16)
        return {"__key__": batch["__key__"], "json": batch["json"], "codes.npy": list(codes)}


class EncodeTuned:
    """The encoder with this project's decoder and crop in the same actor, and nothing decoded elsewhere."""

    def __init__(self, tokenizer: TokenizerConfig) -> None:
        self._tokenizer = Tokenizer.load(tokenizer, num_threads=1)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn a batch of tar samples into codes."""
        images = [
            make_views(decode_image(data, max_pixels=10**6), config=_views(), image_size_px=64).images_VHWC[0]
            for data in batch["png"]
        ]
        codes = self._tokenizer.encode(np.stack(images)).astype(np.uint16)
        metadata = [json.loads(text) for text in batch["json"]]
        return {"__key__": batch["__key__"], "json": metadata, "codes.npy": list(codes)}


PIPELINES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "plain": (EncodePlain, {}, {}),
    "tuned": (
        EncodeTuned,
        {"decoder": None},
        {"num_cpus": 1, "runtime_env": {"env_vars": worker_environment(num_threads=1)}},
    ),
}
"""Actor, arguments of `read_webdataset` and of `map_batches`, by name."""


def ray_data_seconds(name: str, tokenizer: TokenizerConfig, urls: list[str], output: Path) -> float:
    """Seconds of a pipeline over the tars: read_webdataset -> map_batches(actor) -> write_webdataset."""
    encode, read, options = PIPELINES[name]
    start_s = time.perf_counter()
    (
        ray.data.read_webdataset(urls, **read)
        .map_batches(encode, fn_constructor_args=(tokenizer,), batch_size=BATCH_SIZE, concurrency=2, **options)
        .write_webdataset(str(output))
    )
    return time.perf_counter() - start_s


def ray_data_rate(name: str, tokenizer: TokenizerConfig, paths: list[str], output: Path) -> float:
    """Images/s of a pipeline between a third of the tars and all of them; prints what it is made of."""
    with ray_session(ClusterConfig(num_workers=2)):
        short_s = ray_data_seconds(name, tokenizer, paths[: len(paths) // 3], output / "short")
        long_s = ray_data_seconds(name, tokenizer, paths, output / "long")
    num_images = (len(paths) - len(paths) // 3) * SAMPLES_PER_TAR
    rate = num_images / (long_s - short_s)
    say(
        what=f"ray data, {name}",
        images_per_s=rate,
        with_start_images_per_s=len(paths) * SAMPLES_PER_TAR / long_s,
        short_s=short_s,
        long_s=long_s,
    )
    return rate


@contextmanager
def peak_memory(result: dict[str, float]) -> Iterator[None]:
    """Put into `result` the largest sum of the proportional memory of this process and its children, in MB."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(5.0):  # looking costs time too
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            result["peak_mb"] = max(result.get("peak_mb", 0.0), total / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def say(**fields: Any) -> None:
    """Print one JSON line."""
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}))
    sys.stdout.flush()


def job_rates(tokenizer: TokenizerConfig, urls: str, run_root: Path, *, num_tars: int) -> dict[int, float]:
    """Images/s of the job with one worker on half of the tars, and with two on all."""
    half = urls.replace(f"..{num_tars - 1:05d}", f"..{num_tars // 2 - 1:05d}")
    rates = {}
    with ray_session(ClusterConfig(num_workers=2)):
        for num_workers, part in ((1, half), (2, urls)):
            run_dir = run_root / f"workers{num_workers}"
            rates[num_workers], start_s = job_rate(tokenizer, part, run_dir, num_workers=num_workers)
            say(what="job", workers=num_workers, images_per_s=rates[num_workers], until_workers_ready_s=start_s)
    return rates


def main() -> None:
    """Measure all of it in turns, and print the median of each ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-tars", type=int, default=6, help=f"tars of {SAMPLES_PER_TAR} images")
    parser.add_argument("--num-turns", type=int, default=3)
    parser.add_argument("--encoder", choices=["shipped", *RANDOM], default="shipped")
    parser.add_argument("--without-ray-data", action="store_true")
    arguments = parser.parse_args()
    num_tars = arguments.num_tars
    num_images = num_tars * SAMPLES_PER_TAR
    pipelines = [] if arguments.without_ray_data else list(PIPELINES)
    ratios: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        urls = write_corpus(root / "tars", num_tars=num_tars)
        paths = [str(path) for path in sorted((root / "tars").glob("*.tar"))]
        tokenizer = tokenizer_of(arguments.encoder, root)
        for turn in range(arguments.num_turns):
            bare = {n: bare_encoder(tokenizer, n, num_images=num_images // 2) for n in (1, 2)}
            rates = job_rates(tokenizer, urls, root / f"job{turn}", num_tars=num_tars)
            again = bare_encoder(tokenizer, 2, num_images=num_images // 2)
            say(what="bare encoder", processes=1, images_per_s=bare[1])
            say(what="bare encoder", processes=2, images_per_s=bare[2], after_the_job_images_per_s=again)
            ratios["job_over_bare_encoder"].append(rates[2] / ((bare[2] + again) / 2))
            ratios["two_workers_over_one"].append(rates[2] / rates[1])
            for name in pipelines:
                rate = ray_data_rate(name, tokenizer, paths, root / f"{name}{turn}")
                ratios[f"job_over_{name}_ray_data"].append(rates[2] / rate)
        memory: dict[str, dict[str, float]] = {name: {} for name in ("job", *pipelines)}
        with peak_memory(memory["job"]):
            job_rates(tokenizer, urls, root / "job", num_tars=num_tars)
        for name in pipelines:
            with peak_memory(memory[name]):
                ray_data_rate(name, tokenizer, paths, root / name)
    say(
        encoder=arguments.encoder,
        images=num_images,
        turns=arguments.num_turns,
        **{name: statistics.median(of_turns) for name, of_turns in ratios.items()},
        **{f"least_and_most_{name}": [round(min(r), 3), round(max(r), 3)] for name, r in ratios.items()},
        **{f"{name}_peak_mb": peak["peak_mb"] for name, peak in memory.items()},
    )


if __name__ == "__main__":
    main()
