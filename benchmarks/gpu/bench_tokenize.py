"""Images a second that LlamaGen's VQ-16 encodes on a CUDA device, from uint8 in host memory to codes; JSON lines.

`python benchmarks/gpu/bench_tokenize.py`: random weights, 256 px; the rate does not depend on them.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tokenization.config import NETWORKS, TokenizerConfig
from tokenization.tokenizer import Tokenizer
from tokenization.vq import VQNetwork

NUM_IMAGES = 1024


def main() -> None:
    """Print one JSON line a dtype and batch."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 256, 256, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "vq16.pt"
        torch.save({"model": VQNetwork(NETWORKS["vq16"]).state_dict()}, weights)
        for dtype in ("float32", "bfloat16"):
            for batch_size in (32, 128):
                config = TokenizerConfig.model_validate(
                    {"weights": str(weights), "network": "vq16", "dtype": dtype, "batch_size": batch_size}
                )
                tokenizer = Tokenizer.load(config, device="cuda")
                tokenizer.encode(images[: 2 * batch_size])
                began = time.perf_counter()
                tokenizer.encode(images)
                spent_s = time.perf_counter() - began
                line = {"device": torch.cuda.get_device_name(), "dtype": dtype, "batch_size": batch_size}
                print(json.dumps(line | {"images_per_s": round(NUM_IMAGES / spent_s, 1)}), flush=True)


if __name__ == "__main__":
    main()
