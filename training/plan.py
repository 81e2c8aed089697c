"""What a training run takes: memory per rank for every ZeRO stage, work per step, bytes on disk; by the shape alone.

Pure functions of the config; nothing is built. Tensors are counted, not allocated: parameters in closed form, and what
DeepSpeed and autograd keep beside them as this version of both was seen to do. The peak is the largest of three
moments: the loss (all activations), backward, the optimiser's step. Within 15 % of measured (docs/results.md).

P parameters, W world size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.config import CheckpointConfig, ModelConfig, TrainConfig
from training.cross_entropy import ACCELERATOR_CHUNK_BYTES, CPU_CHUNK_BYTES
from training.engine import BUCKET_ELEMENTS
from training.gpt import feed_forward_dim
from training.scored import scored_of_offset
from training.tensorar import has_tables, module_hidden_dim, num_added_parameters

Device = Literal["cpu", "cuda"]
ZERO_STAGES = (0, 1, 2, 3)
PROCESS_BYTES: dict[Device, int] = {"cpu": 510 * 10**6, "cuda": 800 * 10**6}
"""A rank before there is a model: resident memory with everything imported (measured), or CUDA's context and libraries
(an estimate)."""
STAGE_3_BYTES = 90 * 10**6
"""Beside its buckets, what ZeRO-3 was seen to hold whatever the model's size."""
LIVE_ELEMENTS = 10**9
"""Parameters that ZeRO-3 keeps gathered at most (DeepSpeed's default)."""
HEAP_BYTES_PER_PARAMETER = {0: 2.5, 1: 2.5, 2: 2.5, 3: 5.0}
"""What malloc keeps of freed tensors below 32 MiB, per parameter in such tensors (CPU, measured)."""
HEAP_SHARE_OF_ACTIVATIONS = 0.25
"""What malloc keeps beside activations, over them (CPU, measured: 0 to 0.45)."""
MMAP_BYTES = 32 * 2**20
"""Larger tensors are mapped by themselves, and given back when they are freed."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    process: int
    """Without a model."""
    weights: int
    """In the arithmetic's dtype."""
    float32_weights: int
    """Those that the optimiser steps, beside them."""
    moments: int
    """Adam's two."""
    average: int
    """The EMA."""
    gradients: int
    """Kept from backward to the step."""
    buckets: int
    """Of communication."""
    heap: int
    """Freed, but kept by the allocator (CPU)."""
    checkpoint_copy: int
    """In host memory, while a checkpoint is written in the background."""
    activations: int
    """Kept for backward, at the loss."""
    loss: int
    """A chunk of logits, and the gradients that the loss makes at once."""
    backward_work: int
    """In backward: gathered weights, a recomputed block, flat buffers."""
    step_work: int
    """In the optimiser's step: flat and float32 gradients."""
    is_copy_on_device: bool
    """Whether the checkpoint's copy counts in the same memory (CPU)."""

    @property
    def lasting(self) -> int:
        """Bytes that are there at any moment after the first step."""
        copy = self.checkpoint_copy if self.is_copy_on_device else 0
        states = self.weights + self.float32_weights + self.moments + self.average
        return self.process + states + self.gradients + self.buckets + self.heap + copy

    @property
    def peak(self) -> int:
        """The largest of the moments: the loss, backward, the optimiser's step."""
        return self.lasting + max(self.activations + self.loss, self.backward_work, self.step_work)


def num_parameters(config: ModelConfig) -> int:
    """Return the parameters of the base model and the TensorAR modules, in closed form."""
    dim = config.dim
    block = 4 * dim * dim + 3 * dim * feed_forward_dim(dim) + 2 * dim
    tables = (config.num_classes + 1 + 2 * config.codebook_size) * dim
    return config.layers * block + tables + dim + num_added_parameters(config)


def checkpoint_bytes(config: TrainConfig) -> int:
    """Return the bytes of one checkpoint: float32 weights, both moments and the average if there is one."""
    kinds = 3 if config.optimizer.ema_decay is None else 4
    return 4 * kinds * num_parameters(config.model)


