"""One rank of LlamaGen's five training steps on our engine: `torchrun ... tests/five_steps.py ORACLES ZERO_STAGE`."""

import os
import sys
from pathlib import Path

import torch
from whole_state import full_average, full_weights

from training.config import ModelConfig, TrainConfig
from training.engine import build_engine, take_step
from training.loss import window_loss
from training.ranks import join_ranks, leave_ranks
from training.scored import score_predictions
from training.tensorar import build_model

oracles, zero_stage = Path(sys.argv[1]), int(sys.argv[2])
steps = torch.load(oracles / "llamagen_c2i_train5.pt", weights_only=True)
start = oracles / "llamagen_c2i_tiny.pt"
state = torch.load(start, weights_only=True)["state_dict"]
num_codes, dim = state["tok_embeddings.weight"].shape
num_classes = state["cls_embedding.embedding_table.weight"].shape[0] - 1
config = TrainConfig(
    kind="train",
    run_dir="unused",
    data={"shards": "unused"},
    num_steps=5,
    model=ModelConfig(
        num_layers=2,
        num_heads=4,
        model_dim=dim,
        codebook_size=num_codes,
        codes_per_side=4,
        num_classes=num_classes,
        dropout=0.0,
    ),
    optimizer={
        "learning_rate": steps["lr"],
        "betas": steps["betas"],
        "weight_decay": steps["weight_decay"],
        "max_grad_norm": steps["max_grad_norm"],
        "ema_decay": steps["ema_decay"],
    },
    engine={"zero_stage": zero_stage, "dtype": "float32", "global_batch_size": 4},
)
ranks = join_ranks()
model = build_model(config.model)
if ranks.is_first:  # whose weights are those of all
    model.base.load_state_dict(state)
engine = build_engine(model, config=config, ranks=ranks)
own = slice(ranks.rank * 4 // ranks.world_size, (ranks.rank + 1) * 4 // ranks.world_size)
for step in range(5):
    codes, labels = (steps[name][step, own].to(ranks.device) for name in ("idx", "labels"))
    result = window_loss(engine, codes[..., None], labels, scored=score_predictions(codes, window_size=1))
    engine.backward(result.loss)
    norm = take_step(engine, may_update=True)
    loss = ranks.sum(result.loss.detach().clone()) / ranks.world_size
    torch.testing.assert_close(loss.cpu(), steps["losses"][step], atol=1e-5, rtol=0)
    assert norm is not None
    assert abs(norm - float(steps["grad_norms"][step])) < 1e-4, (step, norm)
weights = full_weights(engine, is_kept=True)
for name, wanted in steps["final_state_dict"].items():
    # 1 % of what five steps can move; one element is off by 2.2e-5 on torch 2.11.
    torch.testing.assert_close(weights["base." + name], wanted, atol=5e-5, rtol=0)
averages = full_average(engine, is_kept=True)
for name, wanted in steps["ema"].items():
    torch.testing.assert_close(averages["base." + name], wanted, atol=1e-8, rtol=1e-6)  # 5 steps of rounding
leave_ranks(ranks)
sys.stdout.flush()
os._exit(0)
