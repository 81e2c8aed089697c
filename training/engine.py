"""A train spec -> a DeepSpeed engine; the only file that spells DeepSpeed's keys.

Invariant: the optimiser is torch's AdamW in float32, decays matrices only, and its learning rate is set by us as a
pure function of the step, so that nothing about the schedule needs saving. ZeRO 0-3, bfloat16 or float32, clipping,
grad accumulation derived from the batch; a step whose norm is not finite changes nothing. DeepSpeed's own Adam is not
used: it takes 80 s to compile at start.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from training.adamw import IS_FROZEN, AdamW
from training.config import EngineConfig, OptimizerConfig, TrainConfig
from training.ranks import Ranks
from training.tensorar import TensorAR, is_of_base

logger = logging.getLogger(__name__)

Engine = Any
"""A `deepspeed.DeepSpeedEngine`; DeepSpeed carries no types."""

BUCKET_ELEMENTS = 50_000_000
_IS_BASE = "is_base"
"""Key of a parameter group: whether it holds the base model's parameters, or the modules'."""


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


def parameter_groups(model: nn.Module, *, weight_decay: float, has_base_groups: bool = False) -> list[dict[str, Any]]:
    """Return two AdamW groups: tensors of two or more dimensions decay, the others do not.

    Args:
        model: whose parameters.
        weight_decay: of those that decay.
        has_base_groups: whether the base model has two of its own, which `freeze_base` can freeze.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    halves = [named]
    if has_base_groups:
        halves = [[pair for pair in named if is_of_base(pair[0]) == is_base] for is_base in (True, False)]
    groups = [
        {"params": [p for _, p in half if (p.dim() >= 2) == decays], "weight_decay": weight_decay if decays else 0.0}
        | ({_IS_BASE: is_of_base(half[0][0])} if has_base_groups else {})
        for half in halves
        for decays in (True, False)
        if half
    ]
    return [group for group in groups if group["params"]]


