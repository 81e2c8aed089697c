"""The native code as each instruction set compiles it, one process a set: all agree with the references."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_drawing import uniform_rows
from test_native_pixels import check_crops, check_rows
from test_ops import arguments_of
from test_sampling_ops import check_drawn_codes, check_projected_states

from tokenization.compiler import INSTRUCTION_SETS
from training import noise, ops
from training.drawing import reference_sampling_uniforms


def check_noised_windows() -> None:
    """Windows of both couplings are the reference's."""
    for coupling in ("independent", "shared"):
        for window_size in (1, 2, 3, 4, 5, 8, 11):
            codes = torch.randint(0, 16384, (3, 67))
            arguments = arguments_of(batch=3, window_size=window_size, coupling=coupling)
            assert torch.equal(ops.noise_windows(codes, **arguments), noise.noise_windows(codes, **arguments))


def check_uniforms() -> None:
    """Uniforms of codebooks around the width of the lanes are the reference's."""
    for codebook_size in (1, 3, 4, 5, 8, 15, 16, 31, 32, 33, 64, 100, 1024, 16384):
        rows = uniform_rows(codebook_size)
        assert torch.equal(ops.sampling_uniforms(**rows), reference_sampling_uniforms(**rows)), codebook_size


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_computes_the_same(name: str) -> None:
    variables = {
        "TENSORAR_INSTRUCTION_SET": name,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, __file__], env=os.environ | variables, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


if __name__ == "__main__":
    check_noised_windows()
    check_uniforms()
    check_drawn_codes()
    check_projected_states()
    check_crops()
    check_rows()
