"""A train spec -> a DeepSpeed engine; the only file that spells DeepSpeed's keys.

Invariant: the optimiser is torch's AdamW in float32, decays matrices only, and its learning rate is set by us as a
pure function of the step, so that nothing about the schedule needs saving. ZeRO 0-3, bfloat16 or float32, clipping,
grad accumulation derived from the batch. Nothing is compiled at start (DeepSpeed's own Adam would take 80 s).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.adamw import AVERAGE, AdamW
from training.config import EngineConfig, OptimizerConfig, TrainConfig
from training.ranks import Ranks

logger = logging.getLogger(__name__)

Engine = Any
"""A `deepspeed.DeepSpeedEngine`; DeepSpeed carries no types."""

_BUCKET_ELEMENTS = 50_000_000
_TAG = "engine"
_OWNER = re.compile(r"zero_pp_rank_(\d+)_")


def learning_rate_of_step(config: OptimizerConfig, step: int, *, num_steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: peak, warm-up and shape.
        step: the step about to be taken, in [1, num_steps].
        num_steps: steps of the whole run; where a cosine ends.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    floor = config.final_learning_rate_fraction
    return config.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return two AdamW groups: tensors of two or more dimensions decay, the others do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def deepspeed_settings(config: EngineConfig, *, max_grad_norm: float, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's own config of a run.

    Raises:
        ValueError: the global batch does not divide over the ranks.
    """
    accumulation = config.grad_accumulation(world_size)
    return {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.global_batch_size // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            # Overlap needs device streams; on CPU it only adds copies.
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
        },
    }


def build_engine(model: nn.Module, *, config: TrainConfig, ranks: Ranks) -> Engine:
    """Return the DeepSpeed engine of `model`, in training mode; rank 0's weights are broadcast.

    Raises:
        ValueError: the global batch does not divide over the ranks.
    """
    import deepspeed  # noqa: PLC0415  picks its accelerator at import; `join_ranks` has prepared that

    settings = deepspeed_settings(
        config.engine, max_grad_norm=config.optimizer.max_grad_norm, world_size=ranks.world_size
    )
    optimizer = AdamW(
        parameter_groups(model, weight_decay=config.optimizer.weight_decay),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        ema_decay=config.optimizer.ema_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model.to(ranks.device), optimizer=optimizer, config=settings, dist_init_required=False
    )
    engine.clip_fp32_gradients = lambda: None  # `take_step` clips them by the norm that it needs anyway
    return engine


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def save_partitions(engine: Engine, directory: Path) -> None:
    """Write the engine's own files below `directory`, every rank its partition; called by every rank."""
    engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)


def load_partitions(engine: Engine, directory: Path) -> None:
    """Restore weights and optimiser from what `save_partitions` wrote with the same world size and ZeRO stage.

    The files are pickles: only verified ones of this run may come here.
    """
    path, _ = engine.load_checkpoint(str(directory), tag=_TAG, load_lr_scheduler_states=False)
    assert path is not None, directory


def is_written_by(name: str, *, rank: int) -> bool:
    """Return whether a rank writes the file `name` of `save_partitions`; rank 0 writes all that is nobody's own."""
    owner = _OWNER.search(name)
    return rank == (int(owner[1]) if owner else 0)


def full_weights(engine: Engine, *, is_kept: bool) -> dict[str, torch.Tensor]:
    """Return the whole float32 weights by name, on the CPU; called by every rank.

    Args:
        engine: of any ZeRO stage.
        is_kept: ranks that pass False take part, keep nothing and get an empty dict.
    """
    from deepspeed.utils import safe_get_full_fp32_param  # noqa: PLC0415  (see `build_engine`)

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if is_kept:
            weights[name] = (parameter if full is None else full).detach().to("cpu", torch.float32, copy=True)
    return weights


def link_optimizer_states(engine: Engine) -> None:
    """Make DeepSpeed's access to optimiser states by parameter whole, at ZeRO 1 and 2.

    DeepSpeed 0.19.8 links parameters to states once, after the step of the first parameter group, when the states of
    the other groups (here: what does not decay) do not exist yet; reading those then fails.
    """
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def full_average(engine: Engine, *, is_kept: bool) -> dict[str, torch.Tensor]:
    """Return the whole float32 moving average of the weights by name, on the CPU; called by every rank.

    Args:
        engine: of any ZeRO stage, with `optimizer.ema_decay` set, after at least one step.
        is_kept: ranks that pass False take part, keep nothing and get an empty dict.
    """
    from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415  (see `build_engine`)

    link_optimizer_states(engine)
    averages: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_optimizer_state(parameter, AVERAGE)
        if full is None:  # ZeRO 0 in float32: torch's own optimiser
            full = engine.optimizer.state[parameter].get(AVERAGE, parameter)
        if is_kept:
            averages[name] = full.detach().to("cpu", torch.float32, copy=True)
    return averages


def take_step(engine: Engine, *, may_update: bool) -> float | None:
    """Return the global gradient norm before clipping after the last micro step of a step; None after the others.

    Call it after every `engine.backward`, on every rank. After the last micro step it clips and updates weights,
    moments and average if the norm is finite and `may_update`; else all of them stay as they are, bit for bit, and the
    gradients are cleared. The norm is reduced over the ranks, so that all of them decide alike.

    Args:
        engine: of `build_engine`, any ZeRO stage and dtype.
        may_update: the same on every rank; looked at after the last micro step only.

    Returns:
        The norm, the same on every rank; inf or nan where it was not finite.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # counts the micro step
        return None
    if isinstance(engine.optimizer, AdamW):
        return _take_plain_step(engine, may_update=may_update)
    if may_update:
        engine.step()
        return float(engine.get_global_grad_norm())
    return _discard_gradients(engine)


def _take_plain_step(engine: Engine, *, may_update: bool) -> float:
    """The step of ZeRO 0 in float32, where DeepSpeed would clip without telling the norm and update with any."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    is_finite = math.isfinite(float(norm))
    if not (may_update and is_finite):
        engine.zero_grad()  # AdamW leaves alone what has no gradient
    elif engine.gradient_clipping() > 0.0:
        torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
    engine.step()
    return float(norm)


def _discard_gradients(engine: Engine) -> float:
    """Return the norm of gradients that are dropped as DeepSpeed itself drops those whose norm is not finite."""
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors  # noqa: PLC0415

    optimizer = engine.optimizer
    infinity = torch.tensor(math.inf, device=engine.device)
    if hasattr(optimizer, "fp32_groups_gradients_flat"):  # ZeRO 0 in bfloat16
        norm = get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0])
        for gradients in optimizer.fp32_groups_gradients_flat:
            gradients.fill_(math.inf)
        engine.step()
    elif hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
        norm = optimizer.scaled_global_norm()
        with _replaced(optimizer, "scaled_global_norm", lambda: infinity):
            engine.step()
    else:  # ZeRO 3
        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        with _replaced(optimizer, "_get_norm_groups", lambda: [infinity]):
            engine.step()
    return float(norm)


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[[], Any]) -> Iterator[None]:
    """`owner.name` is `method` while the body runs."""
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)


def grad_norm(engine: Engine) -> float | None:
    """Return the global gradient norm of the last `engine.step()`, before clipping; none at ZeRO 0 in float32."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
