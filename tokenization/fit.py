"""Fit a small VQ tokenizer to a folder of images: `kind: fit_tokenizer`.

First a plain autoencoder, then a k-means codebook on its vectors, then both together; unused entries are restarted.
Step n is a function of (config, images, state after step n - 1): batches, flips and restarts are drawn from
(seed, step), so a killed fit that is run again ends in the same weights. A 64 px tokenizer takes about half an hour on
two CPU cores.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenization.codebook import draw_vectors, spherical_kmeans
from tokenization.config import FitTokenizerConfig
from tokenization.fit_checkpoint import CHECKPOINTS, load_newest_checkpoint, save_checkpoint
from tokenization.fit_images import load_images
from tokenization.fit_output import WEIGHTS_NAME, cut_metrics, stored_weights, write_fit, write_metrics, written_step
from tokenization.pixels import to_network_range
from tokenization.reconstruction import EVALUATION_BATCH, Evaluation, evaluate_reconstruction, reconstruction_loss
from tokenization.vq import VQNetwork
from tokenization.weights_file import HISTORY_KEY, read_weights, resolve_weights

log = logging.getLogger(__name__)

ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 100
KMEANS_IMAGES = 1024
KMEANS_ROUNDS = 20
RESTART_EVERY_N_STEPS = 50
LOG_EVERY_N_STEPS = 50
RESTARTS_END_AT = 0.8
STREAMS = {"init": 0, "order": 1, "batch": 2, "kmeans": 3, "restart": 4}
"""Numbers that keep the draws of different purposes apart."""


def fit_tokenizer(config: FitTokenizerConfig) -> Path:
    """Return the weights file of a tokenizer fitted to a folder of images; run again, it goes on where it stopped.

    `run_dir/tokenizer.safetensors` is there, usable, from the first checkpoint on after the codebook is fitted, and
    improves with each.

    Raises:
        ValueError: a folder holds no usable image, run_dir holds a fit with another config, or all its checkpoints are
            damaged.
        FloatingPointError: the fit diverges; weights and checkpoints stay as they were before.
    """
    run_dir = Path(config.run_dir).expanduser()
    if written_step(run_dir, config=config) == config.num_steps:
        return run_dir / WEIGHTS_NAME
    train_NHWC = load_images(config.images, size_px=config.image_size_px)
    validation_NHWC = load_images(config.validation_images, size_px=config.image_size_px)
    fit = Fit(config, train_NHWC)
    directory, images_sha256 = run_dir / CHECKPOINTS, hashlib.sha256(train_NHWC.data).hexdigest()
    checkpoint = load_newest_checkpoint(directory, config=config, images_sha256=images_sha256)
    if checkpoint is not None:
        fit.resume(*checkpoint)
    cut_metrics(run_dir, step=fit.step)
    log.info("event=fit_begin step=%d num_steps=%d images=%d", fit.step, config.num_steps, len(train_NHWC))
    begin_s = time.monotonic()
    while fit.step < config.num_steps:
        losses = fit.take_step()
        if fit.step % LOG_EVERY_N_STEPS == 0:
            log.info("event=fit_step step=%d elapsed_s=%.1f %s", fit.step, time.monotonic() - begin_s, _listed(losses))
        if fit.step % config.checkpoint_every_n_steps == 0 or fit.step == config.num_steps:
            export = None
            if fit.has_codebook:
                export = _export_of(fit, train_NHWC=train_NHWC, validation_NHWC=validation_NHWC)
            # The line first: a line without its checkpoint is cut off by the next run, but none would be written later.
            held_out = None if export is None else export["held_out"]
            line = _line_of(fit, losses, evaluation=held_out, elapsed_s=time.monotonic() - begin_s)
            write_metrics(run_dir, line)
            if export is not None:
                write_fit(run_dir, **export)
            save_checkpoint(directory, step=fit.step, state=fit.state(), config=config, images_sha256=images_sha256)
            told = {name: value for name, value in line.items() if value is not None}
            log.info("event=fit_checkpoint %s", _listed(told))
    if written_step(run_dir, config=config) != config.num_steps:
        write_fit(run_dir, **_export_of(fit, train_NHWC=train_NHWC, validation_NHWC=validation_NHWC))
    return run_dir / WEIGHTS_NAME


class Fit:
    """The state of one fit and the step that moves it; nothing else in it changes."""

    def __init__(self, config: FitTokenizerConfig, train_NHWC: np.ndarray) -> None:
        self.config = config
        self.train_NHWC = train_NHWC
        self.step = 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(_seed(config, "init"))
        self.network = VQNetwork(config.network).to(self.device)
        if config.warm_start is not None:
            _warm_start(self.network, config.warm_start)
        self.average = VQNetwork(config.network).to(self.device).requires_grad_(False)
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = _optimizer(self.network, learning_rate=config.learning_rate)

    @property
    def uses_codebook(self) -> bool:
        """Whether the next step quantises."""
        return self.step >= self.config.autoencoder_steps

    @property
    def has_codebook(self) -> bool:
        """Whether a step has quantised, so that the codebook is no longer its random start."""
        return self.step > self.config.autoencoder_steps

    def take_step(self) -> dict[str, float]:
        """Do one optimiser step and return its losses.

        Raises:
            FloatingPointError: loss or gradient are not finite; no weight has changed.
        """
        if self.step == self.config.autoencoder_steps and self.config.warm_start is None:
            self._initialize_codebook()
        images_BCHW = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, config=self.config)
        self.network.train()
        losses = self._losses(images_BCHW)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(list(losses.values())).sum()
        torch.autograd.backward(loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
        self._check_finite({"loss": loss, "gradient norm": grad_norm})
        self.optimizer.step()
        self.step += 1
        self._average_weights()
        if self._may_restart_codes():
            self._restart_unused_codes(images_BCHW)
        return {name: float(value.detach()) for name, value in losses.items()}

    def state(self) -> dict[str, Tensor]:
        """Return everything that a resumption needs, by name."""
        state = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        state |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{moment}.{name}"] = value
        return state

    def resume(self, step: int, state: dict[str, Tensor]) -> None:
        """Take up the state that `state()` returned after `step` steps."""
        self.step = step
        self.network.load_state_dict(_with_prefix(state, "network."))
        self.average.load_state_dict(_with_prefix(state, "average."))
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            moments = _with_prefix(state, f"optimizer.{moment}.")
            for name, parameter in self.network.named_parameters():
                if name in moments:
                    device = "cpu" if moment == "step" else self.device
                    self.optimizer.state[parameter][moment] = moments[name].to(device)

    def _check_finite(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if not value.isfinite():
                raise FloatingPointError(
                    f"fit step {self.step + 1}: the {name} must be finite, got {value.item()}; lower learning_rate in "
                    "a new run_dir"
                )

    def _batch(self) -> Tensor:
        order = batch_positions(
            self.step, batch_size=self.config.batch_size, num_images=len(self.train_NHWC), seed=self.config.seed
        )
        images_BCHW = to_network_range(self.train_NHWC[order], device=self.device)
        flips_B = torch.rand(len(order), generator=self._generator("batch")) < 0.5
        flips_B111 = flips_B.view(-1, 1, 1, 1).to(self.device)
        return torch.where(flips_B111, images_BCHW.flip(3), images_BCHW)

    def _losses(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        with autocast(self.device):
            if not self.uses_codebook:
                vectors_BDHW = F.normalize(self.network.pre_quantize(images_BCHW).float(), dim=1)
                return {"reconstruction": self._error(self.network.decode_vectors(vectors_BDHW), images_BCHW)}
            output = self.network(images_BCHW, commitment_weight=self.config.commitment_weight)
        self.network.quantize.remember(output.quantized.codes_BHW)
        return {
            "reconstruction": self._error(output.reconstruction_BCHW, images_BCHW),
            "codebook": output.quantized.codebook_loss,
            "commitment": output.quantized.commitment_loss,
        }

    def _error(self, reconstruction_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        weights = {"gradient_weight": self.config.gradient_weight, "squared_weight": self.config.squared_weight}
        return reconstruction_loss(reconstruction_BCHW, images_BCHW, **weights)

    @torch.no_grad()
    def _unit_vectors(self, images_NHWC: np.ndarray) -> Tensor:
        parts = []
        for begin in range(0, len(images_NHWC), EVALUATION_BATCH):
            images_BCHW = to_network_range(images_NHWC[begin : begin + EVALUATION_BATCH], device=self.device)
            with autocast(self.device):
                vectors_BDHW = self.network.pre_quantize(images_BCHW)
            parts.append(F.normalize(vectors_BDHW.float().permute(0, 2, 3, 1).flatten(0, 2), dim=-1))
        return torch.cat(parts)

    @torch.no_grad()
    def _initialize_codebook(self) -> None:
        generator = self._generator("kmeans")
        chosen = torch.randperm(len(self.train_NHWC), generator=generator)[:KMEANS_IMAGES].numpy()
        vectors_ND, num_entries = self._unit_vectors(self.train_NHWC[chosen]), self.config.network.codebook_size
        if len(vectors_ND) < num_entries:
            log.warning(
                "event=few_vectors vectors=%d codebook_size=%d next=use more images or a smaller network.codebook_size",
                len(vectors_ND),
                num_entries,
            )
        log.info("event=kmeans_begin vectors=%d codebook_size=%d", len(vectors_ND), num_entries)
        begin_s = time.monotonic()
        centers_VD = spherical_kmeans(
            vectors_ND, num_clusters=num_entries, num_rounds=KMEANS_ROUNDS, generator=generator
        )
        log.info("event=kmeans_end elapsed_s=%.1f", time.monotonic() - begin_s)
        self.network.quantize.embedding.weight.copy_(centers_VD)
        self.average.quantize.embedding.weight.copy_(centers_VD)

    @torch.no_grad()
    def _average_weights(self) -> None:
        # Early steps count more, or the average would remember the random start for a long time.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)

    def _may_restart_codes(self) -> bool:
        # A whole interval of quantised steps must have passed, or the history would call every entry unused.
        is_due = self.step % RESTART_EVERY_N_STEPS == 0
        first_step = self.config.autoencoder_steps + RESTART_EVERY_N_STEPS
        return is_due and first_step <= self.step <= RESTARTS_END_AT * self.config.num_steps

    @torch.no_grad()
    def _restart_unused_codes(self, images_BCHW: Tensor) -> None:
        is_unused_V = torch.ones(self.config.network.codebook_size, dtype=torch.bool, device=self.device)
        is_unused_V[self.network.quantize.used_codes()] = False
        with autocast(self.device):
            vectors_BDHW = self.network.pre_quantize(images_BCHW)
        vectors_ND = F.normalize(vectors_BDHW.float().permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
        drawn = draw_vectors(vectors_ND, count=int(is_unused_V.sum()), generator=self._generator("restart"))
        table = self.network.quantize.embedding.weight
        table[is_unused_V] = drawn
        self.average.quantize.embedding.weight[is_unused_V] = drawn
        for moment in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[table][moment][is_unused_V] = 0.0

    def _generator(self, stream: str) -> torch.Generator:
        return torch.Generator().manual_seed(_seed(self.config, stream, self.step))


def _warm_start(network: VQNetwork, path: str) -> None:
    weights = read_weights(resolve_weights(path), network=network.config)
    network.load_state_dict({**weights.state, HISTORY_KEY: network.quantize.codebook_used})


def batch_positions(step: int, *, batch_size: int, num_images: int, seed: int) -> np.ndarray:
    """Return the positions of the images of a step: every image once an epoch, a batch may straddle two; int64 (B,)."""
    begin = step * batch_size
    first_epoch, last_epoch = begin // num_images, (begin + batch_size - 1) // num_images
    orders = [
        np.random.default_rng((seed, STREAMS["order"], epoch)).permutation(num_images)
        for epoch in range(first_epoch, last_epoch + 1)
    ]
    offset_in_epoch = begin - first_epoch * num_images
    return np.concatenate(orders)[offset_in_epoch : offset_in_epoch + batch_size]


def learning_rate_at(step: int, *, config: FitTokenizerConfig) -> float:
    """Return the learning rate of a step (counted from 0): linear warm-up over 100 steps, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


