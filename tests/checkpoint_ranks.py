"""One rank of engines that train, save and resume: `torchrun ... tests/checkpoint_ranks.py CASES.json RESULTS.json`.

A case is `{"spec": train spec, "until": step, "saves": steps, "into": run_dir}`: an engine resumes what the spec's
run_dir holds, takes steps on fixed batches up to `until`, and saves at the steps named, into another directory where
`into` says so. Rank 0 writes the losses of each case by step; of a case that `fails` on every rank, the error of each.
Many cases in one process spare the start of torch.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from synthetic_shards import fingerprint_of

from training.checkpoint import RunState
from training.config import TrainConfig
from training.engine import Engine, build_engine, freeze_base
from training.loss import window_loss
from training.noise import make_windows
from training.ranks import Ranks, join_ranks, leave_ranks
from training.resume import find_checkpoint, resume_engine
from training.saver import CheckpointWriter
from training.scored import score_predictions
from training.tensorar import build_model


def take_step(engine: Engine, step: int, *, config: TrainConfig, ranks: Ranks) -> float:
    size, model = config.engine.global_batch_size, config.model
    generator = torch.Generator().manual_seed(step)
    codes_BT = torch.randint(0, model.codebook_size, (size, model.num_positions), generator=generator)
    labels_B = torch.randint(0, model.num_classes, (size,), generator=generator)
    own = slice(ranks.rank * size // ranks.world_size, (ranks.rank + 1) * size // ranks.world_size)
    torch.manual_seed(1000 * step + ranks.rank)  # of dropout
    scored = score_predictions(codes_BT[own], window_size=model.window_size)
    windows_BTK, _ = make_windows(codes_BT[own], window_size=model.window_size)
    freeze_base(engine, is_frozen=step <= config.optimizer.module_warmup_steps)
    result = window_loss(engine, windows_BTK.contiguous(), labels_B[own], scored=scored)
    engine.backward(result.loss)
    engine.step()
    return float(ranks.sum(result.loss.detach().clone().double())) / ranks.world_size


def save(writer: CheckpointWriter, engine: Engine, step: int) -> None:
    """Save; in the background that makes no memory, since `prepare` has."""
    if writer._maker is not None:
        writer._maker.join()
    memory = writer._buffer.data_ptr()
    writer.save(engine, RunState(step=step, samples_consumed=16 * step))
    assert writer._buffer.data_ptr() == memory


def run(case: dict[str, Any], ranks: Ranks) -> dict[int, float]:
    config, fingerprint = TrainConfig.model_validate(case["spec"]), fingerprint_of()
    torch.manual_seed(config.seed)
    record = find_checkpoint(config, ranks=ranks, fingerprint=fingerprint)
    model = build_model(config.model)
    if config.optimizer.module_warmup_steps:  # a frozen head must not be zero
        torch.nn.init.normal_(model.base.output.weight, std=0.3)
    engine = build_engine(model, config=config, ranks=ranks)
    first = 1
    if record is not None:
        resume_engine(engine, config=config, record=record)
        first = record.step + 1
    target = config.model_copy(update={"run_dir": case.get("into", config.run_dir)})
    writer = CheckpointWriter(target, ranks=ranks, fingerprint=fingerprint)
    losses = {}
    if record is not None and record.step in case["saves"]:
        writer.save(engine, record.state)
    for step in range(first, case["until"] + 1):
        losses[step] = take_step(engine, step, config=config, ranks=ranks)
        writer.prepare(engine)
        if step in case["saves"]:
            save(writer, engine, step)
    writer.close()
    return losses


def run_or_fail(case: dict[str, Any], ranks: Ranks) -> dict[int, float] | list[str]:
    if not case.get("fails"):
        return run(case, ranks)
    try:
        run(case, ranks)
    except Exception as error:
        return ranks.gather(str(error))
    raise AssertionError("it did not fail")


def main() -> None:
    ranks = join_ranks()
    results = [run_or_fail(case, ranks) for case in json.loads(Path(sys.argv[1]).read_text())]
    if ranks.is_first:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave_ranks(ranks)
    sys.stdout.flush()
    os._exit(0)


main()
