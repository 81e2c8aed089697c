"""One step of one rank: what each micro step reads, what it is made of, and when nothing moves."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from synthetic_shards import train_config
from test_order import word_by_hand
from torch import Tensor

from pipeline.loader import Batch
from training.adamw import IS_FROZEN, AdamW
from training.config import TrainConfig
from training.engine import parameter_groups
from training.loss import window_loss
from training.noise import draft_windows, drop_labels, noise_windows
from training.ranks import Ranks
from training.scored import Scored, draw_phases, score_predictions
from training.step import StepOutcome, Stepper
from training.tensorar import build_model
from training.watchdog import Watchdog

BATCH_SIZE, MICRO_STEPS, SEED = 6, 3, 2**40 + 3
RANK = 5
"""Of a run of one rank, so that what depends on the rank can be told."""


class Read(NamedTuple):
    """What a forward pass was given."""

    windows_BTK: Tensor
    labels_B: Tensor
    scored: Scored
    seed: int


class PlainEngine:
    """What a step needs of an engine, on one rank without ZeRO: torch's own work, every forward noted."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(0)
        self.module = build_model(config.model)
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.module.train()
        groups = parameter_groups(self.module, weight_decay=0.0, has_base_groups=True)
        self.optimizer = AdamW(groups, lr=0.0, betas=(0.9, 0.95))
        self.num_micro_steps = 0
        self.read: list[Read] = []

    def __call__(self, windows_BTK: Tensor, labels_B: Tensor, *, scored: Scored, readout: Any) -> Any:
        self.read.append(Read(windows_BTK, labels_B, scored, torch.initial_seed()))
        return self.module(windows_BTK, labels_B, scored=scored, readout=readout)

    def backward(self, loss: Tensor) -> None:
        (loss / MICRO_STEPS).backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.num_micro_steps + 1) % MICRO_STEPS == 0

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.optimizer.step()
            self.zero_grad()
        self.num_micro_steps += 1

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def gradient_clipping(self) -> float:
        return 0.0


class Taken(NamedTuple):
    engine: PlainEngine
    outcome: StepOutcome


@pytest.fixture
def watchdog(tmp_path: Path) -> Iterator[Watchdog]:
    watchdog = Watchdog(
        Ranks(rank=RANK, world_size=1, device=torch.device("cpu")), timeout_s=600.0, log=tmp_path / "log"
    )
    yield watchdog
    watchdog.close()


def config_of(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "seed": SEED,
        "engine__global_batch_size": BATCH_SIZE,
        "engine__micro_batch_size": BATCH_SIZE // MICRO_STEPS,
        "noise__own_draft_fraction": 0.0,
        "noise__scored_stride": 3,
        "noise__draft_gradient_scale": 0.25,
        "model__dropout": 0.0,
        "model__label_dropout": 0.5,
        "cluster__launcher": "torchrun",
    }
    return train_config(Path("run"), shards=Path("set"), **(settings | changes))


def batch_of(config: TrainConfig) -> Batch:
    codes = np.random.default_rng(0).integers(0, 16, (BATCH_SIZE, config.model.num_positions))
    return Batch(
        codes_BT=codes,
        labels_B=np.array([0, 1, 2, 3, -1, 0]),
        parts_B=np.zeros(BATCH_SIZE, dtype=np.int64),
        sample_indices_B=np.arange(BATCH_SIZE),
        counters_B=np.arange(48, 48 + BATCH_SIZE),
        position=48,
        num_replaced=2,
    )


def take(config: TrainConfig, watchdog: Watchdog, *, step: int = 9, num_skipped: int = 0, **changes: Any) -> Taken:
    engine = PlainEngine(config)
    for name, value in changes.pop("weights", {}).items():
        engine.module.get_parameter(name).data.fill_(value)
    ranks = Ranks(rank=RANK, world_size=1, device=torch.device("cpu"))
    stepper = Stepper(config, engine=engine, ranks=ranks, watchdog=watchdog)
    told = {"data_wait_s": 0.75, "is_told_to_stop": False} | changes
    return Taken(engine, stepper.take(batch_of(config), step=step, num_skipped_steps=num_skipped, **told))


