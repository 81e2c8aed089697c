"""Cross-entropy of k heads on a CUDA device: native rows, torch's kernels in chunks, full logits; JSON lines.

`python benchmarks/gpu/bench_loss.py`: 32 samples of 256 positions, k = 4, 16,384 codes, bfloat16, states and head to
loss and both gradients, at the sizes of the models. Medians of CUDA events; peak memory over the bytes of full logits
in bfloat16. `--chunk-mib` tries other sizes of a chunk.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from timing import median_us, peak_bytes
from torch.nn import functional as F

from training import cross_entropy
from training.config import SIZES, ModelConfig
from training.cross_entropy import head_cross_entropy
from training.ops import check_ops

NUM_ROWS, CODEBOOK_SIZE = 32 * 256 * 4, 16384


def measure(dim: int, *, chunk_mib: float, has_full: bool) -> dict[str, Any]:
    """Times and memory of one size of model."""
    torch.manual_seed(0)
    states = torch.randn(NUM_ROWS, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(CODEBOOK_SIZE, dim, device="cuda") / dim**0.5).bfloat16().requires_grad_()
    targets = torch.randint(CODEBOOK_SIZE, (NUM_ROWS,), device="cuda")
    row_weights = torch.full((NUM_ROWS,), 1 / NUM_ROWS, device="cuda")
    leaves = (states, weight)
    cross_entropy.ACCELERATOR_CHUNK_BYTES = int(chunk_mib * 2**20)

    def in_chunks(ops: str) -> Any:
        got = head_cross_entropy(states, weight, targets=targets, row_weights=row_weights, ops=ops)  # type: ignore[arg-type]
        return torch.autograd.grad(got.loss, leaves)

    def on_full_logits() -> Any:
        return torch.autograd.grad(F.cross_entropy(F.linear(states, weight).float(), targets), leaves)

    def products() -> Any:
        logits = states.detach() @ weight.detach().t()
        return logits @ weight.detach(), logits.t() @ states.detach()

    ways: dict[str, Callable[[], Any]] = {
        "native": lambda: in_chunks("native"),
        "reference": lambda: in_chunks("reference"),
    }
    if has_full:
        ways |= {"full_logits": on_full_logits, "products": products}
    us = {name: median_us(take, num_turns=20) for name, take in ways.items()}
    full = 2 * NUM_ROWS * CODEBOOK_SIZE
    return {
        "dim": dim,
        "chunk_mib": chunk_mib,
        **{f"{name}_us": round(value) for name, value in us.items()},
        **{f"{name}_peak_over_logits": round(peak_bytes(ways[name]) / full, 3) for name in us if name != "products"},
    }


def main() -> None:
    """Print JSON lines for each size of model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--chunk-mib", type=float, nargs="+", default=[cross_entropy.ACCELERATOR_CHUNK_BYTES / 2**20])
    options = parser.parse_args()
    check_ops(with_cuda=True)
    for name in options.sizes:
        dim = ModelConfig(size=name).dim
        for index, mib in enumerate(options.chunk_mib):
            line = {"device": torch.cuda.get_device_name(), "size": name}
            print(json.dumps(line | measure(dim, chunk_mib=mib, has_full=index == 0)), flush=True)


if __name__ == "__main__":
    main()
