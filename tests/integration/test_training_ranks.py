"""Two gloo ranks under torchrun: what a run leaves behind, resuming, accumulation, every ZeRO stage, SIGTERM."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from synthetic_shards import damage_samples, train_config, write_shard_set
from training_processes import ranks_of, run, run_script, start, weights_of

from pipeline.storage import open_storage
from training.checkpoint import list_checkpoints, read_record, verify_checkpoint
from training.config import TrainConfig
from training.metrics import read_metrics

PURE_FIELDS = ("step", "split", "loss", "loss_of_offset", "accuracy_of_offset", "grad_norm", "own_draft_loss_0")


def checkpoints_of(run_dir: Path) -> list[int]:
    return list_checkpoints(open_storage(str(run_dir)))


def measured(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in PURE_FIELDS if name in line} for line in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_shard_set(root / "held_out", samples_per_shard=(20,), first_sample=1000)
    return write_shard_set(root / "train")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, ZeRO-2, bfloat16, validated every 6 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    code, output = run(config_of(run_dir, shards))
    assert code == 0, output
    return run_dir


def config_of(run_dir: Path, shards: Path, **changes: Any) -> TrainConfig:
    validation = {"shards": str(shards.parent / "held_out"), "every_n_steps": 6, "num_samples": 19}
    settings = {"validation": validation, "cluster__launcher": "torchrun"} | changes
    return train_config(run_dir, shards=shards, **settings)


def test_run_leaves_whole_checkpoints_and_one_line_per_step(finished: Path) -> None:
    storage = open_storage(str(finished))
    assert checkpoints_of(finished) == [8, 12]
    assert [verify_checkpoint(storage, step) for step in (8, 12)] == [[], []]
    record = read_record(storage, 12)
    assert (record.step, record.samples_consumed, record.world_size, record.zero_stage) == (12, 192, 2, 2)
    lines = read_metrics(finished)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in lines if line["split"] == "validation"] == [6, 12]
    assert lines[0]["loss"] == pytest.approx(2.7725887)  # ln 16: the head begins at zero
    assert lines[-1]["loss"] < 2.6
    assert len(lines[-1]["loss_of_offset"]) == len(lines[-1]["accuracy_of_offset"]) == 4
    assert (finished / "logs" / "rank_00001.log").exists()
    assert list((finished / "tensorboard").glob("events.*"))


def test_a_line_says_how_fast_the_steps_were_and_what_they_took(finished: Path) -> None:
    lines = [line for line in read_metrics(finished) if line["split"] == "train"]
    for line in lines:
        assert line["samples_per_s"] == pytest.approx(16 / line["step_s"])
        assert line["tokens_per_s"] == pytest.approx(16 * line["samples_per_s"])
        assert 0.0 < line["mfu"] < 1.0
        assert line["data_wait_share"] == pytest.approx(line["data_wait_s"] / line["step_s"])
        assert 2e8 < line["peak_memory_bytes"] < 8e9
        assert line["num_skipped_steps"] == 0
        assert 0.0 < line["grad_norm"] < 100.0
    stalls = [line["step"] for line in lines if line["save_stall_s"] > 0.0]
    assert stalls == [5, 9]  # saved after 4 and 8


def test_samples_that_were_replaced_are_counted_over_all_ranks_and_resumptions(tmp_path: Path) -> None:
    """An epoch of 16 samples, two of them damaged, is two steps: each line but the first speaks of one epoch more."""
    shards = write_shard_set(tmp_path / "set", samples_per_shard=(16,))
    damage_samples(shards, "000000003", "000000005")
    settings: dict[str, Any] = {"num_steps": 6, "log_every_n_steps": 2, "engine__global_batch_size": 8}
    settings |= {"data__on_damage": "replace", "cluster__launcher": "torchrun", "checkpoint__every_n_steps": 3}
    config = train_config(tmp_path / "run", shards=shards, **settings)
    for is_resumed in (False, True):
        if is_resumed:  # after step 3, between two lines
            shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
        code, output = run(config)
        assert code == 0, output
        counts = {line["step"]: line["num_replaced_samples"] for line in read_metrics(tmp_path / "run")}
        assert counts.pop(1) <= 2
        assert counts == {2: 2, 4: 4, 6: 6}


def test_weights_are_whole_and_finer_than_bfloat16(finished: Path) -> None:
    weights = weights_of(finished)
    assert weights["base.layers.0.attention.wqkv.weight"].shape == (96, 32)
    changed = [name for name, weight in weights.items() if not torch.equal(weight, weight.bfloat16().float())]
    assert len(changed) > 20


def test_finished_run_started_again_does_nothing(finished: Path, shards: Path) -> None:
    def times() -> dict[Path, int]:
        files = [path for path in finished.rglob("*") if path.is_file() and path.suffix != ".log"]
        return {path: path.stat().st_mtime_ns for path in files if path.name != ".lock"}

    before = times()
    code, output = run(config_of(finished, shards))
    assert code == 0, output
    assert times() == before


def test_a_resume_wants_the_set_that_was_trained_on_wherever_it_lies(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    grown = write_shard_set(tmp_path / "grown", samples_per_shard=(40, 24, 33, 16))
    code, output = run(config_of(run_dir, shards, data__shards=str(grown), num_steps=13))
    assert code != 0
    assert f"{grown} must hold the samples that it was trained on, 97 in 3 shards" in output
    assert "got 113 in 4 shards" in output
    moved = shutil.copytree(shards, tmp_path / "moved")
    code, output = run(config_of(run_dir, shards, data__shards=str(moved), num_steps=13))
    assert code == 0, output
    assert checkpoints_of(run_dir)[-1] == 13


@pytest.mark.slow
def test_damaged_newest_checkpoint_falls_back_and_ends_in_the_same_losses(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "damaged"
    code, output = run(config_of(run_dir, shards, num_steps=8, optimizer__schedule="constant"))
    assert code == 0, output
    newest = run_dir / "checkpoints" / "step_00000008" / "rank_00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1000] ^= 4
    newest.write_bytes(bytes(data))
    first_losses = measured(run_dir)
    code, output = run(config_of(run_dir, shards, num_steps=8, optimizer__schedule="constant"))
    assert code == 0, output
    assert f"{newest.parent.name}/{newest.name}: sha256 differs" in output
    assert measured(run_dir) == first_losses
    assert verify_checkpoint(open_storage(str(run_dir)), 8) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [
        (0, "float32"),
        pytest.param(1, "bfloat16", marks=pytest.mark.soak),
        (3, "float32"),
        (3, "bfloat16"),
    ],
)
def test_every_zero_stage_resumes_bit_for_bit(shards: Path, tmp_path: Path, zero_stage: int, dtype: str) -> None:
    changes = {"engine__zero_stage": zero_stage, "engine__dtype": dtype, "optimizer__schedule": "constant"}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(config_of(whole, shards, num_steps=6, **changes))[0] == 0
    for num_steps in (3, 6):
        code, output = run(config_of(halves, shards, num_steps=num_steps, **changes))
        assert code == 0, output
    expected = [line for line in measured(whole) if line["split"] == "train"]
    assert [line for line in measured(halves) if line["split"] == "train"] == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_warms_up_its_modules_moves_the_base_after_them_and_resumes_bit_for_bit(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"warm_start": str(finished), "optimizer__schedule": "constant", "validation": None}
    changes |= {"optimizer__module_warmup_steps": 3, "noise__draft_gradient_scale": 0.5}
    changes |= {"noise__beta_jitter": 0.3, "noise__draft_temperature": 0.8, "noise__own_draft_fraction": 0.5}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(config_of(whole, shards, num_steps=4, **changes))[0] == 0
    weights = []
    for num_steps in (2, 4):
        code, output = run(config_of(halves, shards, num_steps=num_steps, **changes))
        assert code == 0, output
        weights.append(weights_of(halves))
    assert measured(halves) == measured(whole)
    for name, weight in weights_of(finished).items():
        assert torch.equal(weights[0][name], weight.bfloat16().float()) == name.startswith("base."), name
    name = "base.layers.0.attention.wqkv.weight"
    assert not torch.equal(weights[1][name], weights[0][name])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_accumulated_micro_batches_and_one_rank_train_like_two(shards: Path, tmp_path: Path) -> None:
    changes = {"engine__dtype": "float32", "model__dropout": 0.0, "num_steps": 5, "validation": None}
    changes |= {"noise__scored_stride": 3}
    losses = []
    for name, micro_batch_size, num_ranks in (("two", None, 2), ("accumulated", 2, 2), ("one", 4, 1)):
        config = config_of(tmp_path / name, shards, engine__micro_batch_size=micro_batch_size, **changes)
        assert run(config, num_ranks=num_ranks)[0] == 0
        losses.append([line["loss"] for line in read_metrics(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert losses[2] == pytest.approx(losses[0], abs=2e-5)


def start_and_take_steps(config: TrainConfig) -> subprocess.Popen[str]:
    """Start a run and return when it has taken three steps."""
    process = start(config)
    deadline = time.monotonic() + 100
    while len(read_metrics(Path(config.run_dir))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_sigterm_ends_in_a_checkpoint_and_the_rerun_goes_on(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    config = config_of(run_dir, shards, num_steps=2000, checkpoint__every_n_steps=1000, validation=None)
    process = start_and_take_steps(config)
    for rank in ranks_of(process.pid):
        os.kill(rank, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output
    assert "exitcode  : 75" in output
    (step,) = checkpoints_of(run_dir)
    assert step == read_metrics(run_dir)[-1]["step"]
    code, output = run(config.model_copy(update={"num_steps": step + 2}))
    assert code == 0, output
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, step + 3))


@pytest.mark.slow
def test_ranks_of_a_killed_torchrun_save_and_end_so_that_the_rerun_goes_on(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "orphaned"
    config = config_of(run_dir, shards, num_steps=100_000, checkpoint__every_n_steps=50_000, validation=None)
    process = start_and_take_steps(config)
    ranks = [psutil.Process(rank) for rank in ranks_of(process.pid)]
    process.kill()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    (step,) = checkpoints_of(run_dir)
    assert verify_checkpoint(open_storage(str(run_dir)), step) == []
    code, output = run(config.model_copy(update={"num_steps": step + 2}))
    assert code == 0, output
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, step + 3))


def test_model_that_does_not_fit_the_codes_is_refused(shards: Path, tmp_path: Path) -> None:
    code, output = run(config_of(tmp_path / "wrong", shards, model__codebook_size=17), num_ranks=1)
    assert code != 0
    assert "model.codebook_size must be that of the codes = 16, got 17; set model.codebook_size: 16" in output
    assert json.loads((tmp_path / "wrong.json").read_text())["model"]["codebook_size"] == 17


def test_the_loss_is_that_of_the_offsets_by_their_weights(finished: Path) -> None:
    for line in read_metrics(finished):
        first, *others = line["loss_of_offset"]
        assert line["loss"] == pytest.approx((first + 0.5 * sum(others)) / 2.5, rel=1e-6)


def test_validation_measures_the_kept_code_after_own_drafts_too(finished: Path) -> None:
    lines = [line for line in read_metrics(finished) if line["split"] == "validation"]
    assert all(0 < abs(line["own_draft_loss_0"] - line["loss_of_offset"][0]) < 0.5 for line in lines)


def test_a_rank_with_another_spec_ends_every_rank_before_anything_is_trained(shards: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", shards, validation=None)
    (tmp_path / "spec.json").write_text(config.model_dump_json())
    run_script("unlike_rank.py", str(tmp_path / "spec.json"), "optimizer.weight_decay=0.25", str(tmp_path))
    told = {(tmp_path / rank).read_text() for rank in "01"}
    assert len(told) == 1
    assert f"start {config.run_dir}: every rank must have the spec that rank 0 has on " in told.pop()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert f"rank=1 of 2 host={socket.gethostname()}" in (tmp_path / "run/logs/rank_00001.log").read_text()


def test_weights_that_rank_0_cannot_begin_with_end_every_rank_with_its_reason(shards: Path, tmp_path: Path) -> None:
    code, _ = run(config_of(tmp_path / "run", shards, warm_start=str(tmp_path / "nowhere"), validation=None))
    assert code != 0
    for rank in (0, 1):
        log = (tmp_path / "run" / "logs" / f"rank_{rank:05d}.log").read_text()
        assert f"find weights {tmp_path}/nowhere: it must be a weights file" in log


@pytest.fixture(scope="module")
def one_step(finished: Path, shards: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One step from the weights of `finished`, every label dropped: the run, and weights before and after."""
    changes = {"engine__dtype": "float32", "model__label_dropout": 1.0, "num_steps": 1, "warm_start": str(finished)}
    run_dir = finished.parent / "one_step"
    code, output = run(config_of(run_dir, shards, **changes), num_ranks=1)
    assert code == 0, output
    return run_dir, weights_of(finished), weights_of(run_dir)


def test_a_warm_start_begins_with_the_weights_it_names(one_step: tuple[Path, Any, Any]) -> None:
    assert read_metrics(one_step[0])[0]["loss"] < 2.7  # a fresh model's is ln 16 = 2.77


def test_the_first_step_moves_weights_by_its_warmed_up_learning_rate(one_step: tuple[Path, Any, Any]) -> None:
    _, before, after = one_step
    name = "base.layers.0.attention.wqkv.weight"
    # The first step of Adam is the learning rate, whatever the gradient: 3e-3 after 3 steps of warm-up, so 1e-3.
    moved = (after[name] - before[name] * (1 - 1e-3 * 0.05)).abs()
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-2)


def test_dropped_labels_train_the_null_label_alone(one_step: tuple[Path, Any, Any]) -> None:
    _, before, after = one_step
    name = "base.cls_embedding.embedding_table.weight"
    moved = (after[name] - before[name] * (1 - 1e-3 * 0.05)).abs().amax(dim=1)
    assert moved[:-1].max().item() < 1e-7
    assert moved[-1].item() > 5e-4
