"""Exact self-speculation: one backbone call reads several windows on the assumption that drafts stand.

Window t is a function of the label and the windows before it, draws included. A call reads, for each sample, the
newest window that is known and guesses of the ones after it, and predicts a window from each. The first prediction is
what the plain sampler would make; where it equals the guess that was read, so is the next, and so on. At least one
window a call is settled that way, so the codes and drafts are those of `training.steps` (up to the rounding of matrix
products of other shapes), in at most as many calls. Guesses are the last call's predictions, and beyond them what its
last prediction says of the codes ahead, drawn with the draws that their own calls will use.

Samples of a batch are at positions of their own and leave it when they are finished; so do their unguided rows.

A active samples, B batch, K window_size, L windows of a call, R rows of the backbone's batch, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.config import SamplerConfig
from training.drawing import Cell, Draws, draw_windows, guessed_cells, predicted_cells
from training.frozen import FrozenModel
from training.gpt import KeyValueCache, positions_from
from training.guidance import guide, num_guided_positions


class _Rows:
    """The backbone's batch: a conditional row for each active sample, and an unconditional one while it is guided."""

    def __init__(self, num_samples: int, *, num_guided: int, device: torch.device) -> None:
        samples_B = torch.arange(num_samples, device=device)
        self.num_guided = num_guided
        self.sample_R = samples_B.repeat(2 if num_guided else 1)
        self.is_null_R = torch.arange(len(self.sample_R), device=device) >= num_samples

    def leave(self, num_known_B: Tensor, *, num_positions: int, cache: KeyValueCache) -> None:
        """Takes out the rows of finished samples, and those whose guidance is over."""
        ends_R = torch.where(self.is_null_R, self.num_guided, num_positions)
        kept_R = num_known_B[self.sample_R] < ends_R
        if not bool(kept_R.all()):
            order = cache.keep(kept_R)
            self.sample_R, self.is_null_R = self.sample_R[order], self.is_null_R[order]


