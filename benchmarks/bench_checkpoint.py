"""What a checkpoint costs: the stall of a save against a copy of its bytes in memory, writing, hashing, resuming.

One rank on one thread, ZeRO 2, bfloat16, with an average of the weights: 16 bytes of state a parameter. JSON lines;
each ratio names its baseline, measured in the same process. Its memory is made beside the steps before the first save:
here, in the seconds before it.
"""

import argparse
import hashlib
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenization.config import VQConfig
from tokenization.fingerprint import Fingerprint
from training.checkpoint import RunState
from training.config import TrainConfig
from training.engine import build_engine
from training.fragments import Engine, Fragments
from training.loss import window_loss
from training.ranks import Ranks, join_ranks, leave_ranks
from training.resume import find_checkpoint, resume_engine
from training.saver import CheckpointWriter
from training.scored import score_predictions
from training.tensorar import build_model

FINGERPRINT = Fingerprint(weights_sha256="0" * 64, network=VQConfig(), image_size_px=64, batch_size=8, dtype="float32")
NUM_REPEATS = 5
STEPS_S = 5.0
"""Seconds from the first step to the first save; a run has a hundred steps there."""


def spec_of(run_dir: Path, *, num_layers: int, background: bool) -> TrainConfig:
    """A model of width 512."""
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "run_dir": str(run_dir),
            "data": {"shards": "unused"},
            "model": {"num_layers": num_layers, "num_heads": 8, "model_dim": 512, "codes_per_side": 4},
            "optimizer": {"ema_decay": 0.999},
            "engine": {"zero_stage": 2, "dtype": "bfloat16", "global_batch_size": 1},
            "checkpoint": {"background": background, "keep_latest": 1},
            "num_steps": 99,
            "cluster": {"launcher": "torchrun"},
        }
    )


def engine_of(config: TrainConfig, ranks: Ranks) -> Engine:
    """A fresh engine."""
    return build_engine(build_model(config.model), config=config, ranks=ranks)


def take_step(engine: Engine, config: TrainConfig) -> None:
    """One step, after which the optimiser has its state."""
    codes_BT = torch.zeros(1, config.model.num_positions, dtype=torch.long)
    scored = score_predictions(codes_BT, window_size=1)
    engine.backward(window_loss(engine, codes_BT[..., None], torch.zeros(1, dtype=torch.long), scored=scored).loss)
    engine.step()


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure_saves(config: TrainConfig, engine: Engine, ranks: Ranks, *, num_bytes: int) -> dict[str, float]:
    """Medians over warm saves, each beside a copy of as many bytes just before it, and the first one's stall.

    The system writes the file of one save to the disk during the next; a copy in the same state is slowed by it too.
    """
    writer = CheckpointWriter(config, ranks=ranks, fingerprint=FINGERPRINT)
    writer.prepare(engine)
    source, target = torch.ones(num_bytes // 4), torch.ones(num_bytes // 4)
    time.sleep(STEPS_S)
    copies, stalls, writes = [], [], []
    for step in range(1, NUM_REPEATS + 2):
        copies.append(seconds_of(lambda: target.copy_(source)))
        began = time.perf_counter()
        stalls.append(writer.save(engine, RunState(step=step, samples_consumed=step)))
        writer._join()
        writes.append(time.perf_counter() - began)
    return {
        "first_stall_s": stalls[0],
        "first_stall_over_copy": stalls[0] / copies[0],
        "copy_s": statistics.median(copies[1:]),
        "stall_s": statistics.median(stalls[1:]),
        "stall_over_copy": statistics.median(stall / copy for stall, copy in zip(stalls[1:], copies[1:], strict=True)),
        "until_committed_s": statistics.median(writes[1:]),
    }


def hash_s_of(num_bytes: int) -> float:
    """Seconds of sha256 over that many bytes of memory."""
    data = memoryview(torch.ones(num_bytes // 4).numpy()).cast("B")
    return seconds_of(lambda: hashlib.sha256(data).digest())


def measure_resume(config: TrainConfig, ranks: Ranks) -> dict[str, float]:
    """Seconds to verify and to read the newest checkpoint into a fresh engine."""
    engine = engine_of(config, ranks)
    began = time.perf_counter()
    record = find_checkpoint(config, ranks=ranks, fingerprint=FINGERPRINT)
    assert record is not None
    verified = time.perf_counter()
    resume_engine(engine, config=config, record=record)
    return {"verify_s": verified - began, "read_s": time.perf_counter() - verified}


def main() -> None:
    """Measure both ways of saving, then resuming."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-layers", type=int, default=20, help="3.2 M parameters each, beside 17 M of tables")
    parser.add_argument("--threads", type=int, default=1, help="of the rank; 1 is what it has with a rank a core")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = join_ranks()
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            background: spec_of(Path(folder) / "run", num_layers=arguments.num_layers, background=background)
            for background in (True, False)
        }
        engine = engine_of(configs[True], ranks)
        take_step(engine, configs[True])
        layout = Fragments(engine).layout
        num_bytes = 4 * len(layout.kinds) * layout.num_elements
        hash_s = hash_s_of(num_bytes)
        size = {"parameters_m": round(layout.num_elements / 1e6, 1), "bytes_mb": round(num_bytes / 1e6)}
        for background, config in configs.items():
            found = measure_saves(config, engine, ranks, num_bytes=num_bytes)
            ratios = {
                "hash_share": hash_s / found["until_committed_s"],
            }
            baselines = {"hash_s": hash_s}
            tell("save", background=background, **size, **baselines, **found, **ratios)
        tell("resume", **size, **measure_resume(configs[True], ranks))
    leave_ranks(ranks)


def tell(what: str, **values: Any) -> None:
    """Print one line."""
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps({"what": what} | rounded), flush=True)


if __name__ == "__main__":
    main()
