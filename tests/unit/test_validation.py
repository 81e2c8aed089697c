"""Validation of two ranks, one after the other, against the means of full logits over the samples that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_shards import codes_of, train_config, write_shard_set
from torch.nn import functional as F

from pipeline.shard_set import ShardSet
from training.noise import draft_windows, make_windows
from training.ranks import Ranks
from training.tensorar import TensorAR, build_model
from training.validation import Validation, ValidationResult

INDICES = np.array([0, 2, 4, 7, 9])  # five spread over twelve
SEED = 5


@dataclass(frozen=True, kw_only=True)
class InTurn(Ranks):
    """A rank whose sums hold those of the ranks that were measured before it."""

    before: list[torch.Tensor] = field(default_factory=list)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.before.append(tensor.clone())
        return torch.stack(self.before).sum(0)


def measured(tmp_path: Path, *, window_size: int, world_size: int) -> tuple[TensorAR, ValidationResult, int]:
    """A random model, what the last rank says of it, and how many micro batches all ranks announced."""
    held_out = ShardSet.open(str(write_shard_set(tmp_path / "held_out", samples_per_shard=(7, 5), num_views=2)))
    changes: dict[str, Any] = {"model__window_size": window_size, "noise": {"schedule": "none", "draft_weight": 0.25}}
    changes |= {"engine__global_batch_size": 8, "engine__micro_batch_size": 2, "engine__ops": "reference"}
    validation = {"shards": str(tmp_path / "held_out"), "num_samples": 5}
    config = train_config(tmp_path / "run", shards=tmp_path / "held_out", validation=validation, **changes)
    torch.manual_seed(2)
    model = build_model(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    engine: Any = SimpleNamespace(module=model, eval=model.eval, train=model.train)
    sums: list[torch.Tensor] = []
    batches: list[None] = []
    for rank in range(world_size):
        ranks = InTurn(rank=rank, world_size=world_size, device=torch.device("cpu"), before=sums)
        result = Validation(held_out, config=config, ranks=ranks).measure(engine, on_batch=lambda: batches.append(None))
    return model.eval(), result, len(batches)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_measures_are_means_over_the_named_samples_whatever_the_ranks(tmp_path: Path, world_size: int) -> None:
    model, result, num_batches = measured(tmp_path, window_size=3, world_size=world_size)
    codes = [codes_of(int(i), num_views=2, codebook_size=16, num_codes=16)[0] for i in INDICES]
    codes_BT, labels_B = torch.from_numpy(np.stack(codes).astype(np.int64)), torch.from_numpy(INDICES % 4)
    true_BTK, _ = make_windows(codes_BT, window_size=3)  # without noise these are the windows of the schedule
    drafts_BTK = draft_windows(
        model, true_BTK, labels_B, seed=SEED, step=0, sample_counters_B=torch.from_numpy(INDICES)
    )
    with torch.no_grad():
        logits, drafted = model(true_BTK, labels_B), model(drafts_BTK, labels_B)
    losses = [F.cross_entropy(logits[:, : 16 - j, j].flatten(0, 1), codes_BT[:, j:].flatten()).item() for j in range(3)]
    hits = [(logits[:, : 16 - j, j].argmax(-1) == codes_BT[:, j:]).double().mean().item() for j in range(3)]
    own = F.cross_entropy(drafted[:, :, 0].flatten(0, 1), codes_BT.flatten()).item()
    assert result.loss_of_offset == pytest.approx(losses, rel=1e-5)
    assert result.accuracy_of_offset == pytest.approx(hits, rel=1e-5)
    assert result.own_draft_loss_0 == pytest.approx(own, rel=1e-5)
    assert result.loss == pytest.approx((losses[0] + 0.25 * losses[1] + 0.25 * losses[2]) / 1.5, rel=1e-5)
    assert abs(own - losses[0]) > 0.01
    assert num_batches == {1: 3, 2: 4}[world_size]  # as many on every rank, the last of rank 1 empty


def test_without_windows_the_loss_with_own_drafts_is_that_of_the_kept_code(tmp_path: Path) -> None:
    _, result, _ = measured(tmp_path, window_size=1, world_size=1)
    assert result.own_draft_loss_0 == result.loss == result.loss_of_offset[0]


def test_training_goes_on_in_training_mode(tmp_path: Path) -> None:
    modes: list[bool] = []
    held_out = ShardSet.open(str(write_shard_set(tmp_path / "held_out", samples_per_shard=(2,))))
    changes: dict[str, Any] = {"engine__ops": "reference", "validation": {"shards": str(tmp_path / "held_out")}}
    config = train_config(tmp_path / "run", shards=tmp_path / "held_out", **changes)
    model = build_model(config.model).train()
    engine: Any = SimpleNamespace(module=model, eval=model.eval, train=model.train)
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    Validation(held_out, config=config, ranks=ranks).measure(engine, on_batch=lambda: modes.append(model.training))
    assert modes == [False]
    assert model.training
