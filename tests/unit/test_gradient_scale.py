"""Scaled gradients of offsets >= 1: the same bits forward, and back the sums that the scale stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.config import ModelConfig
from training.gradient_scale import scale_gradient
from training.loss import WindowLoss, window_loss
from training.scored import score_predictions
from training.tensorar import TensorAR, build_model

V, T, K = 11, 9, 3


def trained_like(dtype: torch.dtype) -> TensorAR:
    """A model none of whose weights is zero, without dropout."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=2,
        num_heads=2,
        model_dim=16,
        codebook_size=V,
        codes_per_side=3,
        num_classes=5,
        window_size=K,
        dropout=0.0,
    )
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.to(dtype)


def measure(
    model: TensorAR, *, weights: tuple[float, ...], scale: float = 1.0, stride: int = 1
) -> tuple[WindowLoss, dict[str, Tensor]]:
    """The loss of a fixed batch and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(V, (4, T), generator=generator)
    windows = torch.randint(V, (4, T, K), generator=generator)
    phases = torch.randint(stride, (4, K), generator=generator)
    scored = score_predictions(codes, window_size=K, stride=stride, phases_BK=phases, draft_gradient_scale=scale)
    model.zero_grad(set_to_none=True)
    result = window_loss(model, windows, torch.arange(4), scored=scored, offset_weights=weights)
    result.loss.backward()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_scaled_gradient_is_that_of_each_copy_by_its_scale() -> None:
    x = torch.tensor([2.0, -3.0], requires_grad=True)
    copies = scale_gradient(x, torch.tensor([[1.0], [0.5], [0.0]]))
    assert copies.tolist() == [[2.0, -3.0]] * 3
    (copies * torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0 + 5.0, 2.0 + 10.0]


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_base_learns_offset_0_and_a_share_of_the_rest_and_the_decoder_all(scale: float, stride: int) -> None:
    model = trained_like(torch.float64)
    # Weights are normalised: (1, 0, 0) counts offset 0 by 1, (2, 1, 1) by 1/2 and the others by 1/4 each.
    _, first = measure(model, weights=(1.0, 0.0, 0.0), stride=stride)
    _, whole = measure(model, weights=(2.0, 1.0, 1.0), stride=stride)
    result, got = measure(model, weights=(2.0, 1.0, 1.0), scale=scale, stride=stride)
    assert got.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in got.items():
        of_first = 0.5 * first[name]
        share = 1.0 if name.startswith("output_decoder.") else scale
        wanted = of_first + share * (whole[name] - of_first)
        # The model's norms and gates are float32 inside.
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=2e-6 * float(whole[name].abs().max()), msg=name)
    assert float(result.loss.detach()) > 1.0


def test_at_scale_0_offsets_above_0_do_not_move_the_base_at_all() -> None:
    model = trained_like(torch.float64)
    _, light = measure(model, weights=(1.0, 0.5, 0.5), scale=0.0)
    _, heavy = measure(model, weights=(1.0, 1.5, 1.5), scale=0.0)
    names = [name for name in light if name.startswith("base.")]
    assert len(names) > 10
    for name in names:
        torch.testing.assert_close(light[name], 2 * heavy[name], rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 3])
def test_the_scale_leaves_every_bit_of_the_forward_pass(dtype: torch.dtype, stride: int) -> None:
    model = trained_like(dtype)
    plain, plain_gradients = measure(model, weights=(1.0, 0.3, 0.1), stride=stride)
    scaled, scaled_gradients = measure(model, weights=(1.0, 0.3, 0.1), stride=stride, scale=0.5)
    assert torch.equal(plain.loss, scaled.loss)
    assert torch.equal(plain.loss_of_offset_K, scaled.loss_of_offset_K)
    name = "base.layers.0.attention.wqkv.weight"
    assert not torch.equal(plain_gradients[name], scaled_gradients[name])


def test_recomputed_activations_have_the_same_scaled_gradients() -> None:
    model = trained_like(torch.float32)
    _, plain = measure(model, weights=(1.0, 1.0, 1.0), scale=0.25)
    model.base.recomputes_activations = True
    _, recomputed = measure(model, weights=(1.0, 1.0, 1.0), scale=0.25)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
