"""Scored predictions: all inside the image at stride 1; at a larger one a sample whose mean over phases is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_ops import philox
from torch import Tensor

from training.config import ModelConfig
from training.cross_entropy import HeadLoss
from training.gpt import Readout
from training.loss import WindowLoss, reference_window_loss, window_loss
from training.scored import Scored, draw_phases, score_predictions
from training.tensorar import TensorAR, build_model

T, K, V = 9, 3, 11


def trained_like(*, window_size: int = K, dtype: torch.dtype = torch.float64) -> TensorAR:
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=1,
        num_heads=2,
        model_dim=8,
        codebook_size=V,
        codes_per_side=3,
        num_classes=3,
        window_size=window_size,
    )
    model = build_model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype)


def batch(size: int = 2, *, window_size: int = K) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(V, (size, T), generator=generator)
    return codes, torch.randint(V, (size, T, window_size), generator=generator), torch.arange(size)


def pairs(scored: Scored, sample: int) -> set[tuple[int, int]]:
    """(position, offset) of a sample's predictions that count."""
    inside = scored.is_inside_BR[sample]
    return set(zip(scored.positions_BR[sample][inside].tolist(), scored.offsets_R[inside].tolist(), strict=True))


def test_every_prediction_inside_the_image_is_scored_once_at_stride_1() -> None:
    codes, *_ = batch()
    scored = score_predictions(codes, window_size=K)
    everything = {(position, offset) for offset in range(K) for position in range(T - offset)}
    assert pairs(scored, 0) == pairs(scored, 1) == everything
    assert scored.positions_BR.shape == (2, len(everything))
    assert scored.is_inside_BR.all()
    for sample in range(2):
        for position, offset, target in zip(
            scored.positions_BR[sample], scored.offsets_R, scored.targets_BR[sample], strict=True
        ):
            assert target == codes[sample, position + offset]


@pytest.mark.parametrize("stride", [2, 4, 7])
def test_each_phase_scores_its_own_positions_and_all_phases_score_each_once(stride: int) -> None:
    codes, *_ = batch(1)
    seen: list[tuple[int, int]] = []
    for phase in range(stride):
        scored = score_predictions(codes, window_size=K, stride=stride, phases_BK=torch.tensor([[0, phase, phase]]))
        found = {pair for pair in pairs(scored, 0) if pair[1] > 0}
        assert all(position % stride == phase for position, _ in found)
        assert pairs(scored, 0) - found == {(position, 0) for position in range(T)}
        assert scored.num_of_offset == (9, -(-8 // stride), -(-7 // stride))  # whatever the phase
        seen += found
    assert sorted(seen) == sorted((position, offset) for offset in (1, 2) for position in range(T - offset))


@pytest.mark.parametrize("weights", [None, (1.0, 0.3, 0.1)])
@pytest.mark.parametrize("window_size", [1, K])
def test_the_loss_at_stride_1_is_that_of_full_logits_with_every_gradient(
    window_size: int, weights: tuple[float, ...] | None
) -> None:
    model = trained_like(window_size=window_size)
    codes, windows, labels = batch(window_size=window_size)
    weights = weights and weights[:window_size]
    expected = reference_window_loss(model(windows, labels), codes, offset_weights=weights)
    expected.loss.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    scored = score_predictions(codes, window_size=window_size)
    got = window_loss(model, windows, labels, scored=scored, offset_weights=weights)
    got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.loss_of_offset_K, expected.loss_of_offset_K)
    torch.testing.assert_close(got.accuracy_of_offset_K.double(), expected.accuracy_of_offset_K.double())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name, rtol=1e-6, atol=1e-9)


