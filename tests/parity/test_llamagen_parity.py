"""Our GPT against numbers that LlamaGen's own code gave (tests/oracles)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training.config import ModelConfig, SamplerConfig
from training.gpt import GPT, KeyValueCache, rotary_table
from training.guidance import is_guided
from training.loss import window_loss
from training.noise import make_windows
from training.sampling import sample_codes
from training.scored import score_predictions
from training.tensorar import TensorAR, num_added_parameters

ORACLES = Path(__file__).parents[1] / "oracles"
TINY = ModelConfig(
    num_layers=2, num_heads=4, model_dim=64, codebook_size=64, codes_per_side=4, num_classes=10, dropout=0.0
)


def _load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(ORACLES / name, weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return _load("llamagen_c2i_tiny.pt")


def _tiny_model(oracle: dict[str, Any]) -> TensorAR:
    model = TensorAR(TINY)
    model.base.load_state_dict(oracle["state_dict"])
    return model


def test_rotary_table_is_llamagens(oracle: dict[str, Any]) -> None:
    torch.testing.assert_close(rotary_table(4, 16, torch.device("cpu")), oracle["freqs_cis"], rtol=0, atol=1e-6)


def test_eval_logits_and_activations_are_llamagens(oracle: dict[str, Any]) -> None:
    base = _tiny_model(oracle).base.eval()
    codes, labels = oracle["inputs"]["idx"], oracle["inputs"]["labels"]
    x = torch.cat([base.embed_labels(labels), base.embed_codes(codes)], dim=1)
    acts = oracle["acts_eval"]
    torch.testing.assert_close(x, acts["h0"], rtol=0, atol=1e-4)
    h = base.backbone(x)
    torch.testing.assert_close(h, acts["h2"], rtol=0, atol=1e-4)
    torch.testing.assert_close(base.norm(h), acts["h_norm"], rtol=0, atol=1e-4)
    torch.testing.assert_close(base.head(h), oracle["logits_eval_full"], rtol=0, atol=1e-4)


def test_training_loss_and_every_gradient_are_llamagens(oracle: dict[str, Any]) -> None:
    model = _tiny_model(oracle).train()
    codes, labels = oracle["inputs"]["idx"], oracle["inputs"]["labels"]
    windows, _ = make_windows(codes, window_size=1)
    logits = model(windows, labels)
    torch.testing.assert_close(logits[:, :, 0], oracle["train_nodrop"]["logits"], rtol=0, atol=1e-4)
    result = window_loss(model, windows, labels, scored=score_predictions(codes, window_size=1))
    torch.testing.assert_close(result.loss, oracle["train_nodrop"]["loss"], rtol=0, atol=1e-4)
    result.loss.backward()
    grads = oracle["train_nodrop"]["grads"]
    assert {name for name, _ in model.base.named_parameters()} == set(grads)
    for name, parameter in model.base.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=0, atol=1e-4, msg=name)


def test_five_training_steps_are_llamagens(oracle: dict[str, Any]) -> None:
    steps = _load("llamagen_c2i_train5.pt")
    model = _tiny_model(oracle).train()
    parameters = dict(model.base.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": steps["weight_decay"]},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=steps["lr"], betas=tuple(steps["betas"]))
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(5):
        codes, labels = steps["idx"][step], steps["labels"][step]
        loss = window_loss(model, codes[:, :, None], labels, scored=score_predictions(codes, window_size=1)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), steps["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        for name, p in parameters.items():
            ema[name].mul_(steps["ema_decay"]).add_(p.detach(), alpha=1 - steps["ema_decay"])
        torch.testing.assert_close(loss, steps["losses"][step], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(norm, steps["grad_norms"][step], rtol=1e-4, atol=1e-4)
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), steps["final_state_dict"][name], rtol=0, atol=1e-4, msg=name)
        torch.testing.assert_close(ema[name], steps["ema"][name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
def test_keys_shapes_and_parameter_count_are_llamagens(size: str) -> None:
    listed = json.loads((ORACLES / "keys" / f"llamagen_gpt_{size}_c2i.json").read_text())
    with torch.device("meta"):
        base = GPT(ModelConfig(size=size))  # type: ignore[arg-type]
    ours = {key: list(value.shape) for key, value in base.state_dict().items()}
    assert list(ours) == list(listed["keys"])
    assert ours == {key: shape for key, (shape, _) in listed["keys"].items()}
    assert sum(p.numel() for p in base.parameters()) == listed["n_params"]


@pytest.mark.parametrize(
    ("size", "added"), [("B", 5_172_480), ("L", 9_190_400), ("XL", 14_355_200), ("XXL", 20_666_880)]
)
def test_tensorar_adds_the_papers_parameters(size: str, added: int) -> None:
    config = ModelConfig(size=size, window_size=4)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = TensorAR(config)
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.base.parameters())
    assert count == added == config.dim * (35 * config.dim + 60) // 4  # 8.75 d^2 + 15 d
    assert num_added_parameters(config) == added


def test_initialisation_statistics_are_llamagens() -> None:
    stats = json.loads((ORACLES / "llamagen_init_stats.json").read_text())
    torch.manual_seed(0)
    base = GPT(ModelConfig(num_layers=2, num_heads=4, model_dim=64, codebook_size=64, codes_per_side=4, num_classes=10))
    ours = base.state_dict()
    assert set(ours) == set(stats)
    for name, (_, std) in stats.items():
        tolerance = 4 * 0.02 / ours[name].numel() ** 0.5
        expected_mean = 1.0 if std == 0.0 and stats[name][0] == 1.0 else 0.0
        assert ours[name].mean().item() == pytest.approx(expected_mean, abs=tolerance), name
        assert ours[name].std(correction=0).item() == pytest.approx(std, abs=tolerance), name


@pytest.mark.parametrize(
    ("name", "guidance", "interval"),
    [("cfg1.0", 1.0, -1), ("cfg1.5", 1.5, -1), ("cfg3.0", 3.0, -1), ("cfg3.0_interval5", 3.0, 5)],
)
def test_greedy_tokens_are_llamagens(oracle: dict[str, Any], name: str, guidance: float, interval: int) -> None:
    config = SamplerConfig(guidance=guidance, guidance_interval=interval, temperature=0.0)
    sampled = sample_codes(_tiny_model(oracle), oracle["gen_labels"], config=config, seed=0)
    assert torch.equal(sampled.codes_NT, oracle["generate"][name]["tokens"])


@pytest.mark.parametrize(
    ("name", "guidance", "interval"),
    [("cfg1.0", 1.0, -1), ("cfg1.5", 1.5, -1), ("cfg3.0", 3.0, -1), ("cfg3.0_interval5", 3.0, 5)],
)
def test_step_logits_are_llamagens(oracle: dict[str, Any], name: str, guidance: float, interval: int) -> None:
    """The cached, guided logits of every step, the tokens of the oracle fed."""
    model = _tiny_model(oracle).eval()
    tokens, expected = oracle["generate"][name]["tokens"], oracle["generate"][name]["step_logits"]
    cache = KeyValueCache(TINY, batch_size=8, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for step in range(16):
            labels = torch.cat([oracle["gen_labels"], torch.full((4,), 10)])
            fed = model.base.embed_labels(labels) if step == 0 else model.base.embed_codes(tokens[:, step - 1 : step])
            fed = fed if step == 0 else fed.repeat(2, 1, 1)
            conditional, null = model.predict(model.base.backbone(fed, start=step, cache=cache))[:, 0, 0].chunk(2)
            scale = guidance if is_guided(step, interval=interval) else 1.0
            torch.testing.assert_close(null + (conditional - null) * scale, expected[:, step], rtol=0, atol=1e-4)