def autocast(device: torch.device) -> torch.autocast:
    """Return bfloat16 autocast where the device multiplies bfloat16 natively, else one that does nothing."""
    is_native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_native)


def _export_of(fit: Fit, *, train_NHWC: np.ndarray, validation_NHWC: np.ndarray) -> dict[str, Any]:
    """Return what `write_fit` is to write; measured is what is stored, the averaged weights rounded to float16."""
    config = fit.config
    state = stored_weights(fit.average.state_dict(), step=fit.step)
    stored = VQNetwork(config.network).to(fit.device)
    stored.load_state_dict(state)
    sample_NHWC = train_NHWC[:: max(1, len(train_NHWC) // KMEANS_IMAGES)]
    return {
        "state": state,
        "config": config,
        "step": fit.step,
        "held_out": evaluate_reconstruction(stored, validation_NHWC),
        "num_held_out": len(validation_NHWC),
        "num_train_codes_used": evaluate_reconstruction(stored, sample_NHWC).num_codes_used,
    }


def _line_of(fit: Fit, losses: dict[str, float], *, evaluation: Evaluation | None, elapsed_s: float) -> dict[str, Any]:
    return {
        "step": fit.step,
        **{f"{name}_loss": round(value, 5) for name, value in losses.items()},
        "held_out_psnr_db": None if evaluation is None else round(evaluation.psnr_db, 3),
        "held_out_codes_used": None if evaluation is None else evaluation.num_codes_used,
        "elapsed_s": round(elapsed_s, 1),
    }


def _listed(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.5g}" for name, value in values.items())


def _optimizer(network: VQNetwork, *, learning_rate: float) -> torch.optim.AdamW:
    table = network.quantize.embedding.weight
    decayed = [value for value in network.parameters() if value.ndim >= 2 and value is not table]
    others = [value for value in network.parameters() if value.ndim < 2 or value is table]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=ADAM_BETAS)


def _seed(config: FitTokenizerConfig, stream: str, step: int = 0) -> int:
    return int(np.random.SeedSequence((config.seed, STREAMS[stream], step)).generate_state(1, np.uint64)[0] >> 1)


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
