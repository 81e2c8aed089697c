"""Model FLOPs of a training step, for MFU: what forward and backward of one sample cost by the model's shape alone.

Counted are the matrix products, two FLOPs per multiply-add, backward twice the forward. Attention counts its full
square, causal or not, as the published MFU figures do. Not counted is what a run adds on top: activations computed
again, the extra forward of own drafts, the optimiser, and everything elementwise (norms, rotary pairs, softmax).
"""

from __future__ import annotations

from training.config import ModelConfig
from training.gpt import feed_forward_dim
from training.scored import scored_of_offset
from training.tensorar import module_hidden_dim

_FLOPS_PER_MULTIPLY_ADD = 2
_FORWARD_AND_BACKWARD = 3


def model_flops_per_sample(config: ModelConfig, *, micro_batch_size: int, scored_stride: int = 1) -> float:
    """Return the FLOPs of forward and backward of one sample.

    Args:
        config: of the model.
        micro_batch_size: samples per forward; the products that a whole micro batch shares are dealt out over them.
        scored_stride: `noise.scored_stride` of the run: what is not scored is not computed.
    """
    num_scored = sum(scored_of_offset(config.num_positions, window_size=config.window_size, stride=scored_stride))
    shared = _encoder_shared(config, micro_batch_size) + _decoder_shared(config)
    multiply_adds = _backbone(config) + _encoder(config, micro_batch_size) + _decoder(config, num_scored)
    multiply_adds += num_scored * config.dim * config.codebook_size + shared / micro_batch_size
    return _FORWARD_AND_BACKWARD * _FLOPS_PER_MULTIPLY_ADD * multiply_adds


def _backbone(config: ModelConfig) -> float:
    """Multiply-adds of a sample's forward through all blocks; the condition stands in for the code that is not fed."""
    length, dim = config.num_positions, config.dim
    projections = 4 * dim * dim + 3 * dim * feed_forward_dim(dim)
    attention = 2 * length * dim
    return float(config.layers * length * (projections + attention))


def _encoder(config: ModelConfig, micro_batch_size: int) -> float:
    """Multiply-adds of a sample in the input encoder, keys and values too where they are not tables."""
    if config.window_size == 1:
        return 0.0
    dim, num_windows = config.dim, config.num_positions - 1
    per_window = dim * dim + 3 * dim * module_hidden_dim(config)
    if not _has_tables(config, micro_batch_size):
        per_window += config.window_size * dim * (dim + config.heads)
    return float(num_windows * per_window)


def _encoder_shared(config: ModelConfig, micro_batch_size: int) -> float:
    """Multiply-adds of a micro batch in the input encoder: its one query, and the tables of (code, offset)."""
    if config.window_size == 1:
        return 0.0
    query = 2 * config.dim * config.dim
    num_pairs = config.codebook_size * config.window_size if _has_tables(config, micro_batch_size) else 0
    return float(query + num_pairs * config.dim * (config.dim + config.heads))


def _has_tables(config: ModelConfig, micro_batch_size: int) -> bool:
    return config.codebook_size < micro_batch_size * (config.num_positions - 1)


def _decoder(config: ModelConfig, num_scored: int) -> float:
    if config.window_size == 1:
        return 0.0
    dim = config.dim
    per_state = dim * dim + dim * config.window_size * config.heads
    per_prediction = dim * dim + 3 * dim * module_hidden_dim(config)
    return float(config.num_positions * per_state + num_scored * per_prediction)


def _decoder_shared(config: ModelConfig) -> float:
    """Multiply-adds of a micro batch in the output decoder: its queries, their keys, values and attention."""
    if config.window_size == 1:
        return 0.0
    dim, window_size = config.dim, config.window_size
    return float(window_size * (3 * dim * dim + window_size * dim * (config.heads + 1)))