def kept_checkpoints(config: CheckpointConfig, *, num_steps: int) -> tuple[int, ...]:
    """Return the steps whose checkpoints are there once a run has taken `num_steps`; at no step before there are more.

    Not counted: the one that is being written, before the one that it replaces goes.
    """
    saved = sorted({*range(config.every_n_steps, num_steps + 1, config.every_n_steps), num_steps})
    kept = set(saved[-config.keep_latest :])
    if config.keep_every_n_steps is not None:
        kept.update(range(config.keep_every_n_steps, num_steps + 1, config.keep_every_n_steps))
    return tuple(sorted(kept))


def estimate_memory(
    config: TrainConfig, *, world_size: int, zero_stage: int, device: Device, has_heap: bool = True
) -> Memory:
    """Return what one rank takes.

    Args:
        config: of the run; its own `engine.zero_stage` is not looked at.
        world_size: ranks.
        zero_stage: 0 to 3.
        device: `cuda` leaves out what offloading moves to the host.
        has_heap: whether malloc keeps what is freed (CPU); not with MALLOC_MMAP_THRESHOLD_ set.

    Raises:
        ValueError: the global batch does not divide over the ranks.
    """
    engine, num_all = config.engine, num_parameters(config.model)
    is_cpu, width = device == "cpu", _width(config)
    samples = engine.samples_per_micro_step(world_size)
    num_own = num_all // world_size if zero_stage >= 1 else num_all
    num_weights = num_own if zero_stage == 3 else num_all
    is_accumulated = engine.grad_accumulation(world_size) > 1
    num_gradients = num_all if zero_stage == 0 or (zero_stage == 1 and is_accumulated) else num_own
    num_states = 0 if engine.offload_optimizer and zero_stage >= 1 and not is_cpu else num_own
    average = 0 if config.optimizer.ema_decay is None else 4
    # In float32 only plain data parallelism steps on the weights themselves.
    float32_weights = 0 if zero_stage == 0 and width == 4 else 4
    bucket = min(BUCKET_ELEMENTS, num_all) * width
    gathered = min(LIVE_ELEMENTS, num_all) * width if zero_stage == 3 and world_size > 1 else 0
    block = samples * _block_bytes(config, device=device) if engine.activation_checkpointing else 0
    return Memory(
        process=PROCESS_BYTES[device],
        weights=num_weights * width,
        float32_weights=num_states * float32_weights,
        moments=num_states * 8,
        average=num_states * average,
        gradients=num_gradients * width,
        buckets=_lasting_buckets(bucket, zero_stage=zero_stage, is_cpu=is_cpu),
        heap=_heap_bytes(config, samples=samples, zero_stage=zero_stage) if is_cpu and has_heap else 0,
        checkpoint_copy=num_own * (12 + average) * config.checkpoint.background,
        activations=gathered + samples * kept_bytes(config, device=device),
        loss=loss_bytes(config, samples=samples, device=device),
        backward_work=block + gathered + (num_all * width if zero_stage == 0 else bucket),
        step_work=num_states * _step_bytes(zero_stage, width=width),
        is_copy_on_device=is_cpu,
    )


def kept_bytes(config: TrainConfig, *, device: Device) -> int:
    """Return the bytes per sample that autograd keeps from forward to backward, but for the loss's own."""
    model, width = config.model, _width(config)
    tokens, window, dim, num_scored = model.num_positions, model.window_size, model.dim, _num_scored(config)
    of_block = width * dim * tokens if config.engine.activation_checkpointing else _block_bytes(config, device=device)
    total = model.layers * of_block + num_scored * _norm_bytes(config)
    if window > 1:
        hidden = module_hidden_dim(model)
        encoder = _mixing_bytes(config) + width * dim + _norm_bytes(config) + 4 * width * hidden
        decoder = _norm_bytes(config) + width * dim
        total += tokens * (encoder + decoder)
        total += num_scored * (2 * width * dim + _norm_bytes(config) + 4 * width * hidden)
    return total


