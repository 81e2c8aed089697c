"""An engine's whole weights and averages, read through DeepSpeed's own access: what tests hold our fragments to."""

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from training.adamw import AVERAGE
from training.engine import Engine


def full_weights(engine: Engine, *, is_kept: bool) -> dict[str, torch.Tensor]:
    """Return the whole float32 weights by name, on the CPU; called by every rank.

    Args:
        engine: of any ZeRO stage.
        is_kept: ranks that pass False take part, keep nothing and get an empty dict.
    """
    masters = _whole_masters(engine)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if is_kept:
            weights[name] = _to_cpu(masters.get(parameter, parameter) if full is None else full)
    return weights


def _whole_masters(engine: Engine) -> dict[torch.Tensor, torch.Tensor]:
    """The float32 weights of each bfloat16 parameter at ZeRO 0, where every rank holds all of them; else empty."""
    pairs = zip(
        getattr(engine.optimizer, "fp16_groups", ()), getattr(engine.optimizer, "fp32_groups", ()), strict=False
    )
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _link_optimizer_states(engine: Engine) -> None:
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
    _link_optimizer_states(engine)
    masters = _whole_masters(engine)
    averages: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_optimizer_state(parameter, AVERAGE)
        if full is None:  # ZeRO 0: what never had a gradient has no state, and is its own average
            master = masters.get(parameter, parameter)
            full = engine.optimizer.state[master].get(AVERAGE, master)
        if is_kept:
            averages[name] = _to_cpu(full)
    return averages