class _States(torch.nn.Module):
    """A float64 state for every prediction, a head, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.states_BTKD = torch.nn.Parameter(torch.randn(1, T, K, 5, dtype=torch.float64))
        self.weight_VD = torch.nn.Parameter(torch.randn(V, 5, dtype=torch.float64))

    def forward(self, windows: Tensor, labels: Tensor, *, scored: Scored, readout: Readout) -> HeadLoss:
        result: HeadLoss = readout(scored.of_prediction(self.states_BTKD), self.weight_VD)
        return result


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize(
    ("model", "tolerance"),
    [(_States(), 1e-12), (trained_like(), 1e-5)],  # the model's norms and gates are float32 inside
    ids=["states", "model"],
)
def test_the_mean_over_all_phases_is_the_exact_loss_and_gradient(
    model: torch.nn.Module, tolerance: float, stride: int
) -> None:
    weights = (1.0, 0.5, 0.25)
    codes, windows, labels = batch(1)

    def measure(scored: Scored) -> tuple[WindowLoss, list[Tensor]]:
        result = window_loss(model, windows, labels, scored=scored, offset_weights=weights)
        return result, list(torch.autograd.grad(result.loss, list(model.parameters())))

    exact, exact_grads = measure(score_predictions(codes, window_size=K))
    results = [
        measure(score_predictions(codes, window_size=K, stride=stride, phases_BK=torch.tensor([[0, first, second]])))
        for first, second in itertools.product(range(stride), repeat=2)
    ]
    losses = torch.stack([result.loss.detach() for result, _ in results])
    of_offset = torch.stack([result.loss_of_offset_K for result, _ in results])
    assert losses.std() > 1e-3  # a phase alone is not exact
    torch.testing.assert_close(losses.mean(), exact.loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(of_offset.mean(0), exact.loss_of_offset_K, rtol=1e-12, atol=0)
    for index, wanted in enumerate(exact_grads):
        mean = torch.stack([grads[index] for _, grads in results]).mean(0)
        torch.testing.assert_close(mean, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_predictions_outside_the_image_do_not_count() -> None:
    # Stride 4 from phase 3: offset 1 at positions 3 and 7; offset 2 at 3, and 7 would predict code 9 of 9.
    model, (codes, windows, labels) = trained_like(), batch(1)
    scored = score_predictions(codes, window_size=K, stride=4, phases_BK=torch.tensor([[0, 3, 3]]))
    assert pairs(scored, 0) == {*((position, 0) for position in range(T)), (3, 1), (7, 1), (3, 2)}
    logits = model(windows, labels).detach()
    entropies = -logits.log_softmax(-1)

    def entropy(position: int, offset: int) -> float:
        return float(entropies[0, position, offset, codes[0, position + offset]])

    result = window_loss(model, windows, labels, scored=scored)
    assert float(result.loss_of_offset_K[1]) == pytest.approx(4 * (entropy(3, 1) + entropy(7, 1)) / 8)
    assert float(result.loss_of_offset_K[2]) == pytest.approx(4 * entropy(3, 2) / 7)
    assert float(result.accuracy_of_offset_K[2]) == float(logits[0, 3, 2].argmax() == codes[0, 5])


def test_an_offset_of_which_a_phase_scores_nothing_measures_0_and_no_nan() -> None:
    model, (codes, windows, labels) = trained_like(), batch(1)
    scored = score_predictions(codes, window_size=K, stride=9, phases_BK=torch.tensor([[0, 0, 8]]))
    assert {offset for _, offset in pairs(scored, 0)} == {0, 1}  # offset 2 at position 8 would predict code 10 of 9
    result = window_loss(model, windows, labels, scored=scored)
    assert result.loss.isfinite()
    assert (float(result.loss_of_offset_K[2]), float(result.accuracy_of_offset_K[2])) == (0.0, 0.0)


def test_a_phase_is_the_word_of_its_sample_step_and_offset() -> None:
    seed, step, counters = 2**40 + 9, 77, (3, 2**33 + 1)
    phases = draw_phases(window_size=4, stride=1000, seed=seed, step=step, sample_counters_B=torch.tensor(counters))
    for drawn, counter in zip(phases.tolist(), counters, strict=True):
        words = [
            philox((counter & 0xFFFFFFFF, counter >> 32, step, offset), (seed & 0xFFFFFFFF, 6 | seed >> 32 << 8))
            for offset in (1, 2, 3)
        ]
        assert drawn == [0, *(word[0] * 1000 // 2**32 for word in words)]


def test_phases_are_uniform_fresh_and_the_samples_own() -> None:
    counters = torch.arange(3000)

    def phases(step: int, samples: Tensor = counters) -> Tensor:
        return draw_phases(window_size=3, stride=5, seed=1, step=step, sample_counters_B=samples)

    drawn = phases(7)
    assert drawn[:, 0].tolist() == [0] * 3000
    for offset in (1, 2):
        shares = torch.bincount(drawn[:, offset], minlength=5) / 3000
        assert shares.tolist() == pytest.approx([0.2] * 5, abs=5 * 0.4 / 3000**0.5)
    assert torch.equal(phases(7, counters[100:110]), drawn[100:110])
    for other in (phases(8)[:, 1], drawn[:, 2]):
        assert 0.1 < float((other == drawn[:, 1]).double().mean()) < 0.3
    assert torch.equal(draw_phases(window_size=3, stride=1, seed=1, step=7, sample_counters_B=counters), drawn * 0)
