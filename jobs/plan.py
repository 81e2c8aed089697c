"""`tensorar plan`: what a training run will take, as a table over the ZeRO stages, and whether this machine has it."""

from __future__ import annotations

import os

import torch
from rich.table import Table

from pipeline.config import ClusterConfig
from training.config import TrainConfig
from training.flops import model_flops_per_sample
from training.plan import (
    ZERO_STAGES,
    Device,
    Memory,
    checkpoint_bytes,
    estimate_memory,
    kept_checkpoints,
    num_parameters,
)

GB = 10**9
_ROWS = (
    ("process", "process"),
    ("weights", "weights"),
    ("float32 weights", "float32_weights"),
    ("Adam's moments", "moments"),
    ("average (EMA)", "average"),
    ("gradients", "gradients"),
    ("buckets", "buckets"),
    ("heap (freed, but kept)", "heap"),
    ("checkpoint's copy (host)", "checkpoint_copy"),
    ("at the loss: activations", "activations"),
    ("at the loss: itself", "loss"),
    ("in backward", "backward_work"),
    ("in the step", "step_work"),
    ("peak", "peak"),
)
"""Heading and field of `Memory`."""


def device_of(cluster: ClusterConfig) -> Device:
    """Return what the ranks of a spec compute on; torchrun's ranks take this machine's GPUs where it has some."""
    has_gpus = torch.cuda.is_available() if cluster.launcher == "torchrun" else cluster.gpus_per_worker > 0
    return "cuda" if has_gpus else "cpu"


def plan_table(config: TrainConfig, *, world_size: int) -> Table:
    """Return gigabytes per rank and moment for every ZeRO stage, the spec's own marked.

    Args:
        config: of the run.
        world_size: ranks.

    Raises:
        ValueError: the global batch does not divide over the ranks.
    """
    device = device_of(config.cluster)
    table = Table(title=f"memory of a rank, GB ({device}, {world_size} ranks)", title_justify="left")
    table.add_column("")
    for stage in ZERO_STAGES:
        table.add_column(f"ZeRO {stage}" + (" *" if stage == config.engine.zero_stage else ""), justify="right")
    plans = [_memory(config, world_size=world_size, zero_stage=stage) for stage in ZERO_STAGES]
    for heading, field in _ROWS:
        cells = (f"{getattr(plan, field) / GB:.2f}" for plan in plans)
        table.add_row(heading, *cells, style="bold" if field == "peak" else "", end_section=field == "step_work")
    return table


def plan_summary(config: TrainConfig, *, world_size: int) -> str:
    """Return work per step, bytes on disk and the verdict, one a line."""
    engine, model = config.engine, config.model
    samples = engine.samples_per_micro_step(world_size)
    flops = engine.global_batch_size * model_flops_per_sample(
        model, micro_batch_size=samples, scored_stride=config.noise.scored_stride
    )
    return "\n".join(
        (
            f"parameters:  {num_parameters(model):,}",
            f"step:        {engine.global_batch_size} samples = {world_size} ranks * {samples} * "
            f"{engine.grad_accumulation(world_size)} micro steps; {engine.global_batch_size * model.num_positions:,} "
            f"codes; {flops / 10**12:.3g} TFLOP",
            f"checkpoint:  {_checkpoints(config)}",
            f"verdict:     {_verdict(config, world_size=world_size)}",
        )
    )


def _checkpoints(config: TrainConfig) -> str:
    checkpoint, num_bytes = config.checkpoint, checkpoint_bytes(config)
    num_kept = len(kept_checkpoints(checkpoint, num_steps=config.num_steps))
    for_good = checkpoint.keep_every_n_steps
    rule = f"{checkpoint.keep_latest} newest" + ("" if for_good is None else f", every {for_good:,}th step")
    return (
        f"{num_bytes / GB:.2f} GB each; {num_kept} are kept at the end ({rule}), {num_kept * num_bytes / GB:.2f} GB, "
        "one more while it is written"
    )


def _verdict(config: TrainConfig, *, world_size: int) -> str:
    peak = _memory(config, world_size=world_size, zero_stage=config.engine.zero_stage).peak
    if device_of(config.cluster) == "cuda":
        if not torch.cuda.is_available():
            return f"each rank needs {peak / GB:.2f} GB of its GPU; this machine has none to compare with"
        has, ranks, where = torch.cuda.get_device_properties(0).total_memory, 1, "this machine's GPU"
    else:
        is_here = config.cluster.launcher == "torchrun" or config.cluster.address == "local"
        has, ranks = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), world_size if is_here else 1
        where = "this machine"
    need = ranks * peak
    if need <= 0.9 * has:
        return f"fits: {ranks} ranks need {need / GB:.2f} GB, {where} has {has / GB:.2f} GB"
    return (
        f"does not fit safely: {ranks} ranks need {need / GB:.2f} GB, {where} has {has / GB:.2f} GB; take a smaller "
        f"engine.micro_batch_size, engine.activation_checkpointing, a higher zero_stage or more ranks"
    )


def _memory(config: TrainConfig, *, world_size: int, zero_stage: int) -> Memory:
    # Whoever fixed malloc's threshold wants freed memory to go back.
    has_heap = "MALLOC_MMAP_THRESHOLD_" not in os.environ
    device = device_of(config.cluster)
    return estimate_memory(config, world_size=world_size, zero_stage=zero_stage, device=device, has_heap=has_heap)
