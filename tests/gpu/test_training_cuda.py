"""Whole training runs on a CUDA device: LlamaGen's own steps, resuming bit for bit, native against reference ops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_shards import fingerprint_of, train_config, write_shard_set
from training_processes import TORCHRUN, run_script, weights_of

from training.metrics import read_metrics

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parents[1]
PURE_FIELDS = ("step", "loss", "loss_of_offset", "accuracy_of_offset", "grad_norm")
MODEL = {
    "num_layers": 2,
    "num_heads": 4,
    "model_dim": 256,
    "codebook_size": 1024,
    "codes_per_side": 16,
    "num_classes": 4,
    "window_size": 4,
}
"""Large enough for the kernels of attention and products that real models take."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fingerprint = fingerprint_of(codebook_size=1024, codes_per_side=16)
    return write_shard_set(tmp_path_factory.mktemp("sets") / "train", fingerprint=fingerprint)


def _train(run_dir: Path, shards: Path, **changes: Any) -> list[dict[str, Any]]:
    """What a run measured, step by step, in a process of its own."""
    config = train_config(run_dir, shards=shards, model=MODEL, checkpoint={"every_n_steps": 3}, **changes)
    spec = run_dir.with_suffix(".json")
    spec.write_text(config.model_dump_json())
    command = [*TORCHRUN, "--nproc-per-node=1", str(TESTS / "train_rank.py"), str(spec)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [{name: line[name] for name in PURE_FIELDS} for line in read_metrics(run_dir) if line["split"] == "train"]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_five_steps_are_llamagens(zero_stage: int) -> None:
    run_script("five_steps.py", str(TESTS / "oracles"), str(zero_stage), num_ranks=1)


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "more"),
    [
        (0, "float32", {}),
        (1, "bfloat16", {}),
        (2, "float32", {}),
        (2, "bfloat16", {"optimizer__ema_decay": 0.9}),
        (2, "bfloat16", {"engine__offload_optimizer": True}),
        (3, "bfloat16", {"optimizer__ema_decay": 0.9, "engine__activation_checkpointing": True}),
        (2, "bfloat16", {"engine__compile_mode": "default"}),
    ],
    ids=["zero 0 float32", "zero 1", "zero 2 float32", "zero 2 average", "offload", "zero 3 checkpointed", "compiled"],
)
def test_a_run_resumes_bit_for_bit(
    shards: Path, tmp_path: Path, zero_stage: int, dtype: str, more: dict[str, Any]
) -> None:
    changes = {"engine__zero_stage": zero_stage, "engine__dtype": dtype, "optimizer__schedule": "constant"} | more
    whole = _train(tmp_path / "whole", shards, num_steps=6, **changes)
    for num_steps in (3, 6):
        halves = _train(tmp_path / "halves", shards, num_steps=num_steps, **changes)
    assert len(whole) == 6
    assert halves == whole
    weights = [weights_of(tmp_path / name) for name in ("whole", "halves")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_native_and_reference_ops_train_alike(shards: Path, tmp_path: Path) -> None:
    native, reference = (
        _train(tmp_path / ops, shards, num_steps=6, engine__ops=ops, engine__dtype="float32")
        for ops in ("native", "reference")
    )
    for one, other in zip(native, reference, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-4)
        assert one["loss_of_offset"] == pytest.approx(other["loss_of_offset"], abs=5e-4)


def test_the_measured_peak_holds_nothing_of_a_start() -> None:
    """The first product of a process loads torch's matrix library, which takes as long as thousands of products."""
    code = (
        "import torch; from training.hardware import measured_peak_flops as peak\n"
        "print(*(peak(torch.device('cuda'), dtype=torch.bfloat16) for _ in range(2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = map(float, done.stdout.split())
    assert first == pytest.approx(second, rel=0.3)