def inputs_by_hand(config: TrainConfig, *, step: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Codes, windows, labels and counters of each micro step."""
    batch = batch_of(config)
    codes, labels, counters = (torch.from_numpy(x) for x in (batch.codes_BT, batch.labels_B, batch.counters_B))
    draws: dict[str, Any] = {"seed": SEED, "step": step, "sample_counters_B": counters}
    windows = noise_windows(codes, betas=(0.0, 0.5, 3**0.5 / 2, 1.0), codebook_size=16, coupling="independent", **draws)
    dropped = drop_labels(labels, fraction=0.5, null_label=config.model.num_classes, **draws)
    return list(zip(*(x.split(BATCH_SIZE // MICRO_STEPS) for x in (codes, windows, dropped, counters)), strict=True))


def test_each_micro_step_reads_its_own_samples_with_the_draws_of_the_step(watchdog: Watchdog) -> None:
    config = config_of(noise__schedule="sine")
    engine, _ = take(config, watchdog)
    assert len(engine.read) == engine.num_micro_steps == MICRO_STEPS
    for micro_step, (codes, windows, labels, counters) in enumerate(inputs_by_hand(config, step=9)):
        read = engine.read[micro_step]
        assert torch.equal(read.windows_BTK, windows)
        assert torch.equal(read.labels_B, labels)
        phases = draw_phases(window_size=4, stride=3, seed=SEED, step=9, sample_counters_B=counters)
        scored = score_predictions(codes, window_size=4, stride=3, phases_BK=phases)
        assert torch.equal(read.scored.positions_BR, scored.positions_BR)
        assert torch.equal(read.scored.targets_BR, scored.targets_BR)
        assert read.scored.draft_gradient_scale == 0.25


def test_dropout_is_seeded_by_step_micro_step_and_rank(watchdog: Watchdog) -> None:
    config = config_of(model__dropout=0.1, noise__own_draft_fraction=0.5)
    for step in (8, 9):
        engine, _ = take(config, watchdog, step=step)
        key = (SEED & 0xFFFFFFFF, 0x14 | SEED >> 32 << 8)
        words = [word_by_hand(micro_step << 32 | RANK, key=key, stream=step) for micro_step in range(MICRO_STEPS)]
        assert [read.seed for read in engine.read] == [word // 2 for word in words]


def test_a_step_on_own_drafts_reads_those_of_its_weights_at_their_temperature(watchdog: Watchdog) -> None:
    config = config_of(noise__schedule="sine", noise__own_draft_fraction=1.0, noise__draft_temperature=0.5)
    engine, _ = take(config, watchdog)
    model = PlainEngine(config).module
    for read, (_, windows, labels, counters) in zip(engine.read, inputs_by_hand(config, step=9), strict=True):
        drafts = draft_windows(model, windows, labels, temperature=0.5, seed=SEED, step=9, sample_counters_B=counters)
        assert torch.equal(read.windows_BTK, drafts)
        assert not torch.equal(drafts, windows)


def test_an_outcome_is_the_mean_over_the_micro_steps(watchdog: Watchdog) -> None:
    config = config_of(noise__schedule="sine", noise__offset_weights=[4, 3, 2, 1])
    engine, outcome = take(config, watchdog)
    model = PlainEngine(config).module
    results = [
        window_loss(model, read.windows_BTK, read.labels_B, scored=read.scored, offset_weights=(4.0, 3.0, 2.0, 1.0))
        for read in engine.read
    ]
    assert outcome.loss == pytest.approx(sum(float(result.loss.detach()) for result in results) / 3, rel=1e-6)
    losses = torch.stack([result.loss_of_offset_K for result in results]).mean(0)
    assert outcome.loss_of_offset == pytest.approx(losses.tolist(), rel=1e-6)
    hits = torch.stack([result.accuracy_of_offset_K.double() for result in results]).mean(0)
    assert outcome.accuracy_of_offset == pytest.approx(hits.tolist(), rel=1e-6)
    assert (outcome.data_wait_s, outcome.num_replaced, outcome.is_stopped) == (0.75, 2, False)
    assert not outcome.is_skipped
    assert len(outcome.suspects_B) == 0
    sum_of_losses = sum(result.loss for result in results) / 3
    sum_of_losses.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert outcome.grad_norm == pytest.approx(norm, rel=1e-5)


def test_a_rank_that_is_told_to_stop_stops_all(watchdog: Watchdog) -> None:
    assert take(config_of(), watchdog, is_told_to_stop=True).outcome.is_stopped


def test_a_step_moves_the_weights_by_its_own_learning_rate(watchdog: Watchdog) -> None:
    config = config_of(optimizer={"learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 4})
    before = PlainEngine(config).module.state_dict()
    engine, _ = take(config, watchdog, step=3)
    name = "base.layers.0.attention.wqkv.weight"
    moved = (engine.module.state_dict()[name] - before[name]).abs().max()
    assert float(moved) == pytest.approx(3e-3 * 3 / 4, rel=1e-3)  # the first step of a fresh Adam


@pytest.mark.parametrize(
    ("step", "num_skipped", "is_frozen"), [(4, 0, True), (5, 0, False), (6, 2, True), (7, 2, False)]
)
def test_only_steps_that_were_taken_count_for_the_warm_up_of_the_modules(
    watchdog: Watchdog, step: int, num_skipped: int, is_frozen: bool
) -> None:
    config = config_of(optimizer__module_warmup_steps=4, warm_start="weights.safetensors")
    engine, _ = take(config, watchdog, step=step, num_skipped=num_skipped)
    assert {group.get(IS_FROZEN) for group in engine.optimizer.param_groups if group["is_base"]} == {is_frozen}


def test_a_step_without_a_finite_loss_moves_nothing_and_names_its_suspects(watchdog: Watchdog) -> None:
    config = config_of(model__label_dropout=0.0)
    table = "base.cls_embedding.embedding_table.weight"
    engine = PlainEngine(config)
    with torch.no_grad():
        engine.module.get_parameter(table)[2] = math.nan  # the label of the third sample alone
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    ranks = Ranks(rank=RANK, world_size=1, device=torch.device("cpu"))
    stepper = Stepper(config, engine=engine, ranks=ranks, watchdog=watchdog)
    outcome = stepper.take(batch_of(config), step=9, num_skipped_steps=0, data_wait_s=0.0, is_told_to_stop=False)
    assert outcome.is_skipped
    assert outcome.suspects_B.tolist() == [2, 3]  # of the second micro step
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert engine.num_micro_steps == MICRO_STEPS


def test_finite_gradients_of_a_loss_that_is_not_finite_move_nothing_either(watchdog: Watchdog) -> None:
    class Forgiving(PlainEngine):
        def backward(self, loss: Tensor) -> None:
            for parameter in self.module.parameters():
                parameter.grad = torch.ones_like(parameter)

    config = config_of(model__label_dropout=0.0)
    engine = Forgiving(config)
    with torch.no_grad():
        engine.module.get_parameter("base.cls_embedding.embedding_table.weight")[2] = math.nan
    before = engine.module.get_parameter("base.output.weight").detach().clone()
    ranks = Ranks(rank=RANK, world_size=1, device=torch.device("cpu"))
    stepper = Stepper(config, engine=engine, ranks=ranks, watchdog=watchdog)
    outcome = stepper.take(batch_of(config), step=9, num_skipped_steps=0, data_wait_s=0.0, is_told_to_stop=False)
    assert outcome.is_skipped
    assert math.isfinite(outcome.grad_norm)
    assert torch.equal(engine.module.get_parameter("base.output.weight"), before)
