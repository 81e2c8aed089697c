"""LlamaGen's own five training steps, taken by our DeepSpeed engine: losses, gradient norms and final weights."""

from pathlib import Path

import pytest
from training_processes import run_script

ORACLES = Path(__file__).parents[1] / "oracles"


@pytest.mark.parametrize(
    ("zero_stage", "num_ranks"),
    [(2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 2), (1, 2), (3, 2), (0, 1)))],
)
def test_five_steps_are_llamagens(zero_stage: int, num_ranks: int) -> None:
    run_script("five_steps.py", str(ORACLES), str(zero_stage), num_ranks=num_ranks)
