"""The plain sampler: one backbone call a step for all samples of a batch, one code or a stride of codes final in each.

With a stride s, the call of step p reads the last prediction and its s - 1 shifts (`training.drawing.kept_cells`) and
predicts from its last position alone; nothing of what it read in between is looked at again.

B batch, K window_size, R logit rows, S stride, T positions, V codebook_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.config import SamplerConfig
from training.drawing import Draws, draw_windows, kept_cells
from training.frozen import FrozenModel
from training.gpt import KeyValueCache
from training.guidance import guide, num_guided_positions


class Stepping:
    """Where a batch is, and the call that brings it on; arguments as in `training.sampling.sample_codes`."""

    def __init__(
        self, frozen: FrozenModel, labels_B: Tensor, counters_B: Tensor, *, config: SamplerConfig, seed: int
    ) -> None:
        self.frozen, self.config, self.seed = frozen, config, seed
        self.labels_B, self.counters_B = labels_B, counters_B
        self.num_positions, self.window_size = frozen.config.num_positions, frozen.config.window_size
        self.num_guided = num_guided_positions(config, num_positions=self.num_positions)
        self.cache = KeyValueCache(
            frozen.config,
            batch_size=len(labels_B) * (2 if self.num_guided else 1),
            dtype=frozen.dtype,
            device=frozen.device,
        )
        self.windows_BTK = labels_B.new_zeros(len(labels_B), self.num_positions, self.window_size)
        """Window t as the model reads it, code t and drafts of the codes after it; 0 beyond the image."""
        self.calls_B = torch.zeros_like(labels_B)
        self.step = 0
        """Position that is predicted next."""

    def advance(self) -> bool:
        """One backbone call; false, and no call, where all codes are final."""
        step, stop = self.step, min(self.step + self.config.stride, self.num_positions)
        if step == stop:
            return False
        if step >= self.num_guided and self._is_guided():
            self.cache.keep(torch.arange(self.cache.batch_size, device=self.frozen.device) < len(self.labels_B))
        self.windows_BTK[:, step:stop] = draw_windows(
            self._logits(),
            kept_cells(self.config, window_size=self.window_size, num_windows=stop - step),
            Draws(self.seed, self.counters_B, torch.full_like(self.counters_B, step), self.frozen.ops),
            config=self.frozen.config,
        )
        self.calls_B += 1
        self.step = stop
        return True

    def _is_guided(self) -> bool:
        return self.cache.batch_size > len(self.labels_B)

    def _logits(self) -> Tensor:
        """Guided logits (B, K, V) of the next position, in float32 or wider."""
        frozen, guided = self.frozen, self._is_guided()
        if self.step == 0:
            null_B = torch.full_like(self.labels_B, frozen.null_label)
            x_BLD = frozen.embed_labels(torch.cat([self.labels_B, null_B]) if guided else self.labels_B)
        else:
            start = self.step - self.config.stride
            x_BLD = frozen.embed_windows(self.windows_BTK[:, start : self.step], start=start)
            x_BLD = x_BLD.repeat(2, 1, 1) if guided else x_BLD
        h_BLD = frozen.read(x_BLD, start=self.step + 1 - x_BLD.shape[1], cache=self.cache)
        return frozen.predict(h_BLD[:, -1:], mix=self._mix if guided else None)[:, 0]

    def _mix(self, states: Tensor) -> Tensor:
        return guide(*states.chunk(2), scale=self.config.guidance)
