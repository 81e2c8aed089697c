"""Models on a CUDA device: sampler and tokenizer give the CPU's codes, blocks compile, ops pass torch's own checks."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from tokenization.config import TokenizerConfig
from tokenization.tokenizer import Tokenizer
from training.config import ModelConfig, SamplerConfig
from training.gpt import attend
from training.hardware import repeatable_kernels
from training.loss import window_loss
from training.ops import load_ops
from training.sampling import sample_codes
from training.scored import score_predictions
from training.tensorar import TensorAR, build_model

pytestmark = pytest.mark.gpu
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA begins


def _model(window_size: int, *, dtype: torch.dtype, dim: int = 32) -> TensorAR:
    torch.manual_seed(0)
    shape = {
        "num_layers": 2,
        "num_heads": 2,
        "model_dim": dim,
        "codebook_size": 50,
        "codes_per_side": 4,
        "num_classes": 5,
    }
    model = build_model(ModelConfig.model_validate(shape | {"window_size": window_size})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


SAMPLERS: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 2.5, "top_p": 0.95, "draft_policy": "sampled"},
    "interval": {"guidance": 2.5, "guidance_interval": 3, "top_k": 30, "draft_policy": "coupled"},
    "speculation": {"draft_policy": "coupled", "windows_per_call": 4},
    "stride": {"draft_policy": "coupled", "stride": 2},
    "argmax": {"draft_policy": "argmax", "temperature": 0.8},
}


@pytest.mark.parametrize(
    ("window_size", "name"), [(1, "guided"), (1, "speculation"), *((4, name) for name in SAMPLERS)]
)
def test_the_sampler_gives_the_codes_of_the_cpu(window_size: int, name: str) -> None:
    model, labels = _model(window_size, dtype=torch.float64).eval(), torch.tensor([0, 3, 4, 1, 5])
    config = SamplerConfig.model_validate(SAMPLERS[name])
    want = sample_codes(model, labels, config=config, seed=1)
    got = sample_codes(model.cuda(), labels.cuda(), config=config, seed=1)
    assert torch.equal(got.codes_NT.cpu(), want.codes_NT)
    assert torch.equal(got.drafts_NTK.cpu(), want.drafts_NTK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tokenizer_gives_the_codes_of_the_cpu(dtype: Any) -> None:
    config = TokenizerConfig(weights="open-emoji-64", image_size_px=64, dtype=dtype)
    images = (
        np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    )
    cpu, cuda = (Tokenizer.load(config, device=device) for device in ("cpu", "cuda"))
    want, got = cpu.encode(images), cuda.encode(images)
    assert (got != want).mean() <= (0.002 if dtype == "float32" else 0.15)
    decoded = [tokenizer.decode(want).astype(np.int64) for tokenizer in (cpu, cuda)]
    assert np.abs(decoded[0] - decoded[1]).max() <= (2 if dtype == "float32" else 40)
    assert np.array_equal(cuda.encode(images), got)
    assert np.array_equal(cuda.encode(images[:7]), got[:7])  # whatever shares the batch


def test_compiled_blocks_give_the_gradients_of_eager_ones() -> None:
    load_ops()
    model = _model(4, dtype=torch.float32, dim=64).cuda().eval()
    model.use_native_ops()
    codes, labels = torch.randint(50, (8, 16), device="cuda"), torch.randint(5, (8,), device="cuda")
    scored, windows = score_predictions(codes, window_size=4), torch.randint(50, (8, 16, 4), device="cuda")

    def gradients() -> list[torch.Tensor]:
        loss = window_loss(model, windows, labels, scored=scored, ops="native").loss
        return list(torch.autograd.grad(loss, list(model.parameters())))

    eager = gradients()
    for block in model.base.layers:
        block.compile()
    for (name, _), compiled, wanted in zip(model.named_parameters(), gradients(), eager, strict=True):
        assert (compiled - wanted).abs().max() <= 1e-3 * wanted.abs().max(), name


def test_attention_gives_the_same_bits_each_time() -> None:
    device = torch.device("cuda")
    qkv = [torch.randn(16, 20, 256, 64, device=device, requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(qkv[0])

    def gradients() -> tuple[torch.Tensor, ...]:
        with repeatable_kernels(device):
            return torch.autograd.grad(attend(*qkv, causal=True), qkv, grad)

    first = gradients()  # without the context the bits differed within 20 calls on an H100
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_torch_finds_no_fault_in_the_ops() -> None:
    load_ops()
    codes = torch.randint(50, (37, 4), device="cuda")
    table, offsets = torch.randn(50, 64, device="cuda"), torch.randn(4, 64, device="cuda")
    weight, values = torch.randn(2, 64, device="cuda") / 8, torch.randn(2, 32, 64, device="cuda") / 8
    leaves = [leaf.requires_grad_() for leaf in (table, offsets, weight, values)]
    torch.library.opcheck(torch.ops.tensorar.attend_windows.default, (codes, *leaves))
    rows = (torch.randn(9, 50, device="cuda"), torch.randint(50, (9,), device="cuda"), torch.rand(9, device="cuda"))
    torch.library.opcheck(torch.ops.tensorar.cross_entropy_rows.default, (*rows, True))
    states, head = torch.randn(9, 16, device="cuda", requires_grad=True), torch.randn(50, 16, device="cuda")
    arguments = (states, head.requires_grad_(), *rows[1:], 2**20, True, True, None, True)
    torch.library.opcheck(torch.ops.tensorar.head_cross_entropy.default, arguments)
    windows = (torch.randint(50, (3, 9), device="cuda"), torch.arange(3, device="cuda"), [0, 2**31], 50, "shared", 1, 2)
    torch.library.opcheck(torch.ops.tensorar.noise_windows.default, windows)
