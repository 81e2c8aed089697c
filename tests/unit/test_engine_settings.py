"""What DeepSpeed is told: the batch that adds up, the schedule as a function of the step, decay on matrices only."""

from typing import Any

import pytest
from torch import nn

from training.config import EngineConfig, OptimizerConfig
from training.engine import check_settings, deepspeed_settings, learning_rate_of_step, parameter_groups


def rates(config: OptimizerConfig, num_steps: int) -> list[float]:
    return [learning_rate_of_step(config, step, num_steps=num_steps) for step in range(1, num_steps + 1)]


def test_constant_rate_is_llamagens() -> None:
    assert rates(OptimizerConfig(learning_rate=1e-4), 3) == [1e-4, 1e-4, 1e-4]


def test_warmup_rises_linearly_and_reaches_the_peak_at_its_last_step() -> None:
    config = OptimizerConfig(learning_rate=8.0, warmup_steps=4)
    assert rates(config, 6) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_cosine_falls_to_its_floor_at_the_last_step() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=2, final_learning_rate_fraction=0.1)
    # 2 * (0.1 + 0.9 * (1 + cos(pi * p)) / 2) at p = 0, 1/4 .. 1
    assert rates(config, 6) == pytest.approx([1.0, 2.0, 1.7363961, 1.1, 0.4636039, 0.2])


@pytest.mark.parametrize(("micro", "world_size", "expected"), [(None, 2, (24, 1)), (6, 2, (6, 4)), (48, 1, (48, 1))])
def test_accumulation_is_derived(micro: int | None, world_size: int, expected: tuple[int, int]) -> None:
    config = EngineConfig(global_batch_size=48, micro_batch_size=micro)
    settings = deepspeed_settings(config, max_grad_norm=1.0, world_size=world_size)
    micro_batch_size, accumulation = expected
    assert settings["train_micro_batch_size_per_gpu"] == micro_batch_size
    assert settings["gradient_accumulation_steps"] == accumulation
    assert settings["train_batch_size"] == micro_batch_size * accumulation * world_size


def test_batch_that_does_not_divide_names_the_nearest_right_ones() -> None:
    with pytest.raises(ValueError, match=r"10 \* 2 = 20, got 48; use 40 or 60"):
        deepspeed_settings(EngineConfig(global_batch_size=48, micro_batch_size=10), max_grad_norm=1.0, world_size=2)


def test_only_tensors_of_two_dimensions_or_more_decay() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Embedding(4, 3), nn.LayerNorm(3)])
    decayed, others = parameter_groups(model, weight_decay=0.05)
    assert decayed["weight_decay"] == 0.05
    assert others["weight_decay"] == 0.0
    assert sorted(tuple(p.shape) for p in decayed["params"]) == [(2, 3), (4, 3)]
    assert sorted(tuple(p.shape) for p in others["params"]) == [(2,), (3,), (3,)]


def test_base_model_and_modules_have_groups_of_their_own_where_asked() -> None:
    model = nn.ModuleDict({"base": nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(5)), "input_encoder": nn.Linear(7, 4)})
    groups = parameter_groups(model, weight_decay=0.05, has_base_groups=True)
    found = [(group["is_base"], group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    assert found == [
        (True, 0.05, [(2, 3)]),
        (True, 0.0, [(2,), (5,), (5,)]),
        (False, 0.05, [(4, 7)]),
        (False, 0.0, [(4,)]),
    ]


def settings_of(**fields: Any) -> dict[str, Any]:
    return deepspeed_settings(EngineConfig(**fields), max_grad_norm=1.0, world_size=2)


@pytest.mark.parametrize("offload_optimizer", [False, True])
def test_our_settings_are_keys_that_deepspeed_reads(offload_optimizer: bool) -> None:
    settings = settings_of(offload_optimizer=offload_optimizer)
    check_settings(settings)
    assert ("offload_optimizer" in settings["zero_optimization"]) is offload_optimizer


@pytest.mark.parametrize(
    ("typo", "message"),
    [
        ({"gradient_cliping": 1.0}, "got 'gradient_cliping'; did you mean gradient_clipping"),
        ({"zero_optimisation": {}}, "got 'zero_optimisation'; did you mean zero_optimization"),
        ({"zero_optimization": {"stagee": 2}}, r"every key of zero_optimization .* got \['stagee'\]"),
        ({"bf16": {"enable": True}}, r"every key of bf16 .* got \['enable'\]"),
        ({"train_batch_size": {"a": 1}}, "got 'train_batch_size'"),
    ],
)
def test_a_mistyped_key_is_an_error(typo: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(settings_of() | typo)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer needs zero_stage 1, 2 or 3, got 0"),
        ({"compile_mode": "default", "zero_stage": 3}, "compile_mode must be none at zero_stage 3"),
    ],
)
def test_what_a_zero_stage_cannot_do_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields)
