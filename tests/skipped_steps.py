"""One rank of what an engine promises at every ZeRO stage, in both dtypes: `torchrun ... tests/skipped_steps.py`.

A step that is not taken leaves no trace; recomputed activations change nothing; the average follows the weights; a
frozen base model stays bit for bit while the modules move.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from whole_state import full_average, full_weights

from training.config import TrainConfig
from training.engine import Engine, build_engine, freeze_base, take_step
from training.loss import window_loss
from training.ranks import Ranks, join_ranks, leave_ranks
from training.scored import score_predictions
from training.tensorar import build_model

BATCH_SIZE = 8
CASES = [
    (zero_stage, dtype, micro_batch_size, offload)
    for zero_stage in (0, 1, 2, 3)
    for dtype in ("float32", "bfloat16")
    for micro_batch_size, offload in ((None, False), (2, False), (2, True))
    if zero_stage > 0 or not offload
]


def config_of(
    zero_stage: int,
    dtype: str,
    micro_batch_size: int | None,
    offload: bool,
    module_warmup_steps: int = 0,
    **changes: Any,
) -> TrainConfig:
    return TrainConfig(
        kind="train",
        run_dir="unused",
        data={"shards": "unused"},
        num_steps=5,
        warm_start="unused",
        model={
            "num_layers": 2,
            "num_heads": 2,
            "model_dim": 16,
            "codebook_size": 24,
            "codes_per_side": 3,
            "num_classes": 4,
            "window_size": 2,
            "dropout": 0.2,
        },
        optimizer={
            "learning_rate": 1e-2,
            "ema_decay": 0.9,
            "max_grad_norm": 0.05,
            "module_warmup_steps": module_warmup_steps,
        },
        engine={
            "zero_stage": zero_stage,
            "dtype": dtype,
            "global_batch_size": BATCH_SIZE,
            "micro_batch_size": micro_batch_size,
            "offload_optimizer": offload,
            **changes,
        },
    )


class Trainer:
    """An engine of its own and the batches of its steps, which are functions of the step."""

    def __init__(self, config: TrainConfig, ranks: Ranks, *, is_trained: bool = False) -> None:
        torch.manual_seed(0)
        self.ranks = ranks
        model = build_model(config.model)
        for parameter in model.parameters() if is_trained else ():
            torch.nn.init.normal_(parameter, mean=0.1, std=0.3)  # no zero projection keeps gradients back
        self.engine: Engine = build_engine(model, config=config, ranks=ranks)
        self.num_micro_steps = config.engine.grad_accumulation(ranks.world_size)

    def step(self, step: int, *, factors: tuple[float, ...] = (1.0, 1.0), may_update: bool = True) -> float:
        """Norm of the step; each rank's loss of its last micro step is multiplied by its factor."""
        generator = torch.Generator().manual_seed(step)
        codes = torch.randint(24, (BATCH_SIZE, 9), generator=generator)
        labels = torch.randint(4, (BATCH_SIZE,), generator=generator)
        size = BATCH_SIZE // self.ranks.world_size // self.num_micro_steps
        norm = None
        for micro_step in range(self.num_micro_steps):
            assert norm is None
            first = (self.ranks.rank * self.num_micro_steps + micro_step) * size
            own = slice(first, first + size)
            windows = torch.stack([codes[own], codes[own].roll(-1, 1)], dim=-1)
            torch.manual_seed(step * 100 + micro_step)
            scored = score_predictions(codes[own], window_size=2)
            loss = window_loss(self.engine, windows, labels[own], scored=scored).loss
            is_last = micro_step == self.num_micro_steps - 1
            self.engine.backward(loss * (factors[self.ranks.rank] if is_last else 1.0))
            norm = take_step(self.engine, may_update=may_update)
        assert norm is not None
        assert len(set(self.ranks.gather(repr(norm)))) == 1, norm
        return norm

    def state(self) -> list[torch.Tensor]:
        """Copies of all this rank keeps: its part of the weights, and of the moments, averages and step counts."""
        optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        masters = [(parameter, values) for parameter, values in optimizer.state.items()]
        parts = [part for parameter, values in masters for part in (parameter, *values.values())]
        own = [getattr(parameter, "ds_tensor", parameter) for parameter in self.engine.module.parameters()]
        return [part.detach().clone() for part in (*parts, *own)]


