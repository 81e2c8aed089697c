"""Blocks as the engine may run them: activations computed again, or compiled, without another result or other names."""

import pytest
import torch
from torch import Tensor

from training.config import ModelConfig
from training.tensorar import TensorAR, build_model

CONFIG = ModelConfig(
    num_layers=3,
    num_heads=2,
    model_dim=16,
    codebook_size=12,
    codes_per_side=3,
    num_classes=4,
    window_size=2,
    dropout=0.3,
)


def loss_and_gradients(model: TensorAR) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    windows, labels = torch.randint(12, (2, 9, 2)), torch.randint(5, (2,))
    loss = (model(windows, labels).float() * torch.randn(2, 9, 2, 12)).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def model_of(*, recomputes_activations: bool) -> TensorAR:
    torch.manual_seed(0)
    model = build_model(CONFIG)
    torch.nn.init.normal_(model.base.output.weight)
    model.base.recomputes_activations = recomputes_activations
    return model


def test_recomputed_activations_give_the_same_bits_with_dropout() -> None:
    loss, gradients = loss_and_gradients(model_of(recomputes_activations=False))
    again, gradients_again = loss_and_gradients(model_of(recomputes_activations=True))
    assert torch.equal(loss, again)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_recomputed_activations_are_not_kept() -> None:
    sizes = []
    for recomputes_activations in (False, True):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            model = model_of(recomputes_activations=recomputes_activations)
            model.base.backbone(torch.randn(2, 9, 16)).sum()
        sizes.append(sum(kept))
    assert sizes[1] < 0.2 * sizes[0]


@pytest.mark.slow
def test_compiled_blocks_keep_their_names_and_their_losses() -> None:
    plain, compiled = model_of(recomputes_activations=False).eval(), model_of(recomputes_activations=False).eval()
    for block in compiled.base.layers:
        block.compile(mode="default")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    (loss, gradients), (other, others) = loss_and_gradients(plain), loss_and_gradients(compiled)
    torch.testing.assert_close(other, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-4, rtol=1e-4)
