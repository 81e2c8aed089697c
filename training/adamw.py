"""AdamW that keeps an exponential moving average of the weights as one more state of each parameter.

Invariant: the average lives where Adam's moments live, so that DeepSpeed partitions it, offloads it and hands it out
like them at every ZeRO stage. It is float32, has its parameter's shape, costs 4 bytes a parameter, and begins with the
weights before the first step, as LlamaGen's does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AVERAGE = "ema"
"""Key of the average in the optimiser's state."""


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

    @torch.no_grad()
    def _move_averages(self, parameters: list[Tensor], *, decay: float) -> None:
        if parameters:
            averages = [self.state[parameter][AVERAGE] for parameter in parameters]
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1.0 - decay)
