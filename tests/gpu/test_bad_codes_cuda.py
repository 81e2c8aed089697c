"""Codes outside the codebook on a CUDA device stop the program: nothing is read or written beyond a table.

A kernel that stops takes its context with it, so each case is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

TARGETS = """
from training.ops import cross_entropy_rows
targets = torch.tensor([0, {code}, 2], device="cuda")
weights = torch.ones(3, device="cuda")
cross_entropy_rows(torch.zeros(3, 50, device="cuda"), targets, row_weights_R=weights, needs_grad={needs_grad})
"""
WINDOWS = """
codes = torch.tensor([[1, {code}], [2, 3]], device="cuda")
torch.ops.tensorar.mix_windows(codes, *(torch.zeros(rows, 24, device="cuda") for rows in (50, 2, 3)))
"""


def _ended(lines: str) -> tuple[int, str]:
    """The exit status and the last words of a process that runs `lines`, then waits for the device."""
    program = (
        "import torch\nfrom training.ops import load_ops\nload_ops()"
        + lines
        + "torch.cuda.synchronize()\nprint('done')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("code", [50, -1, 2**40])
def test_a_target_outside_the_codebook_stops_the_program(code: int, needs_grad: bool) -> None:
    status, words = _ended(TARGETS.format(code=code, needs_grad=needs_grad))
    assert status != 0, words
    assert "unspecified launch failure" in words


@pytest.mark.parametrize("code", [50, 2**40])
def test_a_code_beyond_the_table_stops_the_program(code: int) -> None:
    status, words = _ended(WINDOWS.format(code=code))
    assert status != 0, words
    assert "unspecified launch failure" in words


def test_good_codes_do_not() -> None:
    for lines in (TARGETS.format(code=49, needs_grad=True), WINDOWS.format(code=49)):
        status, words = _ended(lines)
        assert (status, words.strip()) == (0, "done")