class Speculation:
    """Where each sample of a batch is, and the call that brings all of them on.

    Arguments as in `training.sampling.sample_codes`; `config.windows_per_call` windows a call.
    """

    def __init__(
        self, frozen: FrozenModel, labels_B: Tensor, counters_B: Tensor, *, config: SamplerConfig, seed: int
    ) -> None:
        self.frozen, self.config, self.seed = frozen, config, seed
        self.labels_B, self.counters_B = labels_B, counters_B
        self.num_positions, self.window_size = frozen.config.num_positions, frozen.config.window_size
        self.most = min(config.windows_per_call, self.num_positions)
        num_guided = num_guided_positions(config, num_positions=self.num_positions)
        self.rows = _Rows(len(labels_B), num_guided=num_guided, device=frozen.device)
        self.cache = KeyValueCache(
            frozen.config,
            batch_size=len(self.rows.sample_R),
            dtype=frozen.dtype,
            device=frozen.device,
            num_spare=self.most,
        )
        self.windows_BTK = labels_B.new_zeros(len(labels_B), self.num_positions + 2 * self.most, self.window_size)
        """Windows that are known, then guesses; 0 beyond the image."""
        self.num_known_B = torch.zeros_like(labels_B)
        self.calls_B = torch.zeros_like(labels_B)

    def advance(self) -> bool:
        """One backbone call; false, and no call, where all samples are finished."""
        self.rows.leave(self.num_known_B, num_positions=self.num_positions, cache=self.cache)
        samples_A = self.rows.sample_R[~self.rows.is_null_R]
        if len(samples_A) == 0:
            return False
        logits_ALKV = self._call(samples_A)
        length = logits_ALKV.shape[1]
        cells = predicted_cells(self.config, window_size=self.window_size, num_windows=length)
        made_ALK = self._draw(logits_ALKV.flatten(1, 2), cells, samples_A, self.num_known_B[samples_A])
        num_settled_A = self._settle(samples_A, made_ALK)
        self._guess(samples_A, logits_ALKV[:, -1], length=length, most_settled=int(num_settled_A.max()))
        self.num_known_B[samples_A] += num_settled_A
        self.calls_B[samples_A] += 1
        return True

    def _call(self, samples_A: Tensor) -> Tensor:
        """Guided logits (A, L, K, V) of the next positions of each sample; the first call has one, the label's."""
        known_A = self.num_known_B[samples_A]
        index_of_B = torch.empty_like(self.labels_B)
        index_of_B[samples_A] = torch.arange(len(samples_A), device=samples_A.device)
        index_R = index_of_B[self.rows.sample_R]
        if int(known_A.max()) == 0:
            labels_R = self.labels_B[self.rows.sample_R].masked_fill(self.rows.is_null_R, self.frozen.null_label)
            h_RLD = self.frozen.read(self.frozen.embed_labels(labels_R), start=0, cache=self.cache)
        else:
            length = min(self.most, self.num_positions - int(known_A.min()))
            read_ALK = self.windows_BTK[samples_A[:, None], positions_from(known_A - 1, length)]
            x_ALD = self.frozen.embed_windows(read_ALK, start=known_A - 1)
            h_RLD = self.frozen.read(x_ALD[index_R], start=known_A[index_R], cache=self.cache)
        if not bool(self.rows.is_null_R.any()):
            return self.frozen.predict(h_RLD)
        return self.frozen.predict(h_RLD, mix=lambda states: self._mix(states, index_R, known_A))

    def _mix(self, states_RLKD: Tensor, index_R: Tensor, known_A: Tensor) -> Tensor:
        """Guided states (A, L, K, D); those of positions that are not guided any more stay as they are."""
        is_null_R = self.rows.is_null_R
        states_ALKD, index_G = states_RLKD[~is_null_R], index_R[is_null_R]
        plain_GLKD = states_ALKD[index_G]
        mixed_GLKD = guide(plain_GLKD, states_RLKD[is_null_R], scale=self.config.guidance)
        is_guided_GL = positions_from(known_A[index_G], states_RLKD.shape[1]) < self.rows.num_guided
        states_ALKD[index_G] = torch.where(is_guided_GL[..., None, None], mixed_GLKD, plain_GLKD)
        return states_ALKD

    def _draw(self, logits_ARV: Tensor, cells: list[Cell], samples_A: Tensor, first_positions_A: Tensor) -> Tensor:
        draws = Draws(self.seed, self.counters_B[samples_A], first_positions_A, self.frozen.ops)
        return draw_windows(logits_ARV, cells, draws, config=self.frozen.config)

    def _settle(self, samples_A: Tensor, made_ALK: Tensor) -> Tensor:
        """Stores the predictions over the guesses; returns how many of each sample are what the plain sampler makes."""
        known_A, length = self.num_known_B[samples_A], made_ALK.shape[1]
        places = samples_A[:, None], positions_from(known_A, length)
        stood_AL = (self.windows_BTK[places] == made_ALK).all(-1)
        self.windows_BTK[places] = made_ALK
        num_settled_A = 1 + stood_AL[:, :-1].cumprod(1).sum(1)
        return torch.minimum(num_settled_A, self.num_positions - known_A)

    def _guess(self, samples_A: Tensor, last_AKV: Tensor, *, length: int, most_settled: int) -> None:
        """Guesses of the windows behind those that were predicted, as many as the next call may read."""
        num_guesses = min(most_settled, self.most) - 1 + (self.most - length)
        if num_guesses <= 0:
            return
        newest_A = self.num_known_B[samples_A] + length - 1
        cells = guessed_cells(self.config, window_size=self.window_size, num_windows=num_guesses)
        guesses_AGK = self._draw(last_AKV, cells, samples_A, newest_A)
        self.windows_BTK[samples_A[:, None], positions_from(newest_A + 1, num_guesses)] = guesses_AGK
