"""The loss of windows against a loop over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.loss import reference_window_loss


def _brute_force(logits: Tensor, codes: Tensor) -> tuple[list[float], list[float]]:
    batch, positions, window_size, _ = logits.shape
    losses, accuracies = [], []
    for offset in range(window_size):
        terms, hits = [], []
        for image in range(batch):
            for position in range(positions - offset):
                scores = logits[image, position, offset].double()
                target = int(codes[image, position + offset])
                terms.append(math.log(scores.exp().sum().item()) - scores[target].item())
                hits.append(int(scores.argmax()) == target)
        losses.append(sum(terms) / len(terms))
        accuracies.append(sum(hits) / len(hits))
    return losses, accuracies


@pytest.mark.parametrize("weights", [None, (1.0, 0.1, 0.1), (2.0, 0.0, 0.0)])
def test_loss_is_the_weighted_mean_over_valid_targets(weights: tuple[float, ...] | None) -> None:
    torch.manual_seed(0)
    logits, codes = torch.randn(3, 6, 3, 5), torch.randint(0, 5, (3, 6))
    losses, accuracies = _brute_force(logits, codes)
    result = reference_window_loss(logits, codes, offset_weights=weights)
    assert result.loss_of_offset_K.tolist() == pytest.approx(losses, rel=1e-5)
    assert result.accuracy_of_offset_K.tolist() == pytest.approx(accuracies)
    shares = [1 / 3] * 3 if weights is None else [weight / sum(weights) for weight in weights]
    expected = sum(share * loss for share, loss in zip(shares, losses, strict=True))
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)


def test_targets_beyond_the_image_get_no_gradient() -> None:
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    reference_window_loss(logits, torch.randint(0, 5, (2, 4))).loss.backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum((0, 3)) > 0
    assert touched.tolist() == [[True, True, True], [True, True, True], [True, True, False], [True, False, False]]


def test_loss_is_float32_whatever_the_logits_are() -> None:
    codes = torch.randint(0, 5, (2, 4))
    result = reference_window_loss(torch.zeros(2, 4, 2, 5, dtype=torch.bfloat16), codes)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0)])
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="offset_weights must be 2 weights of positive sum"):
        reference_window_loss(torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, dtype=torch.int64), offset_weights=weights)
