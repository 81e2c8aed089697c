"""AdamW that keeps an exponential moving average of the weights as one more state of each parameter.

A group whose `is_frozen` is true stays as it is, whatever its gradients: weights, moments, average, count of steps.

Invariant: the average lives where Adam's moments live, so that DeepSpeed partitions it, offloads it and hands it out
like them at every ZeRO stage. It is float32, has its parameter's shape, costs 4 bytes a parameter, and begins with the
weights before the first step, as LlamaGen's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

AVERAGE = "ema"
"""Key of the average in the optimiser's state."""
IS_FROZEN = "is_frozen"
"""Key of a parameter group, where it has it: whether steps leave the group alone."""


class AdamW(torch.optim.AdamW):
    """Torch's AdamW; with `ema_decay`, every step is followed by ema = decay * ema + (1 - decay) * weights."""

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        ema_decay: float | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=fused)
        self.ema_decay = ema_decay

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes AdamW's step, then moves the averages of what it updated: what has a gradient now.

        ZeRO swaps its partitions in and out of the groups around a call, one at a time.
        """
        with self._without_frozen_groups():
            return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        if self.ema_decay is None:
            plain: float | None = super().step(closure)
            return plain
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        # Adam fills the state of a parameter only while it is empty, so the average may enter it only after the step.
        begun = {p: p.detach().clone().float() for p in parameters if AVERAGE not in self.state[p]}
        loss: float | None = super().step(closure)
        for parameter, average in begun.items():
            self.state[parameter][AVERAGE] = average
        self._move_averages(parameters, decay=self.ema_decay)
        return loss

    @contextmanager
    def _without_frozen_groups(self) -> Iterator[None]:
        """Torch's step sees no parameter of a frozen group while the body runs."""
        frozen = [(group, group["params"]) for group in self.param_groups if group.get(IS_FROZEN)]
        for group, _ in frozen:
            self._begin_states(group)
            group["params"] = []
        try:
            yield
        finally:
            for group, parameters in frozen:
                group["params"] = parameters

    @torch.no_grad()
    def _begin_states(self, group: dict[str, Any]) -> None:
        """Give what has a gradient the state that torch's first step begins with, which checkpoints keep of all."""
        for parameter in group["params"]:
            if parameter.grad is None or self.state[parameter]:
                continue
            state = self.state[parameter]
            device = parameter.device if group["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if self.ema_decay is not None:
                state[AVERAGE] = parameter.detach().clone().float()

    @torch.no_grad()
    def _move_averages(self, parameters: list[Tensor], *, decay: float) -> None:
        if parameters:
            averages = [self.state[parameter][AVERAGE] for parameter in parameters]
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1.0 - decay)