def deepspeed_settings(config: EngineConfig, *, max_grad_norm: float, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's own config of a run.

    Raises:
        ValueError: the global batch does not divide over the ranks.
    """
    return {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.samples_per_micro_step(world_size),
        "gradient_accumulation_steps": config.grad_accumulation(world_size),
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded states are stepped by the same AdamW
        "zero_optimization": _zero_settings(config, world_size=world_size),
    }


def _zero_settings(config: EngineConfig, *, world_size: int) -> dict[str, Any]:
    has_cuda = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "stage": config.zero_stage,
        # Overlap needs device streams; on CPU it only adds copies.
        "overlap_comm": has_cuda,
        # One rank reduces nothing: the copy into a bucket would be wasted.
        "contiguous_gradients": world_size > 1,
        # DeepSpeed allocates the bucket anew in every backward; on CPU a large one costs its page faults.
        "reduce_bucket_size": BUCKET_ELEMENTS if has_cuda else BUCKET_ELEMENTS // 10,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if config.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": has_cuda}
    return settings


def check_settings(settings: dict[str, Any]) -> None:
    """Check the keys of DeepSpeed's config against DeepSpeed's own names: it ignores what it does not know on top.

    Raises:
        ValueError: a key that the installed DeepSpeed does not read, or a block that its model refuses.
    """
    from deepspeed.runtime import constants  # noqa: PLC0415  (see `build_engine`)
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config  # noqa: PLC0415
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: PLC0415

    blocks = {"bf16": DeepSpeedBF16Config, "zero_optimization": DeepSpeedZeroConfig}
    scalars = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    for key, value in settings.items():
        if key not in blocks and (key not in scalars or isinstance(value, dict)):
            near = difflib.get_close_matches(key, [*blocks, *scalars], n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise ValueError(f"deepspeed settings: every key must be one of DeepSpeed's own, got {key!r}; {hint}")
    for key, model in blocks.items():
        unknown = set(settings.get(key, {})) - set(model.model_fields)
        if unknown:
            raise ValueError(
                f"deepspeed settings: every key of {key} must be one of DeepSpeed's own, got {sorted(unknown)}; "
                f"correct it"
            )


def build_engine(model: TensorAR, *, config: TrainConfig, ranks: Ranks) -> Engine:
    """Return the DeepSpeed engine of `model`, in training mode; rank 0's weights are broadcast.

    Raises:
        ValueError: the global batch does not divide over the ranks.
    """
    import deepspeed  # noqa: PLC0415  picks its accelerator at import; `join_ranks` has prepared that

    settings = deepspeed_settings(
        config.engine, max_grad_norm=config.optimizer.max_grad_norm, world_size=ranks.world_size
    )
    check_settings(settings)
    _prepare_blocks(model, config.engine)
    optimizer = AdamW(
        parameter_groups(
            model,
            weight_decay=config.optimizer.weight_decay,
            has_base_groups=config.optimizer.module_warmup_steps > 0,
        ),
        lr=0.0,  # at ZeRO 0 in bfloat16 DeepSpeed takes a step with zero gradients here: it must change nothing
        betas=config.optimizer.betas,
        ema_decay=config.optimizer.ema_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model.to(ranks.device), optimizer=optimizer, config=settings, dist_init_required=False
    )
    engine.clip_fp32_gradients = lambda: None  # `take_step` clips them by the norm that it needs anyway
    if hasattr(engine.optimizer, "check_overflow"):
        engine.optimizer.check_overflow = lambda **_: None  # one more pass over what the norm shows as well
    optimizer.state.clear()
    set_learning_rate(engine, config.optimizer.learning_rate)
    return engine


def _prepare_blocks(model: TensorAR, config: EngineConfig) -> None:
    model.base.recomputes_activations = config.activation_checkpointing
    if config.compile_mode != "none":
        for block in model.base.layers:
            block.compile(mode=config.compile_mode)  # in place: the names of the weights stay


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def freeze_base(engine: Engine, *, is_frozen: bool) -> None:
    """Say whether the next step leaves the base model as it is: weights, moments and average, bit for bit.

    Its gradients are made, reduced and counted in the norm as ever; they only move nothing. It needs the groups that
    `optimizer.module_warmup_steps` makes.
    """
    for group in engine.optimizer.param_groups:
        if group.get(_IS_BASE):
            group[IS_FROZEN] = is_frozen


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
    gradients, norm = _whole_gradients(engine)
    if not (may_update and math.isfinite(norm)):
        engine.zero_grad()  # AdamW leaves alone what has no gradient
    elif engine.gradient_clipping() > 0.0 and norm > engine.gradient_clipping():
        torch._foreach_mul_(gradients, engine.gradient_clipping() / (norm + 1e-6))
    engine.step()
    return norm


def _whole_gradients(engine: Engine) -> tuple[list[torch.Tensor], float]:
    """The reduced gradients of ZeRO 0, whole on every rank, and their norm."""
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return gradients, float(torch.nn.utils.get_total_norm([gradient.float() for gradient in gradients]))


def _discard_gradients(engine: Engine) -> float:
    """Return the norm of gradients that are dropped as DeepSpeed itself drops those whose norm is not finite."""
    from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: PLC0415  (see `build_engine`)

    optimizer = engine.optimizer
    infinity = torch.tensor(math.inf, device=engine.device)
    if engine.zero_optimization_stage() == 0:
        gradients, norm = _whole_gradients(engine)
        gradients[0].fill_(math.inf)
        engine.step()
        return norm
    if engine.zero_optimization_stage() == 3:
        norm = float(combine_grad_norm_groups(optimizer._get_norm_groups()))
        with _replaced(optimizer, "_get_norm_groups", lambda: [infinity]):
            engine.step()
        return norm
    norm = float(optimizer.scaled_global_norm())
    with _replaced(optimizer, "scaled_global_norm", lambda: infinity):
        engine.step()
    return norm


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[[], Any]) -> Iterator[None]:
    """`owner.name` is `method` while the body runs."""
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)