def loss_bytes(config: TrainConfig, *, samples: int, device: Device) -> int:
    """Return the bytes that the loss of a micro batch takes at its end: one chunk, the gradients of states and head.

    The head's gradient is summed in float32, in bfloat16 beside each chunk's product.
    """
    model, width = config.model, _width(config)
    num_rows = samples * _num_scored(config)
    logits = num_rows * model.codebook_size * (width + 4)
    chunk = min(logits, CPU_CHUNK_BYTES if device == "cpu" else ACCELERATOR_CHUNK_BYTES)
    head = model.codebook_size * model.dim * (4 if width == 4 else 6)
    return chunk + num_rows * model.dim * width + head


def _num_scored(config: TrainConfig) -> int:
    """Predictions of a sample that enter the loss."""
    model = config.model
    stride = config.noise.scored_stride
    return sum(scored_of_offset(model.num_positions, window_size=model.window_size, stride=stride))


def _mixing_bytes(config: TrainConfig) -> int:
    """Bytes per window that the input encoder's attention keeps beside its result (`training.mixing`)."""
    model, width = config.model, _width(config)
    samples = config.engine.micro_batch_size or config.engine.global_batch_size
    if has_tables(codebook_size=model.codebook_size, num_windows=samples * (model.num_positions - 1)):
        return model.window_size * width * model.dim  # values of every offset
    if config.engine.ops == "native":
        return 0  # made again
    return (8 * model.window_size + width * model.heads) * model.dim  # embeddings, keys in float32; mixed


def _block_bytes(config: TrainConfig, *, device: Device) -> int:
    """Bytes per sample that one block keeps: two norms, q, k, v, attention, feed-forward, dropout's draws."""
    model, width = config.model, _width(config)
    tokens, dim = model.num_positions, model.dim
    # Plain products keep the scores; the fused kernel keeps its output and a float per head.
    has_scores = device == "cpu" and width == 2
    attention = width * model.heads * tokens if has_scores else width * dim + 4 * model.heads
    dropout = 2 * width * dim if model.dropout else 0
    feed_forward = 4 * width * feed_forward_dim(dim)
    return tokens * (2 * _norm_bytes(config) + 4 * width * dim + attention + feed_forward + dropout)


def _norm_bytes(config: TrainConfig) -> int:
    """Bytes per state that a norm keeps: its input in float32, the normalised one and its output."""
    return (4 + 2 * _width(config)) * config.model.dim


def _lasting_buckets(bucket: int, *, zero_stage: int, is_cpu: bool) -> int:
    if zero_stage == 0:
        return 0
    num_buffers = 1 if is_cpu else 2  # overlapped communication fills one while the other is sent
    return num_buffers * bucket + (STAGE_3_BYTES if zero_stage == 3 else 0)


def _step_bytes(zero_stage: int, *, width: int) -> int:
    """Bytes per stepped parameter: gradients as one flat tensor and, where they are not, in float32."""
    in_float32 = 4 if width == 2 else 0
    return in_float32 if zero_stage == 0 else in_float32 + width


def _heap_bytes(config: TrainConfig, *, samples: int, zero_stage: int) -> int:
    of_parameters = HEAP_BYTES_PER_PARAMETER[zero_stage] * _num_on_heap(config.model)
    return int(of_parameters + HEAP_SHARE_OF_ACTIVATIONS * samples * kept_bytes(config, device="cpu"))


def _num_on_heap(config: ModelConfig) -> int:
    """Parameters in tensors that are too small, in float32, to be mapped by themselves."""
    dim, hidden = config.dim, feed_forward_dim(config.dim)
    sizes = [3 * dim * dim, dim * dim, *(3 * [dim * hidden])] * config.layers
    sizes += [config.codebook_size * dim] * 2 + [(config.num_classes + 1) * dim]
    sizes += [dim * dim] * 8 * (config.window_size > 1)
    return sum(size for size in sizes if 4 * size < MMAP_BYTES)


def _width(config: TrainConfig) -> int:
    return 2 if config.engine.dtype == "bfloat16" else 4
