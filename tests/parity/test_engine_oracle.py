"""LlamaGen's own five training steps, taken by our DeepSpeed engine: losses, gradient norms and final weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "five_steps.py"
ORACLES = ROOT / "tests" / "oracles"


@pytest.mark.parametrize(
    ("zero_stage", "num_ranks"),
    [(2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 2), (1, 2), (3, 2), (0, 1)))],
)
def test_five_steps_are_llamagens(zero_stage: int, num_ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", SCRIPT]
    done = subprocess.run(
        [*map(str, command), str(ORACLES), str(zero_stage)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
