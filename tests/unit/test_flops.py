"""The FLOPs that MFU is made of, against what torch counts in the same step."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from training.config import ModelConfig
from training.cross_entropy import chunked_cross_entropy
from training.flops import model_flops_per_sample
from training.loss import window_loss
from training.scored import score_predictions
from training.tensorar import build_model

SHAPE = {"num_layers": 3, "num_heads": 4, "model_dim": 64, "codes_per_side": 6, "num_classes": 10}


def counted(config: ModelConfig, *, micro_batch_size: int, stride: int) -> float:
    """FLOPs per sample by torch's count, in bfloat16: there attention is plain products, which it sees on a CPU.

    Torch does not look into the op that the head's loss is, whose products are counted beside it.
    """
    model = build_model(config).to(torch.bfloat16)
    codes_BT = torch.randint(config.codebook_size, (micro_batch_size, config.num_positions))
    windows_BTK = torch.randint(config.codebook_size, (*codes_BT.shape, config.window_size))
    labels_B = torch.zeros(micro_batch_size, dtype=torch.int64)
    scored = score_predictions(codes_BT, window_size=config.window_size, stride=stride)
    rows = torch.zeros(scored.targets_BR.numel(), config.dim, dtype=torch.bfloat16)
    zeros = torch.zeros(len(rows))
    with FlopCounterMode(display=False) as counter:
        window_loss(model, windows_BTK, labels_B, scored=scored).loss.backward()
        chunked_cross_entropy(rows, model.base.output.weight.detach(), zeros.long(), zeros, 10**5, True, True)
    return counter.get_total_flops() / micro_batch_size


@pytest.mark.parametrize(
    ("fields", "micro_batch_size", "stride"),
    [
        ({"window_size": 1, "codebook_size": 128}, 4, 1),
        ({"window_size": 4, "codebook_size": 100}, 4, 1),  # keys and values of the input encoder are tables
        ({"window_size": 4, "codebook_size": 100}, 2, 1),  # and here they are not
        ({"window_size": 3, "codebook_size": 512, "module_ffn_ratio": 1.0}, 3, 1),
        ({"window_size": 4, "codebook_size": 100}, 4, 5),
    ],
)
def test_flops_of_a_step_are_those_that_torch_counts(
    fields: dict[str, Any], micro_batch_size: int, stride: int
) -> None:
    config = ModelConfig(**SHAPE, **fields)
    expected = counted(config, micro_batch_size=micro_batch_size, stride=stride)
    # To the last product; in float32 on a CPU torch would see no attention, and count that of a fused kernel's backward
    # two and a half times the forward, for the scores that it computes again.
    flops = model_flops_per_sample(config, micro_batch_size=micro_batch_size, scored_stride=stride)
    assert flops == pytest.approx(expected, rel=1e-9)


def test_flops_of_a_wide_model_are_six_per_parameter_and_code() -> None:
    config = ModelConfig(size="3B", codebook_size=16384, num_classes=1000)
    products = 24 * (4 * 3200**2 + 3 * 3200 * 8704) + 3200 * 16384
    attention = 24 * 2 * 256 * 3200
    assert model_flops_per_sample(config, micro_batch_size=8) == 6 * 256 * (products + attention)
