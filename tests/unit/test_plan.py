"""`tensorar plan`: parameters counted in closed form, memory that falls with ranks and stages, a table for people."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from synthetic_shards import train_config

from jobs.cli import main
from training.config import CheckpointConfig, ModelConfig, TrainConfig
from training.plan import Memory, checkpoint_bytes, estimate_memory, kept_checkpoints, num_parameters
from training.tensorar import build_model

SPECS = Path(__file__).parents[2] / "jobs" / "specs"


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
@pytest.mark.parametrize("window_size", [1, 4])
def test_parameters_are_those_of_the_model_that_is_built(size: Any, window_size: int) -> None:
    config = ModelConfig(size=size, window_size=window_size)
    with torch.device("meta"):
        model = build_model(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_the_base_models_have_llamagens_parameters() -> None:
    assert num_parameters(ModelConfig(size="B")) == 110_888_448
    assert num_parameters(ModelConfig(size="XL")) == 774_699_520


def xl(**changes: Any) -> TrainConfig:
    model = {"size": "XL", "codebook_size": 16384, "codes_per_side": 16, "num_classes": 1000, "window_size": 1}
    fields = {"engine__global_batch_size": 64, "engine__micro_batch_size": 1, "noise": {}, "model": model}
    return train_config(Path("run"), shards=Path("set"), **fields | changes)


def memory(config: TrainConfig, *, world_size: int, zero_stage: int) -> Memory:
    return estimate_memory(config, world_size=world_size, zero_stage=zero_stage, device="cuda")


def test_each_stage_shares_out_what_zero_says() -> None:
    num = 774_699_520
    plain, first, second, third = (memory(xl(), world_size=8, zero_stage=stage) for stage in range(4))
    assert (plain.weights, plain.float32_weights, plain.moments, plain.gradients) == (
        2 * num,
        4 * num,
        8 * num,
        2 * num,
    )
    assert (first.float32_weights, first.moments, first.gradients) == (
        num // 8 * 4,
        num // 8 * 8,
        2 * num,
    )  # accumulated
    assert (second.weights, second.gradients) == (2 * num, num // 8 * 2)
    assert (third.weights, third.gradients) == (num // 8 * 2, num // 8 * 2)
    assert plain.peak > first.peak > second.peak
    assert second.lasting > third.lasting


def test_stage_3_gathers_what_it_shared_out_for_the_time_of_a_step() -> None:
    # DeepSpeed keeps up to 10^9 parameters gathered: below that ZeRO-3 saves memory between steps only.
    second, third = (memory(xl(), world_size=8, zero_stage=stage) for stage in (2, 3))
    assert third.activations - second.activations == 2 * 774_699_520


def test_offloaded_states_leave_the_gpu() -> None:
    offloaded = memory(xl(engine__offload_optimizer=True), world_size=8, zero_stage=2)
    assert (offloaded.float32_weights, offloaded.moments) == (0, 0)


def test_recomputed_blocks_keep_only_their_inputs() -> None:
    kept, recomputed = (
        memory(xl(engine__activation_checkpointing=choice), world_size=8, zero_stage=2) for choice in (False, True)
    )
    # Of a block in bfloat16: 256 states of 1280 of 2 bytes.
    of_inputs = 36 * 256 * 1280 * 2
    assert of_inputs < recomputed.activations < 2 * of_inputs
    assert kept.activations > 10 * recomputed.activations


def test_a_checkpoint_holds_three_or_four_floats_per_parameter() -> None:
    assert checkpoint_bytes(xl()) == 12 * 774_699_520
    assert checkpoint_bytes(xl(optimizer__ema_decay=0.999)) == 16 * 774_699_520


@pytest.mark.parametrize(
    ("fields", "num_steps", "expected"),
    [
        ({"every_n_steps": 10, "keep_latest": 2}, 35, (30, 35)),
        ({"every_n_steps": 10, "keep_latest": 2}, 7, (7,)),
        ({"every_n_steps": 2, "keep_latest": 2, "keep_every_n_steps": 4}, 12, (4, 8, 10, 12)),
        ({"every_n_steps": 10, "keep_latest": 1, "keep_every_n_steps": 20}, 59, (20, 40, 59)),
    ],
)
def test_checkpoints_that_stay_are_the_newest_and_every_nth(
    fields: dict[str, Any], num_steps: int, expected: tuple[int, ...]
) -> None:
    assert kept_checkpoints(CheckpointConfig(**fields), num_steps=num_steps) == expected


def test_the_command_counts_the_checkpoints_that_stay_for_good() -> None:
    # Steps 50,000, 100,000, 150,000 and 200,000, then 246,000, 248,000 and 250,000, of 16 * 789,054,720 bytes each.
    result = CliRunner().invoke(main, ["plan", str(SPECS / "train_llamagen_xl.yaml")])
    assert result.exit_code == 0
    assert "12.62 GB each; 7 are kept at the end (3 newest, every 50,000th step), 88.37 GB" in result.output


def test_the_command_shows_every_stage_and_a_verdict() -> None:
    result = CliRunner().invoke(main, ["plan", str(SPECS / "train_llamagen_b.yaml"), "--ranks", "4"])
    assert result.exit_code == 0
    assert "ZeRO 2 *" in result.output
    assert "256 samples = 4 ranks * 64 * 1 micro steps" in result.output
    assert "each rank needs" in result.output or "fits" in result.output


def test_ranks_that_the_batch_does_not_divide_over_are_a_wrong_command() -> None:
    path = SPECS / "train_llamagen_b.yaml"
    result = CliRunner().invoke(main, ["plan", str(path), "--ranks", "3"])
    rule = "engine.global_batch_size must be a multiple of micro_batch_size * world_size = "
    assert (result.exit_code, result.stderr.startswith(f"{path}: {rule}")) == (2, True), result.output


def test_only_training_can_be_planned() -> None:
    result = CliRunner().invoke(main, ["plan", str(SPECS / "tokenize_folder.yaml")])
    assert result.exit_code == 2
    assert "kind must be train" in result.output