def changes(before: list[torch.Tensor], after: list[torch.Tensor]) -> Iterator[int]:
    assert len(before) == len(after)
    return (index for index, pair in enumerate(zip(before, after, strict=True)) if not torch.equal(*pair))


def check_average(case: tuple[Any, ...], ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = build_model(config_of(*case).model)
    trainer = Trainer(config_of(*case), ranks)
    assert not getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer).state, "a step before the first"
    first = full_weights(trainer.engine, is_kept=True)
    for name, weight in model.state_dict().items():
        assert torch.equal(first[name], weight.to(getattr(torch, case[1])).float()), name
    trainer.step(1)
    second, average = (read(trainer.engine, is_kept=True) for read in (full_weights, full_average))
    for name, weight in second.items():
        torch.testing.assert_close(average[name], 0.9 * first[name] + 0.1 * weight, msg=name)
    is_moved = {name: not torch.equal(average[name], first[name]) for name in first}
    assert sum(is_moved.values()) > len(is_moved) / 2
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in second.values())


def check(case: tuple[Any, ...], ranks: Ranks) -> None:
    disturbed, control = Trainer(config_of(*case), ranks), Trainer(config_of(*case), ranks)
    for step in (1, 2):
        assert disturbed.step(step) == control.step(step)
    before = disturbed.state()
    assert len(before) > 8
    for bad in (math.nan, math.inf):
        factors = (*(1.0 for _ in range(ranks.world_size - 1)), bad)  # the last rank's gradients alone
        assert not math.isfinite(disturbed.step(3, factors=factors)), factors
        assert list(changes(before, disturbed.state())) == [], factors
    discarded_norm = disturbed.step(3, may_update=False)
    assert not math.isfinite(disturbed.step(3, factors=factors, may_update=False))
    assert list(changes(before, disturbed.state())) == []
    assert disturbed.step(3) == (norm := control.step(3))
    assert math.isclose(discarded_norm, norm, rel_tol=1e-6), (discarded_norm, norm)
    assert list(changes(before, disturbed.state()))
    assert disturbed.step(4) == control.step(4)
    assert list(changes(control.state(), disturbed.state())) == []


def check_recomputed(zero_stage: int, dtype: str, ranks: Ranks) -> None:
    plain = Trainer(config_of(zero_stage, dtype, 2, False), ranks)
    recomputing = Trainer(config_of(zero_stage, dtype, 2, False, activation_checkpointing=True), ranks)
    blocks = recomputing.engine.module.base.layers
    num_calls: list[int] = []
    blocks[0].feed_forward.register_forward_hook(lambda *_: num_calls.append(1))
    for step in (1, 2):
        assert recomputing.step(step) == plain.step(step)
    assert len(num_calls) == 2 * 2 * plain.num_micro_steps
    assert list(changes(plain.state(), recomputing.state())) == []


def check_frozen_base(case: tuple[Any, ...], ranks: Ranks) -> None:
    trainer = Trainer(config_of(*case, module_warmup_steps=2), ranks, is_trained=True)
    start = full_weights(trainer.engine, is_kept=True)
    freeze_base(trainer.engine, is_frozen=True)
    for step in (1, 2):
        assert math.isfinite(trainer.step(step))
    warm, average = (read(trainer.engine, is_kept=True) for read in (full_weights, full_average))
    base = {name for name in start if name.startswith("base.")}
    assert 10 < len(base) < len(start) - 10
    for name, weight in start.items():
        assert torch.equal(warm[name], weight) == (name in base), name
        assert name not in base or torch.equal(average[name], weight), name
    freeze_base(trainer.engine, is_frozen=False)
    trainer.step(3)
    after, average = (read(trainer.engine, is_kept=True) for read in (full_weights, full_average))
    name = "base.layers.0.attention.wqkv.weight"
    moved = (after[name] - warm[name] * (1 - 1e-2 * 0.05)).abs().max().item()
    assert math.isclose(moved, 1e-2, rel_tol=2e-2), moved  # the first step of a fresh Adam is its learning rate
    torch.testing.assert_close(average[name], 0.9 * start[name] + 0.1 * after[name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    joined = join_ranks()
    for case in CASES:
        try:
            check(case, joined)
            check_average(case, joined)
            check_frozen_base(case, joined)
            if not case[3]:
                check_recomputed(*case[:2], joined)
        except Exception as error:
            raise AssertionError(f"zero_stage, dtype, micro_batch_size, offload = {case}") from error
    leave_ranks(joined)
    os._exit(0)
