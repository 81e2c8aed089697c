"""Model FLOPs of a training step, for MFU: what forward and backward of one sample cost by the model's shape alone.

Counted are the matrix products, two FLOPs per multiply-add, backward twice the forward. Attention counts its full
square, causal or not, as the published MFU figures do. Not counted is what a run adds on top: activations computed
again, the extra forward of own drafts, the optimiser, and everything elementwise (norms, rotary pairs, softmax).
"""

from __future__ import annotations

from dataclasses import dataclass

from training.config import ModelConfig
from training.gpt import feed_forward_dim
from training.scored import scored_of_offset
from training.tensorar import has_tables, module_hidden_dim

FLOPS_PER_MULTIPLY_ADD = 2
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Multiply-adds of one sample's forward, part by part; what a micro batch shares is dealt out over its samples."""

    base_stack: float
    """All blocks; the condition stands in for the code that is not fed."""
    input_encoder: float
    output_decoder: float
    heads: float
    """Of all offsets."""

    @property
    def total(self) -> float:
        """Their sum."""
        return self.base_stack + self.input_encoder + self.output_decoder + self.heads


def model_flops_per_sample(config: ModelConfig, *, micro_batch_size: int, scored_stride: int = 1) -> float:
    """Return the FLOPs of forward and backward of one sample.

    Args:
        config: of the model.
        micro_batch_size: samples per forward; the products that a whole micro batch shares are dealt out over them.
        scored_stride: `noise.scored_stride` of the run: what is not scored is not computed.
    """
    parts = step_parts(config, micro_batch_size=micro_batch_size, scored_stride=scored_stride)
    return FORWARD_AND_BACKWARD * FLOPS_PER_MULTIPLY_ADD * parts.total


def step_parts(config: ModelConfig, *, micro_batch_size: int, scored_stride: int = 1) -> StepParts:
    """Return what the parts of the model cost; the arguments are those of `model_flops_per_sample`."""
    num_scored = sum(scored_of_offset(config.num_positions, window_size=config.window_size, stride=scored_stride))
    has_modules = config.window_size > 1
    return StepParts(
        base_stack=_base_stack(config),
        input_encoder=_encoder(config, micro_batch_size) if has_modules else 0.0,
        output_decoder=_decoder(config, num_scored, micro_batch_size) if has_modules else 0.0,
        heads=float(num_scored * config.dim * config.codebook_size),
    )


def _base_stack(config: ModelConfig) -> float:
    length, dim = config.num_positions, config.dim
    projections = 4 * dim * dim + 3 * dim * feed_forward_dim(dim)
    attention = 2 * length * dim
    return float(config.layers * length * (projections + attention))


def _encoder(config: ModelConfig, micro_batch_size: int) -> float:
    """What every window costs, then what a micro batch does: one query, the tables where there are any."""
    dim, heads, num_windows = config.dim, config.heads, config.num_positions - 1
    per_window = dim * dim + 3 * dim * module_hidden_dim(config)
    shared = 2 * dim * dim
    if has_tables(codebook_size=config.codebook_size, num_windows=micro_batch_size * num_windows):
        shared += (config.codebook_size + config.window_size) * dim * (dim + heads)
    else:
        per_window += dim * dim + 2 * config.window_size * dim * heads
    return num_windows * per_window + shared / micro_batch_size


def _decoder(config: ModelConfig, num_scored: int, micro_batch_size: int) -> float:
    """States and predictions; then what a micro batch shares: the queries, their keys, values and attention."""
    dim, window_size = config.dim, config.window_size
    per_state = dim * dim + dim * window_size * config.heads
    per_prediction = dim * dim + 3 * dim * module_hidden_dim(config)
    shared = window_size * (3 * dim * dim + window_size * dim * (config.heads + 1))
    return config.num_positions * per_state + num_scored * per_prediction + shared / micro_batch_size
