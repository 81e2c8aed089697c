"""The moving average as a state of AdamW: LlamaGen's rule, beginning with the weights before the first step."""

import pytest
import torch

from training.adamw import AdamW


def steps_of(ema_decay: float | None, *, num_steps: int) -> tuple[AdamW, list[torch.Tensor], torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 4.0]))
    optimizer = AdamW([parameter], lr=0.5, betas=(0.9, 0.95), ema_decay=ema_decay)
    weights = [parameter.detach().clone()]
    for step in range(num_steps):
        parameter.grad = torch.tensor([1.0, -1.0, 0.5]) * (step + 1)
        optimizer.step()
        weights.append(parameter.detach().clone())
    return optimizer, weights, parameter


def test_average_begins_with_the_first_weights_and_moves_towards_each_step() -> None:
    optimizer, weights, parameter = steps_of(0.75, num_steps=3)
    w0, w1, w2, w3 = (weight.double() for weight in weights)
    expected = 0.75**3 * w0 + 0.25 * (0.75**2 * w1 + 0.75 * w2 + w3)
    assert optimizer.state[parameter]["ema"].double().tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_average_does_not_change_the_steps() -> None:
    (averaged, with_average, parameter), (plain, without, _) = steps_of(0.9, num_steps=3), steps_of(None, num_steps=3)
    assert all(torch.equal(*pair) for pair in zip(with_average, without, strict=True))
    assert averaged.state[parameter]["step"] == 3
    assert all("ema" not in state for state in plain.state.values())


def test_a_frozen_group_stays_bit_for_bit_and_then_takes_the_steps_of_a_fresh_one() -> None:
    frozen, free = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 4.0])) for _ in range(2))
    groups = [{"params": [frozen], "is_frozen": True}, {"params": [free]}]
    optimizer = AdamW(groups, lr=0.5, betas=(0.9, 0.95), ema_decay=0.75)
    for step in range(5):
        frozen.grad, free.grad = (torch.tensor([1.0, -1.0, 0.5]) * (step + 1) for _ in range(2))
        optimizer.step()
    fresh, weights, alone = steps_of(0.75, num_steps=5)
    assert torch.equal(free, weights[-1])
    assert torch.equal(frozen, weights[0])
    state = optimizer.state[frozen]
    assert list(state) == list(optimizer.state[free]) == ["step", "exp_avg", "exp_avg_sq", "ema"]
    assert state["step"] == 0
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()
    assert torch.equal(state["ema"], weights[0])
    optimizer.param_groups[0]["is_frozen"] = False
    free.grad = None
    for step in range(5):
        frozen.grad = torch.tensor([1.0, -1.0, 0.5]) * (step + 1)
        optimizer.step()
    assert torch.equal(frozen, weights[-1])
    assert all(torch.equal(state[kind], fresh.state[alone][kind]) for kind in state)


def test_what_has_no_gradient_keeps_weights_and_average() -> None:
    optimizer, weights, parameter = steps_of(0.75, num_steps=2)
    before = optimizer.state[parameter]["ema"].clone()
    parameter.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["ema"], before)
    assert torch.equal(parameter, weights[-1])
